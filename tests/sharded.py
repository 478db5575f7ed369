"""FSDP2 by hand on two processes against one: ``torchrun --nproc_per_node=2 tests/sharded.py OUT``.

Each process trains the whole batch alone first, then its half of the batch with the model sharded over both. What was
found goes to OUT/found.json.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
import balora
from balora import BALoraConfig, spectral
from balora.adapters import shard_frozen_factors
from tests.conftest import batch, tiny_llama

CONFIG = BALoraConfig(
    lambda_consistency=0.5,
    lambda_diversity=0.3,
    lambda_svd=0.0,
    consistency_schedule="constant",
    focus_schedule="constant",
)
STEPS = 3


@dataclass
class Case:
    units: str = "layers"  # what is sharded beside the layers and the root
    pissa: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    lambda_svd: float = 0.0
    checkpointing: bool = False
    bfloat16: bool = False  # gathered and computed in bfloat16
    frozen: bool = False  # A₀ and B₀ sharded too


ALL = ["q_proj", "v_proj", "up_proj", "lm_head"]
CASES = {
    "layers": Case(),
    "head": Case("head"),
    "tail": Case("tail"),
    "tied": Case("tied", model=dict(tied=True)),
    "trained head": Case("head", pissa=dict(modules_to_save=["lm_head"])),
    "adapted head": Case("head", pissa=dict(target_modules=ALL)),
    "checkpointing": Case("head", checkpointing=True),
    "residual": Case("head", pissa=dict(form="residual")),
    "bfloat16 base": Case("head", model=dict(dtype=torch.bfloat16)),
    "mixed precision": Case("head", bfloat16=True),
    "svd": Case("head", lambda_svd=1.0),
    "frozen factors": Case("head", pissa=dict(target_modules=ALL), frozen=True),
    "frozen factors, checkpointing": Case(checkpointing=True, frozen=True),
}


def build(case):
    model = balora.get_pissa_model(tiny_llama(**case.model), r=4, **case.pissa)
    config = BALoraConfig(**{**CONFIG.to_dict(), "lambda_svd": case.lambda_svd})
    balora.attach(model, config)
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return model.train()


def shard(model, case):
    base = model.get_base_model()
    if case.frozen:
        shard_frozen_factors(model)
    policy = dict(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)) if case.bfloat16 else {}
    for layer in base.model.layers:
        fully_shard(layer, **policy)
    if case.units == "head":
        fully_shard(base.lm_head, **policy)
    elif case.units == "tail":
        fully_shard([base.model.norm, base.lm_head], reshard_after_forward=False)
    elif case.units == "tied":
        fully_shard([base.model.norm, base.model.embed_tokens, base.lm_head], reshard_after_forward=False)
    fully_shard(model, **policy)


def train(model, parts, share):
    """The loss of each step, and the KL of the first.

    parts: the rows of each micro-batch; share: the processes that average gradients.
    """
    whole = batch(rows=4)
    count = (whole["labels"][:, 1:] != -100).sum()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, consistency = [], None
    for _ in range(STEPS):
        losses.append(torch.zeros(()))
        for rows in parts:
            part = {name: tensor[rows] for name, tensor in whole.items()}
            loss = model(**part, num_items_in_batch=count).loss
            if consistency is None:
                consistency = model.balora_last.consistency.item()
            (loss * share).backward()
            losses[-1] += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), consistency


def full(p):
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p.clone()


def run(case, out):
    rank = dist.get_rank()
    alone, together = build(case), build(case)
    bits = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in together.state_dict().values())
    digests = [None, None]
    dist.all_gather_object(digests, hashlib.sha256(bits).hexdigest())
    start = {n: p.detach().clone() for n, p in alone.named_parameters() if p.requires_grad}
    halves = [slice(0, 2), slice(2, 4)]
    expected, _ = train(
        alone, halves if case.lambda_svd else [slice(None)], 1
    )  # the SVD term belongs to the micro-batch
    shard(together, case)
    grams = []
    exact = spectral.gram

    def counted(rows):
        rows = list(rows)
        grams.append(len(rows[0]))
        return exact(rows)

    spectral.gram = counted
    try:
        found, consistency = train(together, [halves[rank]], 2)
    finally:
        spectral.gram = exact
    dist.all_reduce(found)
    trained = {n: full(p) for n, p in together.named_parameters() if p.requires_grad}
    wanted = {n: p.detach() for n, p in alone.named_parameters() if p.requires_grad}
    assert wanted.keys() == trained.keys()
    balora.export_lora(together, out / "sharded")
    if rank == 0:
        balora.export_lora(alone, out / "whole")
    with torch.no_grad():
        tokens = torch.arange(1, 9)[None]
        logits = [m.eval()(input_ids=tokens).logits for m in (alone, together)]
        with balora.teacher(together):
            pre_trained = together(input_ids=tokens).logits
        before = tiny_llama(**case.model)(input_ids=tokens).logits
    return dict(
        same_start=digests[0] == digests[1],
        consistency=consistency,
        loss=(found - expected).abs().max().item(),
        weights=max((trained[n] - wanted[n]).abs().max().item() for n in wanted),
        moved=min((wanted[n] - start[n]).abs().max().item() for n in wanted),
        logits=(logits[0] - logits[1]).abs().max().item(),
        teacher=(pre_trained - before).abs().max().item(),
        grams=grams.count(97),
        factors=sum(p.to_local().numel() for n, p in together.named_parameters() if "lora_offset_" in n),
    )


def refused():
    """What attach says of a model that is sharded already."""
    model = balora.get_pissa_model(tiny_llama(), r=4)
    fully_shard(model)
    try:
        balora.attach(model, CONFIG)
    except ValueError as error:
        return str(error)


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: run(case, out / name) for name, case in CASES.items()}
    found["refused"] = refused()
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
