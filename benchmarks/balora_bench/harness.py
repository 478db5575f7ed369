"""The one harness: the error budget, interleaved timings, peak memory, what the machine is, a table and a CSV."""

from __future__ import annotations

import csv
import ctypes
import gc
import itertools
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import balora

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MIB = 2**20
_LEAST, _MOST = 5e-3, 1000  # seconds between two device events; calls between them


class Error(NamedTuple):
    found: float
    allowed: float


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def error(found: Tensor, exact: Tensor) -> float:
    """max |found − exact| / max |exact|; NaN where anything is not a number."""
    return ((found.detach().double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def budget(
    found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Error]:
    """err(found) beside what is allowed, 2 (err(plain torch, same type) + eps), for every tensor by its name.

    In float64 the reference is its own yardstick, so its error is not known: a fixed 1e-11 takes its place.
    """
    allowed = {name: 2 * (error(plain[name], exact[name]) + torch.finfo(dtype).eps) for name in found}
    if dtype == torch.float64:
        allowed = dict.fromkeys(found, 1e-11)
    return {name: Error(error(tensor, exact[name]), allowed[name]) for name, tensor in found.items()}


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times, one after the other within a round: by device events on CUDA, where a short
    run is called several times in a row (``calls``)."""
    times: dict[str, int] = {}
    for name, run in runs.items():
        progress(f"warming up: {name}")
        for _ in range(warm_up):
            run()
        times[name] = calls(run)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # else to collect before every run takes longer than many a run, once torch.compile has been at work
    try:
        for i in range(rounds):
            progress(f"round {i + 1} of {rounds}")
            for name, run in runs.items():
                gc.collect()
                seconds[name].append(seconds_of(run, times[name]))
    finally:
        gc.unfreeze()
    progress("")
    return seconds


def calls(run: Callable[[], object]) -> int:
    """How many calls of a run take as long as two device events need between them; 1 on a CPU.

    Around one short call on an idle device they would time how fast the host launches it.
    """
    count = 1
    while ON_GPU:
        seconds = seconds_of(run, count)
        if seconds * count >= _LEAST or count == _MOST:
            break
        count = min(_MOST, max(2 * count, math.ceil(_LEAST / max(seconds, 1e-9))))
    return count


def seconds_of(run: Callable[[], object], times: int = 1) -> float:
    """Of a call, the mean of so many in a row; what each returns is dropped before the next."""
    synchronize()
    if ON_GPU:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a bare product of two square matrices of 8192 rows (2048 on a CPU): the median of 50 (10)
    in a row, as a step has them: a device that has rested is faster for a while."""
    size, device, count = (8192, "cuda", 50) if ON_GPU else (2048, "cpu", 10)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    synchronize()
    if ON_GPU:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            torch.mm(a, b, out=out)
            mark.record()
        synchronize()
        seconds = [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks)]
    else:
        seconds = [seconds_of(lambda: torch.mm(a, b, out=out)) for _ in range(count)]
    return 2 * size**3 / statistics.median(seconds)


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """The median, and half the distance of the quartiles, both in milliseconds."""
    if len(seconds) < 2:
        return 1e3 * seconds[0], 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return 1e3 * statistics.median(seconds), 1e3 * (high - low) / 2


def copies(tensor: Tensor, passes: float) -> Callable[[], None]:
    """As many bytes as that many passes over the tensor (a reading or a writing each), moved by plain copies."""
    source = tensor.detach().reshape(-1)
    target = torch.empty_like(source)
    whole, rest = divmod(passes / 2, 1)
    part = round(rest * source.numel())

    def run() -> None:
        for _ in range(int(whole)):
            target.copy_(source)
        target[:part].copy_(source[:part])

    return run


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB on the device (64 MiB on a CPU): the median of 20."""
    source = torch.randint(255, (2**30 if ON_GPU else 2**26,), dtype=torch.uint8, device=DEVICE)
    ms, _ = median_and_spread(interleaved({"copy": copies(source, 2)}, 20)["copy"])
    return 2 * source.numel() / ms * 1e3


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that one run takes at its peak beyond what is there before: device memory on CUDA, else resident memory of
    this process (Linux), which counts the scratch of the libraries too. Run it in a fresh process."""
    reset_peak()
    before = torch.cuda.memory_allocated() if ON_GPU else _status("VmRSS")
    kept = run()
    found = peak()
    del kept
    return found - before


def reset_peak() -> None:
    """The peak starts anew from here, without the garbage and the free heap of what came before."""
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the peak: device memory on CUDA, else resident memory of this process (Linux)."""
    return torch.cuda.max_memory_allocated() if ON_GPU else _status("VmHWM")


def limit_memory(share: float = 0.9) -> None:
    """What this process asks for beyond that share of the free memory is refused, as an error of torch (Linux)."""
    import resource

    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    most = _status("VmData") + int(share * int(free.split()[1]) * 1024)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def out_of_memory(found: BaseException) -> bool:
    return isinstance(found, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(found)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory of the CPU needs Linux")


def python_path() -> str:
    """PYTHONPATH for a process that imports what this one can."""
    return os.pathsep.join(filter(None, sys.path))


def machine() -> dict[str, str]:
    """What a figure depends on: device, versions, commit."""
    # A folder that is left of a package that is gone has metadata without a name.
    installed = {d.name.replace("_", "-"): d.version for d in metadata.distributions() if d.name}
    beside = ("triton", "transformers", "peft", "accelerate", "liger-kernel", "cut-cross-entropy")
    root = Path(__file__).parents[2]
    there = (root / ".git").exists() and shutil.which("git")
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if there else ""
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else _cpu_name(),
        **({"limits": limits} if (limits := _limits()) else {}),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed[name] for name in beside if name in installed},
        "balora": f"{balora.__version__} {commit}".strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def origin() -> str:
    """Of a report: the machine, and the command that made it, of paths the last name."""
    command = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])
    return f"{in_words(machine())}; `python benchmarks/{Path(sys.argv[0]).name} {command}`"


def in_words(machine: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def _limits() -> str:
    """Of the GPU, where its driver tells them: its power limit and its highest clock."""
    if not ON_GPU or not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=power.limit,clocks.max.sm", "--format=csv,noheader"]
    if uuid := getattr(torch.cuda.get_device_properties(), "uuid", None):
        command.append(f"--id=GPU-{uuid}")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = found.stdout.strip().splitlines()
    return lines[0] if found.returncode == 0 and len(lines) == 1 else ""


def _cpu_name() -> str:
    name, flags = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                flags = line
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f} " in f"{flags} "]
    return f"{name} ({', '.join(features)})" if features else name


_told = time.monotonic()  # when ``progress`` last printed a line


def progress(text: str) -> None:
    """On a terminal in place; else, as in a log, a line in twenty seconds at the most."""
    global _told
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and time.monotonic() - _told > 20:
        _told = time.monotonic()
        print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown: columns maps a key of the rows to its heading."""
    cells = [list(columns.values())] + [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
