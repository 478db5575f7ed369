"""What autocast shows of the first steps: KL and loss of a model in bfloat16, and in float32 on the same weights.

    python benchmarks/first_steps.py STORIES15M_FOLDER --data gsm8k.jsonl --bases bfloat16 float32 \\
        --out benchmarks/results/first-steps

Three ways to train on the same batches. "float32": everything, the measure of the others. Under autocast, "apart":
A and B rounded to bfloat16 by themselves, s·(B(A x) − B₀(A₀ x)), as modules do; "balora": what they have changed is
rounded. Every figure is of one more batch that is not trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from balora_bench import harness
from balora_bench.harness import DEVICE
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import balora
from balora.adapters import OffsetVariant, frozen

ROWS, LENGTH = 4, 128
MEASURED = (1, 2, 4, 8, 16, 32, 64)
WAYS = ("float32", "apart", "balora")


def apart(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
    """s·(B(A x) − B₀(A₀ x)) by modules: autocast rounds each of the four factors."""
    a0, b0 = frozen(module)
    down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
    x = x.to(down.weight.dtype)
    initial = F.linear(F.linear(x, a0.to(x.dtype)), b0.to(x.dtype))
    return result + (up(down(x)) - initial) * module.scaling[active_adapter]


def batches(folder: str, data: Path, count: int) -> Tensor:
    """Question and answer of each row in one stream of tokens, cut into [count, ROWS, LENGTH]."""
    tokenizer, tokens, needed = AutoTokenizer.from_pretrained(folder), [], count * ROWS * LENGTH
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tokens += tokenizer(f"{row['question']}\n{row['answer']}\n").input_ids
        if len(tokens) >= needed:
            return torch.tensor(tokens[:needed], device=DEVICE).view(count, ROWS, LENGTH)
    sys.exit(f"--data: expected at least {needed} tokens, found {len(tokens)} in {data}")


@torch.no_grad()
def look(model: Any, ids: Tensor, autocast: bool) -> dict[str, float]:
    """KL as the training sees it, KL and cross-entropy of the same weights in float32."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids)
    seen = model.balora_last.consistency.item()
    wide = copy.deepcopy(model).float()
    wide(input_ids=ids, labels=ids)
    return {"seen": seen, "kl": wide.balora_last.consistency.item(), "ce": wide.balora_last.ce.item()}


def measure(folder: str, data: Path, base: torch.dtype, r: int, lr: float, warmup: int) -> list[dict]:
    ids, rows = batches(folder, data, MEASURED[-1] + 1), []
    config = balora.BALoraConfig(consistency_schedule="constant", focus_schedule="constant")
    for way in WAYS:
        forward = apart if way == "apart" else OffsetVariant.forward
        with mock.patch.object(OffsetVariant, "forward", staticmethod(forward)):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=base).to(DEVICE)
            model = balora.attach(balora.get_pissa_model(model, r=r, lora_alpha=r), config).train()
            if way == "float32":
                model.float()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
            for step in range(MEASURED[-1] + 1):
                harness.progress(f"{Path(folder).name}, {way}: step {step} of {MEASURED[-1]}")
                if step in MEASURED:
                    found = {name: f"{v:.3g}" for name, v in look(model, ids[-1], way != "float32").items()}
                    rows.append(dict(base=str(base).removeprefix("torch."), way=way, step=step, **found))
                with torch.autocast(DEVICE, torch.bfloat16, enabled=way != "float32"):
                    loss = model(input_ids=ids[step], labels=ids[step]).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return rows


def side_by_side(rows: list[dict]) -> list[dict]:
    """A row for each base and step, with the columns of every way."""
    found: dict[tuple, dict] = {}
    for row in rows:
        at = found.setdefault((row["base"], row["step"]), dict(base=row["base"], step=row["step"]))
        at |= {f"{row['way']}_{name}": row[name] for name in ("seen", "kl", "ce")}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of causal language models")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with the fields question and answer")
    parser.add_argument("--bases", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--warmup", type=int, default=16, help="steps of a linear warm-up; 1: none")
    parser.add_argument("--out", type=Path, help="write this with .md")
    asked = parser.parse_args()
    columns = dict(base="base", step="steps")
    for way in WAYS:
        columns |= {f"{way}_kl": f"{way}: KL", f"{way}_ce": "CE"}
        if way != "float32":
            columns[f"{way}_seen"] = "KL as seen"
    tables = []
    for folder in asked.models:
        rows: list[dict] = []
        for base in asked.bases:
            rows += measure(folder, asked.data, getattr(torch, base), asked.r, asked.lr, asked.warmup)
        tables += [f"## {Path(folder).name}", harness.table(side_by_side(rows), columns)]
    harness.progress("")
    report = "\n\n".join(
        [
            "# What autocast shows of the first steps",
            harness.origin(),
            f"PiSSA, r = alpha = {asked.r}, AdamW at {asked.lr:g} after {asked.warmup} steps of warm-up, "
            f"{ROWS} × {LENGTH} tokens a step, all scored. float32: trained in float32. Under autocast, apart: A "
            "and B rounded to bfloat16 by themselves; balora: what they have changed is. KL(pre-trained ‖ student) at "
            "T = 2, times T², and cross-entropy, in nats a token, of the weights in float32 arithmetic; as seen: under "
            "autocast.",
            *tables,
        ]
    )
    print(report)
    if asked.out:
        asked.out.with_suffix(".md").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
