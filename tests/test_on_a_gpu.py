"""benchmarks/on_a_gpu.sh, with a make that does nothing: what ends a call costs its last step, and the next goes on."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_a_gpu.sh"
MAKE = """#!/bin/sh
mkdir -p $RESULTS
echo "$1 $2 $3" >> $RESULTS/calls.txt
case "$*" in *gpu-profiles*) sleep 60 ;; *gpu-tests*) exit 2 ;; esac
"""


@pytest.fixture
def call(tmp_path):
    """Runs the script in a folder of its own, and gives the steps that it began, and the archive's files."""
    (tmp_path / "benchmarks").mkdir()
    script, make = tmp_path / "benchmarks" / SCRIPT.name, tmp_path / "make"
    script.write_text(SCRIPT.read_text())
    make.write_text(MAKE)
    for file in (script, make):
        file.chmod(0o755)

    def run(seconds):
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "LEAST": str(seconds // 2)}
        command = [str(script), "out", str(seconds)]
        shown = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
        with tarfile.open(tmp_path / "out" / "gpu.tgz") as archive:
            return shown, set(archive.getnames())

    return run


def test_steps_go_on_in_the_next_call(call):
    shown, kept = call(16)
    assert "== build: status 0" in shown
    assert "== tests: status 2" in shown
    assert "== profiles: status 124" in shown  # stopped when the time was over
    assert "== cost-rest: no time left" in shown
    assert {"logs/tests.log", "logs/profiles.log", "results/calls.txt"} <= kept
    shown, kept = call(16)
    assert "build" not in shown
    assert "profiles" not in shown  # a whole call was too short for it
    assert "== sweep: status 0" in shown
    assert "logs/sweep.log" in kept
