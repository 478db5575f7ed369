"""Compiles every kernel of csrc/ without a GPU: registers a thread, stack, spills.

    python benchmarks/cuda_report.py                     # sm_80, sm_90 and sm_100
    python benchmarks/cuda_report.py --archs 90 --out benchmarks/results/cuda-report

Needs nvcc. Ends with an error where a kernel spills registers to memory, or nvcc warns; nothing is run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from balora_bench import harness

CSRC = Path(__file__).parents[1] / "csrc"
ARCHS = (80, 90, 100)
COLUMNS = {
    "file": "file",
    "kernel": "kernel",
    "arch": "for",
    "registers": "registers",
    "stack": "stack bytes",
    "spilled": "spilled bytes",
}


def resources(source: Path, arch: int) -> list[dict]:
    """What ptxas says of each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source)]
        found = subprocess.run([*command, "-o", f"{folder}/out.cubin"], capture_output=True, text=True)
    if found.returncode or "warning" in found.stderr:
        sys.exit(f"{source.name} for sm_{arch}:\n{found.stderr}")
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers"
    rows = []
    for name, stack, spilled, registers in re.findall(pattern, found.stderr, re.DOTALL):
        numbers = dict(registers=int(registers), stack=int(stack), spilled=int(spilled))
        rows.append({"file": source.name, "kernel": readable(name), "arch": f"sm_{arch}", **numbers})
    return rows


def readable(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    return re.sub(
        r"^void |\(anonymous namespace\)::|balora::|\(.*$", "", text.replace("(anonymous namespace)::", "")
    ).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHS))
    parser.add_argument("--out", type=Path, help="writes OUT.md")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc was not found on the PATH")
    jobs = list(product(sorted(CSRC.glob("*.cu")), arguments.archs))
    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(lambda job: resources(*job), jobs) for row in found]
    rows.sort(key=lambda row: (row["file"], row["kernel"], int(row["arch"][3:])))
    version = re.search(
        r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )
    text = f"# What the CUDA kernels take, nvcc {version[1] if version else '?'}\n\n" + harness.table(rows, COLUMNS)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    bad = [row for row in rows if row["spilled"] or row["stack"]]
    if bad:
        sys.exit("spilled: " + "; ".join(f"{row['kernel']} for {row['arch']}" for row in bad))
    print(f"\n{len(rows)} compiled, none spills")


if __name__ == "__main__":
    main()
