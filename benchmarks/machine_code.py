"""Instructions that a thread of each Triton kernel executes on sm_90, counted in its machine code; needs no GPU.

    python benchmarks/machine_code.py        # one JSON object: kernel -> instructions, warps

The kernels are compiled as the objective launches them (V 131,072, bfloat16; the SVD term with 32 columns, and a tile
of it under a soft-cap) and disassembled. A loop counts as often as it runs. Both sides of a branch count, so a little
too much is counted.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import compile_report
import kernel_counts
import torch
import triton

ARCH = 90
VOCAB = 131072
SMALL = 32  # columns of the SVD term's small matrices


def repetitions() -> dict[str, int]:
    """How often the loop of a kernel runs."""
    return {
        "jacobi": compile_report.eigh._SWEEPS * (SMALL - 1),
        "cholesky_inverse": SMALL,
        "capped_gradient": kernel_counts.TILE[2],
    }


def disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def executed(text: str, times: int) -> int:
    """Instructions of a disassembly whose longest loop, if it has one, runs so many times; not the padding."""
    labels: dict[str, int] = {}
    count, body = 0, 0
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            if instruction[1] == "NOP":
                continue
            count += 1
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1] == "BRA" and target and target[0] in labels:
                length = count - labels[target[0]]
                body = max(body, length if length > 1 else 0)  # the last branch, onto itself, is padding too
    return count + body * (times - 1)


def main() -> None:
    found = {}
    n, vocab, rank, _ = kernel_counts.TILE
    tile = compile_report.record(compile_report.capped_case(n, vocab, rank, torch.bfloat16))
    others = compile_report.record(compile_report.rows_case(VOCAB))
    others += compile_report.record(compile_report.small_case(SMALL))
    names = [launch.kernel.__name__ for launch in others]
    for name, launch in zip([*names, *kernel_counts.CAPPED], others + tile, strict=True):
        code = launch.machine_code(ARCH).asm["cubin"]
        found[name] = {
            "instructions": executed(disassembled(code), repetitions().get(name, 1)),
            "warps": launch.warps,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
