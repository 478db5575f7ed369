"""The compiled extension: its operators on the CPU, what stands in their way, and what setup.py decides to build."""

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from balora import dispatch, spectral
from balora import functional as F

from .test_randomized_svd import CASES, assert_orthonormal, decay, matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EIGHT_BITS = torch.ones(3, 3).to(torch.float8_e4m3fn)


@pytest.fixture
def ops():
    """The operators."""
    if isinstance(reason := dispatch.extension(), str):
        pytest.skip(reason)
    return torch.ops.balora


@pytest.fixture
def as_on_a_gpu(monkeypatch, ops):
    """F.randomized_svd takes the operators, on the CPU."""
    monkeypatch.setattr(dispatch, "choose", lambda operation, impl, device: "cuda")


@pytest.mark.parametrize("view", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("case", CASES)
def test_randomized_svd(ops, case, view):
    a, rank, tolerance = CASES[case]
    if view == "transposed":
        a = a.T.contiguous().T
    elif view == "strided":
        a = torch.stack([a, torch.full_like(a, torch.nan)], dim=-1)[..., 0]
    u, s, vh, squares = ops.randomized_svd(a, rank, 10, 2, 0)
    k = min(rank, *a.shape)
    assert (u.shape, s.shape, vh.shape, squares.shape) == ((a.shape[0], k), (k,), (k, a.shape[1]), ())
    assert all(t.is_contiguous() for t in (u, s, vh))
    exact = torch.linalg.svdvals(a)
    assert (s - exact[:k]).abs().max() <= tolerance * exact.max()
    assert (s[:-1] >= s[1:]).all()
    assert_orthonormal(u, vh)
    assert (a @ vh.mT - u * s).abs().max() <= max(1e-5 * exact.max(), 1e-300)
    if case not in ("huge", "tiny"):  # their squares are no float64 numbers
        torch.testing.assert_close(squares, exact.square().sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("huge", "tiny")])
def test_randomized_svd_of_narrow_types(ops, case, dtype):
    a, rank = CASES[case][0].to(dtype), CASES[case][1]
    u, s, vh, squares = ops.randomized_svd(a, rank, 10, 4, 0)
    assert u.dtype == s.dtype == vh.dtype == torch.float32
    assert squares.dtype == torch.float64
    exact = torch.linalg.svdvals(a.double())
    assert (s - exact[: len(s)]).abs().max() <= 2e-6 * exact[0]
    assert_orthonormal(u, vh)
    torch.testing.assert_close(squares, exact.square().sum())
    plain = spectral.randomized_svd(a, rank, 10, 4, 0)[1]
    torch.testing.assert_close(s, plain, rtol=1e-5, atol=2e-6 * float(exact[0]))


def test_entries_at_the_ends_of_float32(ops):
    a = matrix(120, 80, decay(80, 2.0), torch.float32)
    a = a / a.abs().max()
    s = ops.randomized_svd(a, 5, 10, 2, 0)[1]
    for size in (1e37, 1e-35):
        u, scaled, vh, squares = ops.randomized_svd(a * size, 5, 10, 2, 0)
        torch.testing.assert_close(scaled / size, s, rtol=1e-4, atol=0)
        torch.testing.assert_close(squares / size**2, a.double().square().sum(), rtol=1e-4, atol=0)
        assert_orthonormal(u, vh)


def test_a_batch_is_its_matrices_and_the_same_bits_every_time(ops):
    a = torch.stack([matrix(30, 20, decay(20, p), seed=i) for i, p in enumerate((0.2, 1.0, 3.0, 1.0, 2.0, 0.5))])
    a[3] = 0
    batched = ops.randomized_svd(a.view(2, 3, 30, 20), 4, 10, 2, 7)
    assert [t.shape for t in batched] == [(2, 3, 30, 4), (2, 3, 4), (2, 3, 4, 20), (2, 3)]
    for i in range(6):
        alone = ops.randomized_svd(a[i], 4, 10, 2, 7)
        torch.testing.assert_close(alone[1], batched[1].view(6, 4)[i])
    again = ops.randomized_svd(a.view(2, 3, 30, 20), 4, 10, 2, 7)
    assert all(torch.equal(x, y) for x, y in zip(batched, again, strict=True))
    assert not torch.equal(ops.randomized_svd(a.view(2, 3, 30, 20), 4, 10, 2, 8)[1], batched[1])
    assert [t.shape for t in ops.randomized_svd(a[:0], 4, 10, 2, 0)] == [(0, 30, 4), (0, 4), (0, 4, 20), (0,)]
    turned = a.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # no two dimensions of it can be one
    torch.testing.assert_close(ops.randomized_svd(turned.view(2, 3, 30, 20), 4, 10, 2, 7)[1], batched[1])


@pytest.mark.parametrize("n_iter", [0, 1])
def test_few_iterations_are_those_of_the_python_twin(ops, n_iter):
    a = matrix(60, 40, decay(40, 1.0))
    found, twin = ops.randomized_svd(a, 5, 3, n_iter, 1), spectral.randomized_svd(a, 5, 3, n_iter, 1)
    for x, y in zip(found, twin, strict=False):
        torch.testing.assert_close(x, y)


def test_nan_stays_in_its_matrix(ops):
    a = torch.stack([matrix(9, 7, decay(7, 1.0), torch.float32)] * 3)
    a[0, 2, 3], a[2, 0, 0] = torch.nan, torch.inf
    for t in ops.randomized_svd(a, 3, 10, 2, 0):
        assert t[0].isnan().all()
        assert t[2].isnan().all()
        assert t[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_low_rank_update(ops, dtype, shape):
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    sizes = ((5, 7), (5, 3), (3,), (3, 7), ())
    z, u, weights, vh, multiple = (torch.randn((*shape, *last), generator=g, dtype=wide) for last in sizes)
    z = z.to(dtype)
    exact = multiple[..., None, None].double() * z.double() + (u * weights[..., None, :]).double() @ vh.double()
    for view in (z, z.mT.contiguous().mT):
        found = ops.low_rank_update(view, u, weights, vh, multiple)
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found, exact.to(wide).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


BAD = {
    "type of a": (lambda ops: ops.randomized_svd(torch.ones(3, 3).int(), 2, 0, 0, 0), TypeError, "a: expected float32"),
    "float8": (lambda ops: ops.randomized_svd(EIGHT_BITS, 2, 0, 0, 0), TypeError, "bfloat16, found Float8_e4m3fn"),
    "meta": (lambda ops: ops.randomized_svd(EIGHT_BITS.to("meta"), 2, 0, 0, 0), TypeError, "bfloat16, found Float8"),
    "shape of a": (lambda ops: ops.randomized_svd(torch.ones(3), 2, 0, 0, 0), ValueError, "a: expected the shape"),
    "no column": (lambda ops: ops.randomized_svd(torch.ones(3, 0), 2, 0, 0, 0), ValueError, "a: expected m and n"),
    "rank": (lambda ops: ops.randomized_svd(torch.ones(3, 3), 0, 0, 0, 0), ValueError, "rank: expected at least 1"),
    "oversample": (lambda ops: ops.randomized_svd(torch.ones(3, 3), 1, -1, 0, 0), ValueError, "oversample: expected 0"),
    "n_iter": (lambda ops: ops.randomized_svd(torch.ones(3, 3), 1, 0, -1, 0), ValueError, "n_iter: expected 0 or more"),
    "type of z": (lambda ops: update(ops, z=torch.ones(4, 5).int()), TypeError, "z: expected float32"),
    "float8 of z": (lambda ops: update(ops, z=EIGHT_BITS), TypeError, "z: expected float32, .*Float8"),
    "shape of z": (lambda ops: update(ops, z=torch.ones(5)), ValueError, r"z: expected the shape \[\.\.\., m, n\]"),
    "u": (lambda ops: update(ops, u=torch.ones(3, 2)), ValueError, r"u: expected the shape \[4, 2\], found \[3, 2\]"),
    "type of vh": (lambda ops: update(ops, vh=torch.ones(2, 5).double()), TypeError, "vh: expected Float with z in"),
    "multiple": (lambda ops: update(ops, multiple=torch.ones(1)), ValueError, "multiple: expected the shape"),
}


def update(ops, **changes):
    inputs = dict(z=torch.ones(4, 5), u=torch.ones(4, 2), weights=torch.ones(2), vh=torch.ones(2, 5))
    return ops.low_rank_update(**{**inputs, "multiple": torch.ones(()), **changes})


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(ops, case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(ops)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_what_torch_checks_of_an_operator(ops, dtype, shape):
    a = torch.randn(*shape, 12, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.library.opcheck(ops.randomized_svd.default, (a, 3, 2, 2, 0))
    u, s, vh, _ = ops.randomized_svd(a, 3, 2, 2, 0)
    torch.library.opcheck(ops.low_rank_update.default, (a, u, s, vh, torch.ones_like(s[..., 0])))


def test_under_the_compiler(ops):
    def run(a):
        u, s, vh, squares = ops.randomized_svd(a, 3, 2, 2, 0)
        return ops.low_rank_update(a, u, s, vh, -torch.ones_like(s[..., 0])), s.sum() / squares.sum().sqrt()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, m, n in ((2, 9, 7), (4, 2, 8)):
        a = torch.randn(batch, m, n, generator=torch.Generator().manual_seed(0))
        for found, expected in zip(compiled(a), run(a), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_autocast_and_autograd_do_not_reach_inside(ops):
    a = matrix(20, 12, decay(12, 1.0), torch.float32)
    outside = ops.randomized_svd(a, 3, 2, 2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.randomized_svd(a.requires_grad_(), 3, 2, 2, 0)
    assert all(torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


def test_the_gradient_of_the_singular_values(as_on_a_gpu):
    a = matrix(9, 7, torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5]).double()).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    assert torch.autograd.gradcheck(lambda x: (F.randomized_svd(x, 3)[1] * weights).sum(), a)
    u, _, vh = F.randomized_svd(a, 3)
    assert not u.requires_grad
    assert not vh.requires_grad
    batch = torch.zeros(2, 4, 3, requires_grad=True)
    F.randomized_svd(batch, 2)[1].sum().backward()
    assert not batch.grad.any()
    narrow = a.detach().bfloat16().T.requires_grad_()
    F.randomized_svd(narrow, 3)[1].sum().backward()
    assert narrow.grad.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.grad.double(), (vh.mT @ u.mT).detach(), rtol=2e-2, atol=2e-2)


# --- what stands in the way of the extension -------------------------------------------------------------------------


@pytest.fixture
def an_extension(monkeypatch):
    """What import finds in the place of balora._C: an error, or what it says of itself."""

    def put(found):
        def load(name, package):
            assert (name, package) == ("._C", "balora")
            if isinstance(found, Exception):
                raise found
            return SimpleNamespace(build_info=lambda: found)

        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(dispatch.importlib, "import_module", load)
        dispatch.extension.cache_clear()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("BALORA_IMPL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield put
    dispatch.extension.cache_clear()


def test_an_extension_with_cuda_is_what_auto_takes(an_extension, capsys):
    an_extension(dict(torch="2.13.0+cu130", cuda="13.0", architectures="8.0;9.0+PTX", without_cuda=None))
    gpu = torch.device("cuda", 0)
    assert dispatch.why_not("cuda", gpu) == []
    assert dispatch.choose("randomized_svd", device=gpu) == "cuda"
    assert dispatch.choose("randomized_svd", device=torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="'cuda' cannot run here: the tensors are on cpu"):
        dispatch.choose("randomized_svd", "cuda", torch.device("cpu"))
    assert dispatch._build() == "built for torch 2.13.0+cu130, CUDA 13.0 (8.0;9.0+PTX)"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (ImportError("it was built for torch 2.8.0, this is torch 2.13.0"), "cannot be loaded: it was built for torch"),
        (ImportError("undefined symbol: _ZN3c10"), "cannot be loaded: undefined symbol: _ZN3c10 (pip install --no-b"),
        (dict(torch="2.13.0", cuda=None, without_cuda="BALORA_CUDA was 0"), "is built without CUDA: BALORA_CUDA was 0"),
    ],
)
def test_the_reason_against_it_and_the_pure_python_path(an_extension, found, reason):
    an_extension(found)
    gpu = torch.device("cuda", 0)
    assert dispatch.choose("randomized_svd", device=gpu) == "torch"
    (why,) = dispatch.why_not("cuda", gpu)
    assert reason in why
    assert dispatch._build() == (None if isinstance(found, Exception) else "built for torch 2.13.0, no CUDA")
    with pytest.raises(ValueError, match="^impl: 'cuda' cannot run here: "):
        dispatch.choose("randomized_svd", "cuda", gpu)


def test_what_is_built_is_what_this_says(ops):
    built = dispatch.extension()
    assert built["torch"] == torch.__version__
    assert bool(built["cuda"]) == (not built["without_cuda"]) == bool(built["architectures"])
    assert "balora._C" in sys.modules


# --- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, in the folder where it runs."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    monkeypatch.delenv("BALORA_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    spec = importlib.util.spec_from_file_location("balora_setup", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(cuda=None, hip=None):
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda, hip=hip))


@pytest.fixture
def toolkit(tmp_path):
    """The folder of a CUDA 13.0 toolkit whose nvcc knows three architectures."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.48"\n'
        'else printf "compute_75\\ncompute_80\\ncompute_90\\n"; fi\n'
    )
    nvcc.chmod(0o755)
    return tmp_path


def test_the_variable_of_the_build(build):
    assert [build.wanted(value) for value in (None, "", "0", "1")] == [None, None, False, True]
    with pytest.raises(SystemExit, match="^BALORA_CUDA: expected 0 or 1, or not set, found 'yes'$"):
        build.wanted("yes")


def test_why_the_kernels_are_not_built(build, toolkit):
    assert build.no_cuda(fake_torch(cuda="13.0"), str(toolkit)) is None
    assert build.no_cuda(fake_torch(cuda="13.2"), str(toolkit)) is None
    assert build.no_cuda(fake_torch(), str(toolkit)) == "torch 2.13.0 is built without CUDA"
    assert build.no_cuda(fake_torch(hip="6.4"), str(toolkit)) == "torch is built for ROCm"
    for nowhere in (None, str(toolkit / "bin")):
        assert build.no_cuda(fake_torch(cuda="13.0"), nowhere).startswith("no nvcc was found")
    assert "nvcc is of CUDA 13.0, torch is built for CUDA 12.8" in build.no_cuda(fake_torch("12.8"), str(toolkit))
    nvcc = toolkit / "bin" / "nvcc"
    assert build.architectures(nvcc) == "8.0;9.0+PTX"
    nvcc.write_text(nvcc.read_text().replace("80", "70").replace("90", "60"))
    assert build.architectures(nvcc) == ""
    assert "knows none of the architectures 8.0" in build.no_cuda(fake_torch(cuda="13.0"), str(toolkit))
    nvcc.chmod(0o644)
    assert "knows none of the architectures 8.0" in build.no_cuda(fake_torch(cuda="13.0"), str(toolkit))


def test_a_toolkit_behind_a_script(build, toolkit, tmp_path):
    """An nvcc on the PATH that calls the toolkit's own, as some images have it: the headers are not beside it."""
    nvcc = toolkit / "bin" / "nvcc"
    assert build.toolkit(str(toolkit)) == str(toolkit)  # nothing better is known
    assert build.toolkit(None) is None
    real = tmp_path / "cuda-13.0"
    nvcc.write_text(f"#!/bin/sh\nprintf '#$ _THERE_={real}/bin\\n#$ TOP={real}/bin/..\\n' >&2\n")
    (real / "bin").mkdir(parents=True)
    assert build.toolkit(str(toolkit)) == str(real)
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cuda_runtime.h").touch()
    assert build.toolkit(str(toolkit)) == str(toolkit)


def test_without_torch_it_is_pure_python(build, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build.extension() == {}
    assert "balora: without its compiled extension: torch cannot be imported" in capsys.readouterr().out
    monkeypatch.setenv("BALORA_CUDA", "1")
    with pytest.raises(SystemExit, match="^BALORA_CUDA=1: torch cannot be imported .*--no-build-isolation"):
        build.extension()


def test_what_is_built_without_cuda(build, monkeypatch):
    monkeypatch.setenv("BALORA_CUDA", "0")
    (module,) = build.extension()["ext_modules"]
    assert (module.name, module.sources, module.optional) == ("balora._C", ["csrc/binding.cpp"], True)
    assert '-DBALORA_WITHOUT_CUDA="BALORA_CUDA was 0"' in module.extra_compile_args["cxx"]
    assert f'-DBALORA_TORCH="{torch.__version__}"' in module.extra_compile_args["cxx"]
    assert "csrc/randomized_svd.h" in module.depends
    monkeypatch.setenv("BALORA_CUDA", "1")
    monkeypatch.setattr(build, "no_cuda", lambda torch, home: "it rains")
    with pytest.raises(SystemExit, match="^BALORA_CUDA=1: it rains$"):
        build.extension()


@pytest.mark.parametrize("value", ["", "1"])
def test_what_is_built_with_cuda(build, monkeypatch, toolkit, value):
    from torch.utils import cpp_extension

    monkeypatch.setenv("BALORA_CUDA", value)
    monkeypatch.setattr(build, "no_cuda", lambda torch, home: None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", cpp_extension.CppExtension)
    monkeypatch.setattr(build.os, "environ", dict(build.os.environ))
    (module,) = build.extension()["ext_modules"]
    assert module.optional == (value == "")
    assert "csrc/randomized_svd.cu" in module.sources
    assert not any(Path(source).is_absolute() for source in module.sources)
    assert build.os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"
    assert {"-DBALORA_WITH_CUDA", '-DBALORA_ARCHITECTURES="8.0;9.0+PTX"'} <= set(module.extra_compile_args["cxx"])
    assert not any("fast" in flag for flags in module.extra_compile_args.values() for flag in flags)
    for asked, built in (("9.0", "9.0"), ("7.5 8.0 9.0a", "8.0;9.0a"), ("7.5+PTX", "8.0;9.0+PTX")):
        build.os.environ["TORCH_CUDA_ARCH_LIST"] = asked
        (module,) = build.extension()["ext_modules"]
        assert f'-DBALORA_ARCHITECTURES="{built}"' in module.extra_compile_args["cxx"]
        assert build.os.environ["TORCH_CUDA_ARCH_LIST"] == built


def test_architectures_for_which_the_kernels_do_not_compile_are_dropped(build, capsys):
    for asked in ("8.0;8.6;9.0+PTX", "10.0a", "9.0a+PTX", ""):
        assert build.supported(asked) == asked
    assert not capsys.readouterr().out
    assert build.supported("5.2 7.0, 7.5 8.0 8.6;9.0 10.0 12.0+PTX ") == "8.0;8.6;9.0;10.0;12.0+PTX"
    told = "balora: TORCH_CUDA_ARCH_LIST: 5.2, 7.0, 7.5 left out, expected numbers from 8.0 on\n"
    assert capsys.readouterr().out == told
    for asked in ("6.1;7.5+PTX", "Turing;Ampere", "native"):  # names may mean several, native those that are visible
        assert build.supported(asked) == ""


@pytest.mark.parametrize("error", [RuntimeError, CompileError])  # ninja's, and what setuptools passes over
@pytest.mark.parametrize("inplace", [False, True])  # as an editable installation does
def test_a_compiler_that_fails(build, tmp_path, monkeypatch, capsys, error, inplace):
    class Fails(build_ext):
        def build_extension(self, extension):
            raise error("no compiler")

    def command(required):
        extension = Extension("balora._C", [], optional=not required)
        found = build._command(Fails, required)(Distribution({"packages": ["balora"], "ext_modules": [extension]}))
        found.inplace, found.build_lib, found.build_temp = inplace, "built", "temporary"
        found.ensure_finalized()
        return found

    monkeypatch.chdir(tmp_path)
    name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    earlier = [Path(folder, "balora", name) for folder in (".", "built")]
    for file in earlier:
        file.parent.mkdir(parents=True)
        file.touch()
    with pytest.raises(error, match="no compiler"):
        command(required=True).run()
    assert all(file.exists() for file in earlier)
    command(required=False).run()
    assert "without its compiled extension: it could not be built: no compiler" in capsys.readouterr().out
    assert [file.exists() for file in earlier] == [not inplace, False]
