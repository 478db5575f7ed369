"""Triton's interpreter without two things that most of its time goes to: the same bits, several times as fast."""


def speed_up() -> None:
    """For this process; nothing where there is no Triton, or one with another interpreter."""
    try:
        import numpy
        from triton.language import standard
        from triton.runtime import interpreter

        launch, patch, reduce = (
            interpreter.GridExecutor.__call__,
            interpreter._patch_lang,
            interpreter.ReduceOps.generic_reduce,
        )
    except (ImportError, AttributeError):
        return
    patched = set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function):
        """Each call of a function from a kernel gives all of the language its interpreted form, which it has."""
        if function not in patched:
            patched.add(function)
            return patch(function)

    def reduce_xor_at_once(self, input):
        """Every step of a sort has an xor over an axis, taken number by number in Python."""
        if self.combine_fn is standard._xor_combine:
            return self.min_max(input, numpy.bitwise_xor.reduce)
        return reduce(self, input)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_once
    interpreter.ReduceOps.generic_reduce = reduce_xor_at_once
