"""Which implementation of an operation runs, and why others cannot. The only reader of the variable BALORA_IMPL."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, TextIO

import torch

# The implementations of each operation, in the order in which "auto" takes them.
OPERATIONS = {
    "linear_objective": ("triton", "streaming", "reference"),
    "consistency_loss": ("triton", "streaming", "reference"),
    "diversity_loss": ("triton", "streaming", "reference"),
    "svd_loss": ("streaming", "cuda", "reference"),
    "covariance_loss": ("streaming", "reference"),
    "randomized_svd": ("cuda", "torch", "reference"),
}
_VARIABLE = "BALORA_IMPL"
_ON_GPU = ("triton", "cuda")
_CAPABILITY = (8, 0)
_TRITON = (3, 6)
_NONE: Mapping[str, str | None] = {}
_REBUILD = "pip install --no-build-isolation, in balora's source, builds it for the torch that is installed"
_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets")


def why_not(impl: str, device: torch.device | None = None) -> list[str]:
    """Every reason why ``impl`` cannot run here, with tensors on that device; empty if it can."""
    reasons: list[str] = []
    architectures: str | None = None
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed (pip install triton)")
        elif (found := _version("triton")) and _numbers(found) < _TRITON:
            reasons.append(f"triton {found} is installed, 3.6 or newer is needed")
        if importlib.util.find_spec("balora_kernels") is None:
            reasons.append("balora_kernels is not importable (an installed balora has it; the source is in kernels/)")
        if _interprets():
            return reasons  # on any device
    if impl == "cuda":
        built = extension()
        if isinstance(built, str):
            reasons.append(built)
        elif not built["cuda"]:
            why = built["without_cuda"]
            reasons.append("balora._C is built without CUDA" + (f": {why}" if why != _torch_without_cuda() else ""))
        else:
            architectures = built["architectures"]
    if impl in ("triton", "cuda"):
        if torch.version.hip:
            reasons.append("torch is built for ROCm, the kernels for CUDA")
        elif not torch.cuda.is_available():
            reasons.append("torch sees no CUDA device" if torch.version.cuda else _torch_without_cuda())
        elif device is not None and device.type != "cuda":
            reasons.append(f"the tensors are on {device}, not on a CUDA device")
        else:
            capability = torch.cuda.get_device_capability(device)
            found = f"the device has compute capability {'.'.join(map(str, capability))}"
            if capability < _CAPABILITY:
                reasons.append(f"{found}, 8.0 or higher is needed")
            elif architectures and not _runs_on(architectures, capability):
                reasons.append(f"{found}, balora._C is built for {architectures} (TORCH_CUDA_ARCH_LIST; {_REBUILD})")
    return reasons


# torch.compile takes the answer for a constant: it cannot trace how packages are found. The decorator for this,
# torch.compiler.assume_constant_result, would import triton along with balora.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for a TORCH_CUDA_ARCH_LIST has code for a device.

    Machine code runs within its major version from its minor version on, PTX on all that is newer, and what ends in "a"
    on that very version.
    """
    for major, minor, own, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architectures):
        built = int(major), int(minor)
        newer = capability >= built and not own and (ptx or capability[0] == built[0])
        if newer or capability == built:
            return True
    return False


def _torch_without_cuda() -> str:
    return f"torch {torch.__version__} is built without CUDA"


@cache
def extension() -> dict[str, Any] | str:
    """What the compiled extension was built for, or why it is not there. Loads it: its operators are in torch.ops."""
    if importlib.util.find_spec(f"{__package__}._C") is None:
        return f"the extension balora._C is not built ({_REBUILD}; with -v it says why not)"
    try:
        return importlib.import_module("._C", __package__).build_info()
    except ImportError as error:
        return f"the extension balora._C cannot be loaded: {error} ({_REBUILD})"


def _interprets() -> bool:
    """Whether Triton's kernels run in its interpreter: on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose(
    operation: str, impl: str = "auto", device: torch.device | None = None, limits: Mapping[str, str | None] = _NONE
) -> str:
    """The implementation of ``operation`` that runs for ``impl`` with tensors on ``device``.

    ``"auto"`` means what BALORA_IMPL names, where that is set and the operation has it, else the first of
    ``OPERATIONS`` that can run (Triton on a CUDA device only, not in its interpreter). A name never falls back.

    Args:
        limits: of an implementation, what it cannot do of that which is asked for.

    Raises:
        ValueError: the name is unknown, or that implementation cannot run here; the message has every reason.
    """
    known = OPERATIONS[operation]
    asked, name = "impl", impl
    if name == "auto":
        first = _first(known, device, limits)
        asked, name = f"the environment variable {_VARIABLE}", os.environ.get(_VARIABLE) or first
        everything = sorted({i for implementations in OPERATIONS.values() for i in implementations})
        if name not in everything:
            raise ValueError(f"{asked}: expected {_either(everything)}, found {name!r}")
        if name not in known:
            name = first
    if name not in known:
        raise ValueError(f"impl: expected {_either(('auto', *known))} for {operation}, found {name!r}")
    reasons = why_not(name, device)
    if limit := limits.get(name):
        reasons.append(limit)
    if reasons:
        raise ValueError(f"{asked}: {name!r} cannot run here: {'; '.join(reasons)}")
    return name


def _first(known: tuple[str, ...], device: torch.device | None, limits: Mapping[str, str | None]) -> str:
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    for name in known:
        if name in _ON_GPU and (not on_gpu or (name == "triton" and _interprets())):
            continue
        if not limits.get(name) and (name not in _ON_GPU or not why_not(name, device)):
            return name
    raise AssertionError(f"no implementation among {known}")


def info(file: TextIO | None = None) -> dict[str, Any]:
    """Print versions, devices, which implementation of each operation runs and why the others do not.

    Returns:
        The same as plain values: ``versions``, ``devices``, ``BALORA_IMPL`` and, for each operation, under
        ``implementations``, what ``"auto"`` takes (``runs``, or the ``error``) and the reasons against the others
        (``why_not``).
    """
    from . import __version__

    versions: dict[str, str | None] = {"balora": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    versions["torch"] = str(torch.__version__)  # which says for what it was built
    versions["balora._C"] = _build()
    devices = [f"cpu ({platform.machine()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    implementations: dict[str, dict[str, Any]] = {}
    for operation, known in OPERATIONS.items():
        entry: dict[str, Any] = {"why_not": {name: why_not(name) for name in known if why_not(name)}}
        try:
            entry["runs"] = choose(operation)
        except ValueError as error:
            entry["error"] = str(error)
        implementations[operation] = entry
    found = {
        "versions": versions,
        "devices": devices,
        _VARIABLE: os.environ.get(_VARIABLE),
        "implementations": implementations,
    }
    lines = ["versions"]
    lines += [f"  {name:18}{version or 'not installed'}" for name, version in versions.items()]
    lines += ["devices", *(f"  {device}" for device in devices)]
    lines.append(
        f"implementations ({_VARIABLE} {'is ' + repr(found[_VARIABLE]) if found[_VARIABLE] else 'is not set'})"
    )
    for operation, entry in implementations.items():
        others = [name for name in OPERATIONS[operation] if name != entry.get("runs") and name not in entry["why_not"]]
        also = f"   (also: {', '.join(others)})" if others else ""
        lines.append(f"  {operation:18}{entry.get('runs') or entry['error']}{also}")
    lines.append("what cannot run here")
    reasons = {name: why for entry in implementations.values() for name, why in entry["why_not"].items()}
    lines += [f"  {name:18}{'; '.join(why)}" for name, why in reasons.items()] or ["  nothing"]
    print("\n".join(lines), file=file or sys.stdout)
    return found


def _build() -> str | None:
    """What the extension was built for; None where it is not there."""
    built = extension()
    if isinstance(built, str):
        return None
    cuda = f"CUDA {built['cuda']} ({built['architectures']})" if built["cuda"] else "no CUDA"
    return f"built for torch {built['torch']}, {cuda}"


@cache  # it reads the disk, and every call of a loss asks
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(re.match(r"\d*", part)[0] or 0) for part in version.split(".")[:2])  # type: ignore[index]


def _either(names: Any) -> str:
    return " or ".join(map(repr, names))
