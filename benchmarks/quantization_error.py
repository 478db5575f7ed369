"""What NF4 takes from a model, as QLoRA and beside PiSSA adapters: the weights' error, and the model's.

    python benchmarks/quantization_error.py STORIES15M_FOLDER SMOLLM2_FOLDER --text wikitext2.txt \\
        --out benchmarks/results/quantization-error

QLoRA starts from nf4(W), balora's residual form from nf4(W_res) + s·B₀A₀, with W_res = W − s·B₀A₀ (QPiSSA, arXiv
2404.02948, which reports the first table's nuclear norms). The linear layers of all blocks are measured, or every
--every-th block's; the KL divergence is that of the next token, pre-trained model first, with all of them quantized.
The values are those of the 4-bit layers in dense float32 layers, so nothing hangs on bitsandbytes' kernels.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from balora_bench import harness
from balora_bench.harness import DEVICE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from balora import principal
from balora.four_bit import nf4
from balora.quantized import QuantizationError, quantization_error
from balora.targets import default_targets, named_by


def weights(model: nn.Module) -> dict[str, Tensor]:
    """W [out, in] of the layers that get adapters."""
    targets = default_targets(model)
    return {name: m.weight.detach() for name, m in model.named_modules() if named_by(targets, name)}


def start(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(W_res, s·B₀A₀), both as balora rounds them: the factors and W_res to W's type."""
    b0, a0 = principal.factors([weight], rank, [1.0])[0]
    held = b0.double() @ a0.double()
    return (weight.double() - held).to(weight.dtype), held


@torch.no_grad()
def log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    """[tokens, V] of the next token."""
    return torch.cat([F.log_softmax(model(w[None]).logits[0, :-1].float(), dim=-1) for w in windows])


def measure(folder: str, text: Path, ranks: list[int], every: int, tokens: int) -> tuple[list[dict], list[dict]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
    ws = weights(model)
    windows = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8")[: 16 * tokens]).input_ids
    windows = torch.tensor(windows[: tokens // 256 * 256], device=DEVICE).view(-1, 256)
    exact = log_probabilities(model.float(), windows)  # ws keeps the weights in bfloat16
    loss = F.nll_loss(exact, windows[:, 1:].flatten()).item()

    whole = [dict(model=Path(folder).name, start="pre-trained", loss=f"{loss:.4f}", kl="0")]
    errors: dict[tuple[str, int], list[QuantizationError]] = defaultdict(list)
    for rank in [0, *ranks]:
        other = copy.deepcopy(model)
        for name, w in ws.items():
            harness.progress(f"{Path(folder).name}, rank {rank}: {name}")
            residual, held = start(w, rank) if rank else (w, torch.zeros(()))
            other.get_submodule(name).weight.data = (nf4(residual).double() + held.to(w.device)).float()
            if rank and int(next(step for step in name.split(".") if step.isdecimal())) % every == 0:
                errors[name.rpartition(".")[2], rank].append(quantization_error(name, w, residual, rank))
        found = log_probabilities(other, windows)
        kl = (exact.exp() * (exact - found)).sum(-1).mean().item()
        loss = F.nll_loss(found, windows[:, 1:].flatten()).item()
        name = f"PiSSA r {rank}" if rank else "plain NF4"
        whole.append(dict(model=Path(folder).name, start=name, loss=f"{loss:.4f}", kl=f"{kl:.4f}"))
    return _by_kind(Path(folder).name, errors, ranks), whole


def _by_kind(model: str, errors: dict[tuple[str, int], list[QuantizationError]], ranks: list[int]) -> list[dict]:
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in errors):
        first = errors[kind, ranks[0]]
        row = dict(model=model, kind=kind, shape=" x ".join(map(str, first[0].shape)), layers=len(first))
        row |= dict(plain=_mean(e.plain for e in first), plain_nuclear=_mean(e.plain_nuclear for e in first))
        for rank in ranks:
            of = errors[kind, rank]
            row[f"nuclear{rank}"] = f"{1 - sum(e.residual_nuclear / e.plain_nuclear for e in of) / len(of):.1%}"
            row[f"frobenius{rank}"] = f"{1 - sum(e.residual / e.plain for e in of) / len(of):.1%}"
        rows.append(row)
    return rows


def _mean(values) -> str:
    values = list(values)
    return f"{sum(values) / len(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of causal language models in full precision")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--every", type=int, default=1, help="weights: measure every that many blocks")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, in windows of 256")
    parser.add_argument("--out", type=Path, help="write this with .md")
    asked = parser.parse_args()
    kinds, wholes = [], []
    for folder in asked.models:
        rows, whole = measure(folder, asked.text, asked.ranks, asked.every, asked.tokens)
        kinds, wholes = kinds + rows, wholes + whole
    harness.progress("")

    columns = dict(model="model", kind="layers", shape="shape", layers="measured")
    columns |= dict(plain_nuclear="NF4's error, nuclear", plain="Frobenius")
    columns |= {f"{norm}{r}": f"{norm}, r {r}" for norm in ("nuclear", "frobenius") for r in asked.ranks}
    report = "\n\n".join(
        [
            "# What NF4 takes: plain, and beside PiSSA adapters",
            harness.origin(),
            "Plain NF4's error ‖W − nf4(W)‖ / ‖W‖, and by how much the error beside PiSSA adapters, "
            "‖W − (nf4(W_res) + s·B₀A₀)‖, is below it; means over the measured layers. W in bfloat16, blocks of 64, no "
            "double quantization.",
            harness.table(kinds, columns),
            f"The models before training, on {asked.tokens} tokens of {asked.text.parent.name}/{asked.text.name} in "
            "windows of 256: cross-entropy, and KL(pre-trained ‖ quantized) a token, in nats. All linear layers of the "
            "blocks are quantized.",
            harness.table(wholes, dict(model="model", start="start", loss="loss", kl="KL")),
        ]
    )
    print(report)
    if asked.out:
        asked.out.with_suffix(".md").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
