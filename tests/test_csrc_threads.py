"""The kernels of csrc/ on real threads, under the thread sanitizer, and through nvcc."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from .test_csrc import ROOT, SOURCES, TESTS, compile_all

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def sanitized(objects, folder):
    """What the thread sanitizer says of the kernels on real threads."""
    program = folder / "sanitized"
    command = ["g++", "-fsanitize=thread", "-pthread", *map(str, objects), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    flags = "-fsanitize=thread", "-g", "-DBALORA_REAL_THREADS"
    try:
        return folder, flags, compile_all([*SOURCES, TESTS / "csrc_under_sanitizer.cpp"], folder, *flags)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"g++ has no thread sanitizer: {error.stderr[-200:]}")


@needs_gxx
def test_no_thread_races_with_another(watched):
    folder, _, objects = watched
    found = sanitized(objects, folder)
    assert found.returncode == 0, found.stderr
    assert ("\n" + found.stdout).count("\n0 ") == 5, found.stdout


@needs_gxx
@pytest.mark.parametrize(("name", "which"), [("orthonormal", 2), ("jacobi", 4)])
def test_a_missing_barrier_is_found(watched, tmp_path, name, which):
    _, flags, objects = watched
    text = (ROOT / "csrc" / f"{name}.cu").read_text()
    place = list(re.finditer(r"\bbarrier\(\);", text))[which]
    broken = tmp_path / f"{name}.cu"
    broken.write_text(text[: place.start()] + text[place.end() :])
    rest = [o for o in objects if not o.name.startswith(name)]
    found = sanitized([*rest, *compile_all([broken], tmp_path, *flags)], tmp_path)
    assert "data race" in found.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_every_kernel_compiles_without_a_spill():
    report = [sys.executable, str(ROOT / "benchmarks" / "cuda_report.py")]
    found = subprocess.run(report, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
