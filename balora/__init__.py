"""BA-LoRA fine-tuning: output regularizers that never build the [tokens, vocabulary] tensors, on PiSSA adapters.

``import balora`` needs torch only. ``balora.functional`` holds the losses; what touches a model (``get_pissa_model``,
``attach``, ``teacher``, ...) needs transformers and peft, imported where they are used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import dispatch, functional
from .config import BALoraConfig
from .dispatch import info
from .four_bit import without_hub_kernels
from .functional import BALoraOutput, LinearHead

if TYPE_CHECKING:
    from .attachment import set_progress
    from .export import export_lora
    from .modeling import attach, detach
    from .pissa import get_pissa_model
    from .pretrained import teacher
    from .quantized import load_quantized, quantize

__version__ = "0.1.0"

__all__ = [
    "BALoraConfig",
    "BALoraOutput",
    "LinearHead",
    "attach",
    "detach",
    "export_lora",
    "functional",
    "get_pissa_model",
    "info",
    "load_quantized",
    "quantize",
    "set_progress",
    "teacher",
]

dispatch.extension()  # where it is built, torch.ops.balora.randomized_svd and low_rank_update are there from here on

_LAZY = {
    "attach": "modeling",
    "detach": "modeling",
    "set_progress": "attachment",
    "export_lora": "export",
    "get_pissa_model": "pissa",
    "teacher": "pretrained",
    "load_quantized": "quantized",
    "quantize": "quantized",
    "report": None,
    "train": None,
    "trainer": None,
}
_PACKAGES = {"yaml": "pyyaml"}  # packages whose name is not that of their module


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'balora' has no attribute {name!r}")
    module = _import(_LAZY[name] or name)
    found = getattr(module, name) if _LAZY[name] else module
    globals()[name] = found  # so that it is looked for once
    return found


def __dir__() -> list[str]:
    found = {*__all__, *_LAZY, "__version__", "reference"}
    if not all(importlib.util.find_spec(package) for package in ("peft", "transformers")):
        found -= _LAZY.keys()  # help() and inspect take every name that is told
    return sorted(found)


def _import(module: str) -> Any:
    """The module of balora of that name; where a package that it needs is missing, the command that installs it."""
    without_hub_kernels()
    try:
        return importlib.import_module(f".{module}", __name__)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", __name__):
            raise
        raise ImportError(
            f"balora.{module} needs {package}, which is not installed: pip install {_PACKAGES.get(package, package)}"
        ) from error
