"""What every GPU kernel must move and compute, counted from shapes, and how long that takes at the peaks of a device.

    python benchmarks/kernel_counts.py        # the table: a chunk, a soft-capped tile, a randomized SVD

Bytes are those of each tensor once: what a kernel reads again it is taken to find in the caches. Operations are of the
unit that does most of the work: instructions of a thread ("issue", counted in machine code by ``machine_code``),
multiplications and additions in float64, or on tensor cores. A lower bound of a kernel's time is the longer of the two;
a kernel of few blocks has only their multiprocessors. Nothing here has been timed on a device.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from balora_bench import harness

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


class Device(NamedTuple):
    """Peaks of the SXM module in NVIDIA's data sheet, dense; instructions: multiprocessors · 128 · boost clock."""

    name: str
    multiprocessors: int
    clock: float  # 1/s
    bandwidth: float  # bytes/s
    float64: float  # operations/s outside of tensor cores, as all below
    float32: float
    tf32: float  # tensor cores
    bf16: float

    @property
    def issue(self) -> float:
        """Instructions of a thread: four warps a cycle on each multiprocessor."""
        return self.multiprocessors * 128 * self.clock


DEVICES = (
    Device("A100 80GB", 108, 1.41e9, 2.039e12, 9.7e12, 19.5e12, 156e12, 312e12),
    Device("H100", 132, 1.98e9, 3.35e12, 33.5e12, 66.9e12, 494.7e12, 989.4e12),
    Device("H200", 132, 1.98e9, 4.8e12, 33.5e12, 66.9e12, 494.7e12, 989.4e12),
)


class Count(NamedTuple):
    kernel: str  # as in the sources
    source: str
    shape: str
    read: int  # bytes
    written: int
    unit: str  # a field of Device
    operations: float
    blocks: int  # programs of Triton

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def seconds(self, device: Device) -> tuple[float, float]:
        """At the bandwidth; at the unit's peak."""
        used = min(1.0, self.blocks / device.multiprocessors)
        return self.bytes / device.bandwidth, self.operations / (getattr(device, self.unit) * used)

    def bound(self, device: Device) -> str:
        memory, unit = self.seconds(device)
        return "bandwidth" if memory >= unit else self.unit


# ---------------------------------------------------------------- Triton: rows, soft-capped tiles, small matrices

FIELDS = 7  # of a tile's state, with difference logits at temperature 2
STATS = 6  # of a row, written; ``gradient`` reads one fewer, m at temperature 1


# The launches of a soft-capped head's SVD term, in their order.
CAPPED = ("cap", "cap, in place", "capped_gradient")

Code = dict[str, dict[str, int]]  # of ``machine_code``


def triton_count(code: Code, kernel: str, source: str, shape: str, read: int, written: int, blocks: int) -> Count:
    found = code.get(kernel, {"instructions": 0, "warps": 1})
    operations = found["instructions"] * found["warps"] * 32 * blocks
    return Count(kernel, f"kernels/balora_kernels/{source}", shape, read, written, "issue", operations, blocks)


def triton_counts(n: int, vocab: int, top_k: int, t_size: int, small: int, code: Code) -> list[Count]:
    """A chunk of the objective: z [n, V] float32, differences and gradient in a type of t_size bytes, labels, top K at
    temperature 2; the eigenvectors and the inverse factor of a matrix of ``small`` columns.

    code: instructions and warps of each kernel, for shapes with the same tiles.
    """
    from balora_kernels import tiles

    cut = tiles.tiling(vocab)
    logits, states = n * vocab, n * cut.tiles * FIELDS * 4
    labels, maxima, top = n * 8, n * cut.blocks * 4, n * top_k * 12
    blocks_read = min(tiles.power_of_two(max(top_k, 2)), cut.blocks) * cut.block
    sources = ("row_kernels.py", "eigh.py")
    rows, square = f"{n} × {vocab:,}, 4 + {t_size} bytes", f"{small} × {small}"

    count = functools.partial(triton_count, code)
    return [
        count("tile_states", sources[0], rows, logits * (4 + t_size) + labels, states + maxima, n * cut.tiles),
        # beside the maxima K of their blocks, and the logit of the label (which may lie in one of them)
        count("merge", sources[0], rows, states + maxima + labels + n * 4 * (blocks_read + 1),
              n * 4 * (3 + STATS) + top, n),
        count("gradient", sources[0], rows, logits * (4 + t_size) + labels + n * 4 * (STATS - 1), logits * t_size,
              n * cut.tiles),
        count("add_top", sources[0], f"{n} × {top_k}", top + n * top_k * t_size, n * top_k * t_size, n),
        count("jacobi", sources[1], square, small * small * 4, (small + small * small) * 4, 1),
        count("cholesky_inverse", sources[1], square, small * small * 4, small * small * 4, 1),
    ]  # fmt: skip


def capped_counts(n: int, vocab: int, rank: int, half: int, code: Code) -> list[Count]:
    """A tile [n, vocab] of a soft-capped head's SVD term: tanh to ``half`` bytes, tanh in place, gradient.

    code: as above, of a gradient of the same rank.
    """
    from balora_kernels import tiles

    tile, factors = n * vocab, (n + vocab) * rank * 4
    by_rows = n * tiles.tiling(vocab).tiles
    by_squares = -(-n // tiles.OUTER_ROWS) * -(-vocab // tiles.OUTER_COLUMNS)
    count = functools.partial(triton_count, code)
    halved, shape, source = f"{n:,} × {vocab:,}, 4 + {half} bytes", f"{n:,} × {vocab:,}, 4 bytes", "row_kernels.py"
    return [
        count(CAPPED[0], source, halved, tile * 4, tile * half, by_rows),
        count(CAPPED[1], source, shape, tile * 4, tile * 4, by_rows),
        # beside the tile the multiple, and left and right
        count(CAPPED[2], source, f"{halved}, rank {rank}", tile * 4 + 4 + factors, tile * half, by_squares),
    ]


# ---------------------------------------------------------------- CUDA: the randomized SVD


class Sketch(NamedTuple):
    """A [batch, m, n] of a type, rank k, a sketch of ``width`` columns: how csrc/ cuts it."""

    batch: int
    m: int
    n: int
    k: int
    width: int
    dtype: str = "bfloat16"

    @property
    def item(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def columns(self) -> int:  # L
        return up(self.width, 16)

    def cut(self, transposed: bool) -> tuple[int, int]:
        """Tiles of a product and slices of its sum: ``cut`` in products.cu."""
        along, length = (self.n, self.m) if transposed else (self.m, self.n)
        tiles = -(-along // (512 // self.item if transposed else 128))
        slices = min(-(-1056 // (self.batch * tiles)), -(-length // 256))
        step = min(up(-(-length // slices), 64), 2048)
        return tiles, -(-length // step)

    def gram_blocks(self, length: int) -> int:
        return min(-(-264 // self.batch), up(length, 64) // 64, 64)

    @property
    def iterate_slices(self) -> int:
        """Of A (Aᵀ Q) in one reading; 0 where the shape has no such kernel."""
        fits = self.dtype == "bfloat16" and self.columns <= 32 and 128 < self.m <= 512
        return min(-(-264 // self.batch), -(-self.n // 64)) if fits else 0

    def __str__(self) -> str:
        return f"{self.batch} of {self.m:,} × {self.n:,}, {self.width} columns, {self.dtype}"


def up(a: int, b: int) -> int:
    return -(-a // b) * b


def cuda_counts(s: Sketch, sweeps: int = 8) -> list[Count]:
    """Each kernel of one randomized SVD, once; a panel's kernels for Q, of m rows.

    Jacobi's sweeps depend on the matrix: 6 to 10 are usual.
    """
    width, columns, batch = s.width, s.columns, s.batch
    a, panel, small = batch * s.m * s.n, batch * columns * up(s.m, 64), batch * width * width
    tensor = "tf32" if s.dtype == "float32" else "bf16"
    parts = 1 if s.dtype == "float32" else 2  # of the operand, in memory
    sketched, multiplied = (2, 3) if s.dtype == "float32" else (1, 2)  # products on tensor cores
    flops = 2 * a * columns
    (row_tiles, row_slices), (column_tiles, column_slices) = s.cut(False), s.cut(True)
    wide = batch * columns * up(s.n, 64)
    blocks = s.gram_blocks(s.m)
    grams = batch * blocks * columns**2 * 8
    sums = batch * row_tiles * row_slices * 8
    threads = 128

    def count(kernel, file, read, written, unit, operations, blocks) -> Count:
        return Count(kernel, f"csrc/{file}", str(s), int(read), int(written), unit, operations, blocks)

    rows_grid, columns_grid = batch * row_tiles * row_slices, batch * column_tiles * column_slices
    found = [
        count("times, of Ω", "products.cu", a * s.item, row_slices * panel * 4 + sums, tensor, sketched * flops,
              rows_grid),
        count("add_squares", "products.cu", sums, batch * 8, "float64", sums / 8, -(-batch // threads)),
        count("times", "products.cu", a * s.item + parts * wide * s.item, row_slices * panel * 4, tensor,
              multiplied * flops, rows_grid),
        count("transposed_times", "products.cu", a * s.item + parts * panel * s.item, column_slices * wide * 4,
              tensor, multiplied * flops, columns_grid),
    ]  # fmt: skip
    if s.iterate_slices:
        found.append(
            count("iterate", "power_iteration.cu", a * s.item + 2 * panel * s.item + batch * 8,
                  s.iterate_slices * panel * 4, tensor, 2 * multiplied * flops, batch * s.iterate_slices)
        )  # fmt: skip
    # The elimination of column j: rows below it, each up to its own diagonal.
    eliminated = batch * sum(2 * (row + 1) for j in range(width) for row in range(j + 1, width))
    solved = batch * width * (width + 1) * up(s.m, 64)
    pairs = width * (width - 1) // 2
    return [
        *found,
        count("gather_kernel", "orthonormal.cu", row_slices * panel * 4, panel * 4, "float32", row_slices * panel,
              panel // threads),
        count("gram_kernel", "orthonormal.cu", panel * 4, grams, "float64", 2 * columns * panel, batch * blocks),
        count("factor_kernel", "orthonormal.cu", grams, 2 * small * 8, "float64", eliminated, batch),
        count("apply_kernel", "orthonormal.cu", batch * width * up(s.m, 64) * 4 + small * 8,
              panel * 4 + (2 * panel * 2 if parts == 2 else 0), "float64", solved, batch * -(-up(s.m, 64) // threads)),
        # of each pair three inner products and the rotation of two columns of C and of V
        count("jacobi_kernel", "jacobi.cu", 2 * small * 8, batch * s.k * (4 + 2 * width * 8), "float64",
              batch * sweeps * pairs * 18 * width, batch),
        count("turn_kernel", "orthonormal.cu", batch * (width * s.m * 4 + s.k * width * 8), batch * s.m * s.k * 4,
              "float64", 2 * batch * s.k * width * s.m, batch * -(-s.m // threads)),
        count("update", "low_rank_update.cu", a * s.item + batch * 4 * (s.k * (s.m + s.n + 1) + 1), a * s.item,
              "float32", 2 * a * s.k, batch * -(-s.m // 32) * -(-s.n // threads)),
    ]  # fmt: skip


# ---------------------------------------------------------------- what the compilers say

# The row of cuda-report.md that a kernel runs as, its threads, and bytes of shared memory, for a sketch of 20 columns.
LAUNCHES = {
    "times, of Ω": ("times<BFloat16, 32, true>", 128, lambda s: 128 * 8),
    "add_squares": ("add_squares", 128, lambda s: 0),
    "times": ("times<BFloat16, 32, false>", 128, lambda s: 0),
    "transposed_times": ("transposed_times<BFloat16, 32>", 128, lambda s: 0),
    "iterate": ("iterate<32>", 256, lambda s: 2 * 512 * 72 * 2 + 2 * 32 * 72 * 2 + 8 * 32 * 72 * 4),
    "gather_kernel": ("gather_kernel", 128, lambda s: 0),
    "gram_kernel": ("gram_kernel<32>", 128, lambda s: 32 * 65 * 8),
    "factor_kernel": ("factor_kernel", 512, lambda s: (2 * s.width**2 + s.width) * 8),
    "apply_kernel": ("apply_kernel<BFloat16>", 128, lambda s: s.width**2 * 8 + s.width * 128 * 4),
    "jacobi_kernel": (
        "jacobi_kernel<128, float>", 128, lambda s: (2 * s.width * (s.width | 1) + s.width) * 8,
    ),
    "turn_kernel": ("turn_kernel", 128, lambda s: s.k * s.width * 8 + s.width * 128 * 4),
    "update": ("update<BFloat16>", 128, lambda s: 36 * s.k * 4),
}  # fmt: skip


def compiled(sketch: Sketch) -> dict[str, dict[str, str]]:
    """Registers, spilled bytes, shared memory and occupancy of each kernel on sm_90, from the reports in results/."""
    of_triton = [row for row in report("compile-report.md") if row["for"] == "sm_90"]
    found = {row["kernel"]: row for row in of_triton if row["as in"] in ("objective", "SVD term")}
    capped = (row for row in of_triton if row["as in"] == "SVD term, soft-cap")
    found |= dict(zip(CAPPED, capped, strict=True))
    by_name = {row["kernel"]: row for row in report("cuda-report.md") if row["for"] == "sm_90"}
    for kernel, (name, threads, shared_of) in LAUNCHES.items():
        row, shared = by_name[name], shared_of(sketch)
        each = -(-int(row["registers"]) // 8) * 8 * threads
        fit = min(65536 // each, 228 * 1024 // (shared + 1024), 2048 // threads, 32)
        row |= {"shared bytes": str(shared), "occupancy": f"{100 * fit * threads // 2048} %"}
        found[kernel] = row
    return found


def report(name: str) -> list[dict[str, str]]:
    """The rows of a Markdown table in results/."""
    lines = [line for line in (RESULTS / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(heads, row, strict=True)) for row in rows]


def instructions() -> Code:
    """Of ``machine_code``, in a process of its own: there the kernels are compiled, not interpreted."""
    command = [sys.executable, str(Path(__file__).with_name("machine_code.py"))]
    environment = {**os.environ, "PYTHONPATH": harness.python_path(), "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the table

CHUNK = (512, 131072, 20, 2)  # rows of a chunk of bfloat16 at V 131,072; K
TILE = (2048, 36608, 10, 2)  # of a soft-capped head at N 2,048, V 256,000 (Gemma 2); rank; bytes of half precision
ONE_READING = Sketch(1, 512, 131072, 10, 20)  # the logits of that chunk
WEIGHTS = Sketch(8, 4096, 1024, 10, 20)  # too many rows for ``iterate``
# The kernels of the sources, and those of their launches that the page has.
COLUMNS = {
    "kernel": "kernel", "source": "source", "shape": "shape", "MB": "MB", "intensity": "operations a byte",
    "unit": "of", "registers": "registers", "spilled": "spilled", "occupancy": "occupancy", "blocks": "blocks",
    **{device.name: f"µs, {device.name}" for device in DEVICES}, "bound": "bound by, H100",
}  # fmt: skip


def counts(code: Code) -> list[Count]:
    """Every kernel, as launched here: those of the products for weights, the others for logits, a chunk or a tile."""
    n, vocab, top_k, t_size = CHUNK
    products = ("times", "transposed_times")
    of_weights = [c for c in cuda_counts(WEIGHTS) if c.kernel in products]
    of_logits = [c for c in cuda_counts(ONE_READING) if c.kernel not in products]
    of_triton = [*triton_counts(n, vocab, top_k, t_size, 32, code), *capped_counts(*TILE, code)]
    return [*of_triton, *of_logits[:2], *of_weights, *of_logits[2:]]


def rows(found: list[Count]) -> list[dict[str, str]]:
    resources = compiled(ONE_READING)
    table = []
    for c in found:
        row = {"kernel": c.kernel, "source": c.source, "shape": c.shape, "MB": f"{c.bytes / 1e6:.3g}"}
        row |= {"intensity": f"{c.operations / c.bytes:.3g}", "unit": c.unit, "blocks": f"{c.blocks:,}"}
        row |= {"bound": c.bound(DEVICES[1])}
        row |= {d.name: f"{1e6 * max(c.seconds(d)):.3g}" for d in DEVICES}
        known = resources[c.kernel]
        row |= {"registers": known["registers"], "spilled": known["spilled bytes"], "occupancy": known["occupancy"]}
        table.append(row)
    return table


def kernels_of_the_sources() -> set[str]:
    """Names of the kernels that are launched: of Triton those with a grid, of CUDA what is declared __global__."""
    found = set()
    for file in sorted((ROOT / "kernels" / "balora_kernels").glob("*.py")):
        found |= set(re.findall(r"\b(\w+)\[(?:\(|grid\])", file.read_text(encoding="utf-8")))
    for file in sorted((ROOT / "csrc").glob("*.cu")):
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(", text))
    return found


if __name__ == "__main__":
    print(harness.table(rows(counts(instructions())), COLUMNS))
