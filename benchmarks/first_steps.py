"""What autocast shows of the first steps: KL and loss of a model in bfloat16, and in float32 on the same weights.

    python benchmarks/first_steps.py ../shared/models/stories15M SMOLLM2_FOLDER \\
        --data ../shared/data/gsm8k/train.jsonl --out benchmarks/results/first-steps

The base is in bfloat16, the adapters in float32, their learning rate that of the paper. "apart" rounds A and B to
bfloat16 by themselves, s·(B(A x) − B₀(A₀ x)), as modules do under autocast; "balora" rounds what they have changed.
Both train on the same batches; every figure is of one more batch that is not trained on.
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
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import balora
from balora.adapters import OffsetVariant, frozen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, LENGTH = 4, 128
MEASURED = (0, 1, 2, 4, 8, 16, 32, 64)


def apart(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
    """s·(B(A x) − B₀(A₀ x)) by modules: autocast rounds each of the four factors."""
    a0, b0 = frozen(module, active_adapter)
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
def look(model: Any, ids: Tensor) -> dict[str, float]:
    with torch.autocast(DEVICE, torch.bfloat16):
        model(input_ids=ids, labels=ids)
    found = {"kl": model.balora_last.consistency.item(), "ce": model.balora_last.ce.item()}
    wide = copy.deepcopy(model).float()
    wide(input_ids=ids, labels=ids)
    last = wide.balora_last
    return {**found, "kl_float32": last.consistency.item(), "ce_float32": last.ce.item()}


def measure(folder: str, data: Path, r: int, lr: float) -> list[dict]:
    ids, rows = batches(folder, data, MEASURED[-1] + 1), []
    config = balora.BALoraConfig(consistency_schedule="constant", focus_schedule="constant")
    for way, forward in (("apart", apart), ("balora", OffsetVariant.forward)):
        with mock.patch.object(OffsetVariant, "forward", staticmethod(forward)):
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
            model = balora.attach(balora.get_pissa_model(base, r=r, lora_alpha=r), config).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
            for step in range(MEASURED[-1] + 1):
                harness.progress(f"{Path(folder).name}, {way}: step {step} of {MEASURED[-1]}")
                if step in MEASURED:
                    found = {name: f"{value:.4g}" for name, value in look(model, ids[-1]).items()}
                    rows.append(dict(model=Path(folder).name, way=way, step=step, **found))
                with torch.autocast(DEVICE, torch.bfloat16):
                    loss = model(input_ids=ids[step], labels=ids[step]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of causal language models")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with the fields question and answer")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--out", type=Path, help="write this with .md")
    asked = parser.parse_args()
    rows = [row for folder in asked.models for row in measure(folder, asked.data, asked.r, asked.lr)]
    harness.progress("")
    columns = dict(model="model", way="way", step="steps", kl="KL, bfloat16", kl_float32="KL, float32")
    columns |= dict(ce="cross-entropy, bfloat16", ce_float32="float32")
    command = "python benchmarks/first_steps.py " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:])
    report = "\n\n".join(
        [
            "# What autocast shows of the first steps",
            ", ".join(f"{k} {v}" for k, v in harness.machine().items()) + f"; `{command}`",
            f"PiSSA, r = alpha = {asked.r}, AdamW at {asked.lr:g}, {ROWS} × {LENGTH} tokens a step, every token "
            "scored; KL(pre-trained ‖ student) at T = 2, times T², and cross-entropy, in nats a token. float32: the "
            "same weights in float32 arithmetic. apart: A and B rounded to bfloat16 by themselves; balora: what they "
            "have changed.",
            harness.table(rows, columns),
        ]
    )
    print(report)
    if asked.out:
        asked.out.with_suffix(".md").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
