"""Compiles every Triton kernel as its launchers launch it, without a GPU: registers, spills, shared memory, occupancy.

    python benchmarks/compile_report.py                     # sm_80, sm_90 and sm_100
    python benchmarks/compile_report.py --everything
    python benchmarks/compile_report.py --quick         # in half the time: few of the kernels that sort
    python benchmarks/compile_report.py --archs 90 --only merge

Ends with an error where a kernel spills registers to memory. The launches of many shapes, types and settings are
recorded, and compiled to machine code; nothing is run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are imported

import torch
import triton
from balora_bench import harness
from balora_kernels import eigh, rows, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# Of one multiprocessor: registers, bytes of shared memory (1 KB of a block is the system's), threads, blocks.
LIMITS = {80: (65536, 164 * 1024, 2048, 32), 90: (65536, 228 * 1024, 2048, 32), 100: (65536, 228 * 1024, 2048, 32)}


class Launch:
    """A kernel with the types and constants of one launch."""

    def __init__(self, kernel: JITFunction, args: tuple, settings: dict) -> None:
        self.kernel = kernel
        self.signature, self.constants, self.attributes = {}, {}, {}
        self.warps = settings.pop("num_warps", 4)
        settings.pop("enable_fp_fusion", None)
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **settings}
        for i, param in enumerate(kernel.params):
            value = values[param.name]
            kind = "constexpr"
            if isinstance(value, torch.Tensor):
                kind = TYPES[value.dtype]
                aligned = True
            elif isinstance(value, float):
                kind, aligned = "fp32", False
            elif isinstance(value, int) and not param.is_constexpr and (value != 1 or param.do_not_specialize):
                kind = "i32" if abs(value) < 2**31 else "i64"
                aligned = value % 16 == 0 and not param.do_not_specialize
            self.signature[param.name] = kind
            if kind == "constexpr":
                self.constants[param.name] = value
            elif aligned:
                self.attributes[(i,)] = [["tt.divisibility", 16]]

    @property
    def key(self) -> tuple:
        return self.kernel.__name__, str(self.signature), str(self.constants), str(self.attributes), self.warps

    @property
    def settings(self) -> str:
        flags = {k: v for k, v in self.constants.items() if k.isupper() and v not in (0, False)}
        pointers = ("z_ptr", "t_ptr", "out_ptr")
        kinds = sorted({v[1:] for k, v in self.signature.items() if k in pointers and v[0] == "*"})
        return " ".join([*kinds, *(k if v is True else f"{k}={v}" for k, v in flags.items())])

    def machine_code(self, arch: int):
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        options = {"num_warps": self.warps, "enable_fp_fusion": True}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    def compile(self, arch: int) -> dict:
        found = self.machine_code(arch)
        registers, stack, local = _resources(found.asm["cubin"])
        shared = found.metadata.shared
        all_registers, all_shared, threads, blocks = LIMITS[arch]
        width = 32 * self.warps
        fit = min(all_registers // (-(-registers // 8) * 8 * width), all_shared // (shared + 1024), threads // width)
        return {
            "kernel": self.kernel.__name__.strip("_"),
            "settings": self.settings,
            "arch": f"sm_{arch}",
            "warps": self.warps,
            "registers": registers,
            "spilled": stack + local,
            "shared": shared,
            "occupancy": f"{100 * min(fit, blocks) * width // threads} %",
        }


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack and of local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in text.stdout.splitlines() if "REG:" in line)
    numbers = dict(item.split(":") for item in line.split() if item.count(":") == 1)
    return int(numbers["REG"]), int(numbers["STACK"]), int(numbers["LOCAL"])


def record(call) -> list[Launch]:
    """The launches of a call, which are not carried out."""
    launches: list[Launch] = []
    run = JITFunction.run

    def note(kernel, *args, grid, warmup, **settings):
        launches.append(Launch(kernel, args, settings))

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def rows_case(
    vocab: int,
    dtype: torch.dtype = torch.float32,
    teacher: str | None = "difference",
    labels: bool = True,
    top_k: int | None = 20,
    temperature: float = 2.0,
    cap: float | None = None,
    bias: bool = False,
    scale: float = 1.0,
    factor: bool = False,
    out: torch.dtype = torch.bfloat16,
    valid: bool = False,
):
    """One chunk of rows through ``forward`` and ``gradient``; with labels in the padded buffers of the objective."""
    n = 8
    stride = tiles.row_stride(vocab) if labels else vocab

    def buffer(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(n, stride, dtype=dtype)[:, :vocab]

    z = buffer(dtype)
    b = torch.empty(vocab) if bias else None
    student = rows.Logits(z, b, scale, cap)
    t = None
    if teacher is not None:
        wide = dtype if teacher == "logits" else out
        values = rows.Logits(buffer(wide), b, scale, cap if teacher == "logits" else None)
        t = rows.Teacher(values, teacher == "difference", torch.empty(1) if factor else None)
    y = torch.empty(n, dtype=torch.int64) if labels else None
    keep = torch.empty(n, dtype=torch.bool) if valid else None
    common = dict(labels=y, valid=keep, temperature=temperature, padded=labels)

    def call() -> None:
        found = rows.forward(student, t, **common, top_k=None if top_k is None else min(top_k, vocab))
        if labels or teacher is not None:
            factor_of_loss = torch.empty(()) if not labels else None
            rows.gradient(
                student,
                t,
                found,
                buffer(out),
                **common,
                strength=0.05,
                lambda_diversity=0.005,
                scale=factor_of_loss,
            )

    return call


def small_case(n: int):
    matrix = torch.empty(n, n)
    return lambda: (eigh.eigh(matrix), eigh.inverse_factor(matrix))


def capped_case(n: int, vocab: int, rank: int, half: torch.dtype):
    """A tile of a soft-capped head's SVD term, in its two passes."""
    t, out = torch.empty(n, vocab), torch.empty(n, vocab, dtype=half)
    left, right = torch.empty(n, rank), torch.empty(rank, vocab)

    def call() -> None:
        rows.cap(t, 1 / 30, out.view(torch.float16), 2.0**14)
        rows.cap(t, 1 / 30, t)
        rows.capped_gradient(t, torch.empty(()), left, right, out)

    return call


CASES = {
    "SVD term": small_case(32),
    "SVD term, k above 22": small_case(64),
    "SVD term, soft-cap": capped_case(2048, 36608, 10, torch.bfloat16),
    "SVD term, soft-cap, float16": capped_case(2048, 36608, 10, torch.float16),
    "SVD term, soft-cap, k 1": capped_case(2048, 36608, 1, torch.bfloat16),
    "SVD term, soft-cap, small": capped_case(4, 50, 3, torch.bfloat16),
    "objective": rows_case(131072),
    "objective, V 32,000": rows_case(32000),
    "objective, V 256,000": rows_case(256000),
    "objective, V 50,257": rows_case(50257),
    "objective, V 1,000,000": rows_case(1_000_000),
    "objective, scale": rows_case(256000, scale=0.0625, top_k=None),
    "objective, a classifier": rows_case(3, top_k=20),
    "objective, K 128": rows_case(131072, top_k=128),
    "objective, K 1": rows_case(32000, top_k=1),
    "objective, T 1": rows_case(131072, temperature=1.0, top_k=None),
    "objective, T 1.5": rows_case(131072, temperature=1.5, top_k=None),
    "objective, soft-cap": rows_case(256000, cap=30.0),
    "objective, bias": rows_case(51200, bias=True),
    "objective, float16": rows_case(131072, out=torch.float16, factor=True),
    "objective, float32": rows_case(131072, out=torch.float32),
    "objective, a teacher's head": rows_case(131072, teacher="logits"),
    "objective, a teacher's head, soft-cap, bias": rows_case(256000, teacher="logits", cap=30.0, bias=True),
    "objective, no KL": rows_case(131072, teacher=None),
    "objective, CE alone": rows_case(131072, teacher=None, top_k=None),
    "objective, no entropy": rows_case(131072, top_k=None),
    **{
        f"consistency, {str(dtype)[6:]}, T {t:g}": rows_case(
            131072, dtype, "logits", False, None, t, out=dtype, valid=True
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for t in (1.0, 2.0)
    },
    **{
        f"diversity, {str(dtype)[6:]}": rows_case(131072, dtype, None, False, 20, out=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    },
}
# What is compiled for every generation; the rest, for the one that the sizes were chosen for.
EVERYWHERE = (
    "SVD term",
    "SVD term, soft-cap",
    "objective",
    "objective, V 256,000",
    "objective, V 50,257",
    "objective, K 128",
    "objective, soft-cap",
    "objective, float16",
    "objective, a teacher's head, soft-cap, bias",
    "consistency, bfloat16, T 2",
    "consistency, float32, T 2",
    "diversity, bfloat16",
)
# Of those, with --quick, whose top K is compiled for other generations than sm_90 too.
QUICK = ("objective", "objective, K 128")
COLUMNS = {
    "case": "as in",
    "kernel": "kernel",
    "settings": "settings",
    "arch": "for",
    "warps": "warps",
    "registers": "registers",
    "spilled": "spilled bytes",
    "shared": "shared bytes",
    "occupancy": "occupancy",
}


def report(archs: list[int], only: str | None, everything: bool, quick: bool) -> list[dict]:
    launches: dict[
        tuple, tuple[str, int, int]
    ] = {}  # of those alike the first: a case, the how manieth of it, for what
    sorted_before = set()
    for name, case in CASES.items():
        for i, launch in enumerate(record(case)):
            sort = launch.constants.get("BLOCKS"), launch.constants.get("KP")
            if not only or only in launch.kernel.__name__ or only in name:
                for arch in archs if everything or name in EVERYWHERE else {90}.intersection(archs):
                    if quick and launch.kernel.__name__ == "merge" and sort[1]:  # ten seconds each
                        if (*sort, arch) in sorted_before or (arch != 90 and name not in QUICK):
                            continue
                        sorted_before.add((*sort, arch))
                    launches.setdefault((*launch.key, arch), (name, i, arch))
    found = []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_compile, launches.values()):
            harness.progress(f"{len(found) + 1} of {len(launches)}: {row['kernel']} for {row['arch']}")
            found.append(row)
    harness.progress("")
    return found


def _compile(which: tuple[str, int, int]) -> dict:
    name, i, arch = which
    return {"case": name, **record(CASES[name])[i].compile(arch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", type=int, default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--only", help="a part of a kernel's or a case's name")
    parser.add_argument(
        "--everything", action="store_true", help="every case for every generation, not for sm_90 alone"
    )
    parser.add_argument("--quick", action="store_true", help="of the top-K searches that sort alike only one")
    parser.add_argument("--out", type=Path, help="writes OUT.md")
    arguments = parser.parse_args()
    found = report(arguments.archs, arguments.only, arguments.everything, arguments.quick)
    text = f"# What the Triton kernels take, triton {triton.__version__}\n\n" + harness.table(found, COLUMNS)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    spilled = [row for row in found if row["spilled"]]
    if spilled:
        names = "; ".join(f"{row['kernel']} ({row['settings']}) for {row['arch']}" for row in spilled)
        sys.exit(f"{len(spilled)} of {len(found)} spill registers: {names}")
    print(f"\n{len(found)} compiled, none spills")


if __name__ == "__main__":
    main()
