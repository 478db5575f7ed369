"""The first launch of each of balora's kernels in what Nsight Compute measured, as a short CSV.

ncu … --csv --page raw --log-file FULL.csv python benchmarks/profiles.py --once
python benchmarks/ncu_table.py FULL.csv OUT.csv
python benchmarks/ncu_table.py --kernels     # a regular expression of their names, for ncu's -k regex:
python benchmarks/ncu_table.py --metrics     # what the table needs, for ncu's --metrics
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import kernel_counts
from balora_bench import harness

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "bandwidth, % of peak",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor pipe, % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
}


def table(text: str) -> list[dict[str, str]]:
    """Rows of the raw page, whose second row has the units. What ncu prints beside the CSV is left out."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:
        raise SystemExit(f"expected the CSV of ncu, found: {text[:200]!r}")
    heads, units, *launches = csv.reader(lines)
    units_of = dict(zip(heads, units, strict=True))
    ours = kernel_counts.kernels_of_the_sources()
    found: dict[str, dict[str, str]] = {}
    for launch in launches:
        row = dict(zip(heads, launch, strict=True))
        names = set(re.findall(r"\w+", row["Kernel Name"])) & ours
        for name in names - found.keys():
            numbers = {label: row.get(metric, "not measured") for metric, label in METRICS.items()}
            numbers["time"] += f" {units_of.get('gpu__time_duration.sum', '')}".rstrip()
            found[name] = {"kernel": name, **numbers}
    return list(found.values())


if __name__ == "__main__":
    if sys.argv[1:] == ["--kernels"]:
        print(f"^({'|'.join(sorted(kernel_counts.kernels_of_the_sources()))})$")
        raise SystemExit
    if sys.argv[1:] == ["--metrics"]:
        print(",".join(METRICS))
        raise SystemExit
    source, target = map(Path, sys.argv[1:])
    rows = table(source.read_text(encoding="utf-8"))
    harness.write_csv(target, rows)
    missing = kernel_counts.kernels_of_the_sources() - {row["kernel"] for row in rows}
    print(f"{target}: {len(rows)} kernels; not launched: {', '.join(sorted(missing)) or 'none'}")
