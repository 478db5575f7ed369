"""Build script: balora._C, the compiled extension. Everything declarative stands in pyproject.toml.

The environment variable BALORA_CUDA: "0" leaves the CUDA kernels out, "1" builds them or fails, unset builds them where
torch has CUDA and nvcc is there. Without torch or a C++ compiler balora is installed as pure Python (but with "1").
No GPU is needed to build.
"""

import json
import os
import re
import subprocess
from glob import glob
from pathlib import Path

import setuptools

_VARIABLE = "BALORA_CUDA"
_SETUPTOOLS = 77
_ARCHITECTURES = ("8.0", "9.0", "10.0")


def wanted(value):
    """True, False, or None for "where it is possible", from the variable's value."""
    choices = {None: None, "": None, "0": False, "1": True}
    if value not in choices:
        raise SystemExit(f"{_VARIABLE}: expected 0 or 1, or not set, found {value!r}")
    return choices[value]


def toolkit(home):
    """The CUDA toolkit's folder. torch takes the one above the nvcc on the PATH, which may be a script that calls
    another: where there are no headers, nvcc itself is asked."""
    if not home or Path(home, "include", "cuda_runtime.h").is_file():
        return home
    found = re.search(r"^#\$ TOP=(.+)$", _output(Path(home, "bin", "nvcc"), "--dryrun", "-c", "x.cu"), re.MULTILINE)
    return os.path.realpath(found[1].strip()) if found else home


def no_cuda(torch, home):
    """Why the CUDA kernels cannot be built for that torch, with the CUDA toolkit at ``home``; None if they can."""
    if torch.version.hip:
        return "torch is built for ROCm"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(home or "", "bin", "nvcc")
    if not home or not nvcc.is_file():
        return "no nvcc was found (CUDA_HOME names the toolkit's folder)"
    found = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if found and found[1] != torch.version.cuda.partition(".")[0]:
        return f"{nvcc} is of CUDA {found[1]}.{found[2]}, torch is built for CUDA {torch.version.cuda}"
    if not architectures(nvcc):
        return f"{nvcc} knows none of the architectures {', '.join(_ARCHITECTURES)}"
    return None


def architectures(nvcc):
    """Those that this nvcc knows, in the form of TORCH_CUDA_ARCH_LIST; the last one for newer devices too."""
    known = set(re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch")))
    found = [name for name in _ARCHITECTURES if name.replace(".", "") in known]
    return ";".join(found) + "+PTX" if found else ""


def supported(names):
    """Those of a TORCH_CUDA_ARCH_LIST for which the kernels compile. Some images set it with 7.5, for others."""
    asked = [name for name in re.split("[;, ]+", names) if name]
    kept = [name for name in asked if re.fullmatch(r"([89]|\d\d)\.\d[af]?(\+PTX)?", name)]
    if kept != asked:
        dropped = ", ".join(name for name in asked if name not in kept)
        print(f"balora: TORCH_CUDA_ARCH_LIST: {dropped} left out, expected numbers from {_ARCHITECTURES[0]} on")
    return ";".join(kept)


def _output(*command):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def _command(base, required):
    """The command build_ext, of torch; where the compiler fails, balora stays pure Python unless ``required``."""

    class Build(base):
        failed = False

        def build_extensions(self):
            optional = [extension.optional for extension in self.extensions]
            for extension in self.extensions:
                extension.optional = False  # else a compiler's failure goes no further than a warning
            try:
                super().build_extensions()
            except Exception as error:
                if required:
                    raise
                self.failed = True
                self._remove_earlier()
                print(f"balora: without its compiled extension: it could not be built: {error}")
            finally:
                for extension, was in zip(self.extensions, optional, strict=True):
                    extension.optional = was  # then its file may be missing

        def copy_extensions_to_source(self):  # of an editable installation
            super().copy_extensions_to_source()
            if self.failed:
                self._remove_earlier()

        def _remove_earlier(self):
            """What an earlier build has left where this one would put its files."""
            for extension in self.extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    return Build


def extension():
    """The arguments of setup() for balora._C; none where it cannot be built."""
    cuda = wanted(os.environ.get(_VARIABLE))
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        reason = f"torch cannot be imported ({error}); pip --no-build-isolation builds with the torch that is installed"
        if cuda:
            raise SystemExit(f"{_VARIABLE}=1: {reason}") from error
        print(f"balora: without its compiled extension: {reason}")
        return {}
    home = cpp_extension.CUDA_HOME = toolkit(cpp_extension.CUDA_HOME)
    reason = f"{_VARIABLE} was 0" if cuda is False else no_cuda(torch, home)
    if cuda and reason:
        raise SystemExit(f"{_VARIABLE}=1: {reason}")
    kind, sources, nvcc = cpp_extension.CppExtension, ["csrc/binding.cpp"], []
    defines = {"BALORA_TORCH": torch.__version__}
    if reason:
        print(f"balora: the compiled extension is built without CUDA: {reason}")
        defines["BALORA_WITHOUT_CUDA"] = reason
    else:
        built_for = supported(os.environ.get("TORCH_CUDA_ARCH_LIST", "")) or architectures(Path(home, "bin", "nvcc"))
        os.environ["TORCH_CUDA_ARCH_LIST"] = built_for  # torch would ask for a GPU
        kind, sources = cpp_extension.CUDAExtension, sources + sorted(glob("csrc/*.cu"))
        defines["BALORA_ARCHITECTURES"] = built_for
        nvcc = ["-O3", "--threads", "2", "-lineinfo"]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", *(f"-D{name}={json.dumps(value)}" for name, value in defines.items())]
    if not reason:
        cxx.append("-DBALORA_WITH_CUDA")
    module = kind(
        "balora._C",
        sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.cuh")),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        optional=not cuda,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": _command(cpp_extension.BuildExtension, bool(cuda))}}


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < _SETUPTOOLS:  # without isolation pip does not look
        raise SystemExit(f"setuptools {_SETUPTOOLS} or newer is needed to build, found {setuptools.__version__}")
    setuptools.setup(**extension())
