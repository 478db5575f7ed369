"""The one harness: correctness gate, interleaved timings, peak memory in a process of its own, a table and a CSV.

A benchmark gives named implementations: functions without arguments that run forward and backward once and return
(loss, gradients). Every implementation first meets the reference in float64; one of balora's outside the error budget
stops the run. Timings are interleaved, so that a slow moment of the machine meets all of them; the median and the
spread (half the distance of the quartiles) are shown, and the ratio to a floor measured in the same rounds.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, dict[str, Tensor]]]
MIB = 2**20


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def error(found: Tensor, exact: Tensor) -> float:
    """max |found − exact| / max |exact|; NaN where anything is not a number."""
    return ((found.detach().double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def gate(run: Run, plain: Run, exact: Run, dtype: torch.dtype) -> tuple[bool, dict[str, float]]:
    """Whether err(run) ≤ 2 (err(plain torch, same type) + eps) for the loss and every gradient; the errors."""
    (loss, grads), (plain_loss, plain_grads), (exact_loss, exact_grads) = run(), plain(), exact()
    errors = {"loss": error(loss, exact_loss)} | {n: error(g, exact_grads[n]) for n, g in grads.items()}
    allowed = {"loss": error(plain_loss, exact_loss)} | {n: error(plain_grads[n], exact_grads[n]) for n in grads}
    eps = torch.finfo(dtype).eps
    return all(errors[n] <= 2 * (allowed[n] + eps) for n in errors), errors


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times, one after the other within a round: by device events on CUDA."""
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        progress(f"round {i + 1} of {rounds}")
        for name, run in runs.items():
            gc.collect()
            synchronize()
            seconds[name].append(_device_seconds(run) if torch.cuda.is_available() else _seconds(run))
    progress("")
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB on the device (64 MiB on a CPU): the median of 20."""
    size = 2**30 if torch.cuda.is_available() else 2**26
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms, _ = median_and_spread(interleaved({"copy": lambda: target.copy_(source)}, 20)["copy"])
    return 2 * size / ms * 1e3


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a bare product of two square matrices of 8192 rows (2048 on a CPU): the best of 10."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(interleaved({"product": lambda: a @ b}, 10, warm_up=3)["product"])


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """Both in milliseconds."""
    if len(seconds) < 2:
        return 1e3 * seconds[0], 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return 1e3 * statistics.median(seconds), 1e3 * (high - low) / 2


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that one run takes at its peak beyond what is there before: device memory on CUDA, else resident memory of
    this process (Linux), which counts the scratch of the libraries too. Run it in a fresh process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = _status("VmRSS")
    kept = run()
    found = peak()
    del kept
    return found - before


def reset_peak() -> None:
    """The peak starts anew from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the peak: device memory on CUDA, else resident memory of this process (Linux)."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory of the CPU needs Linux")


def in_fresh_process(script: str, *arguments: str) -> dict:
    """The JSON object that `script --child …` prints as its last line; an "error" where it fails."""
    command = [sys.executable, script, "--child", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": python_path()})
    if result.returncode != 0:
        return {"error": (result.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def python_path() -> str:
    root = Path(__file__).parents[1]
    return os.pathsep.join(
        [str(root), str(root / "kernels"), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    )


def machine() -> dict[str, str]:
    """What a figure depends on: device, versions, commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    installed = {d.name.replace("_", "-"): d.version for d in metadata.distributions()}
    versions = {name: installed[name] for name in ("triton", "liger-kernel") if name in installed}
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


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


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


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
