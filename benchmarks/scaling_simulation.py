"""A training step without memory or a device: real transformers, peft, accelerate and balora code on fake tensors.

Every operation makes tensors that know shape and type and have no numbers; ``scaling_ledger`` adds up the bytes of
those that are alive. What is not simulated: the allocator's rounding and fragmentation, the libraries' workspaces, a
communicator's buffers.

    python benchmarks/scaling_simulation.py                  # all settings to results/scaling-simulated.csv, 10 minutes
    python benchmarks/scaling_simulation.py --only balora    # the rows of one method; the others stay as they are

The fake device is a CPU, because a build of torch without CUDA has no fake one. ``as_on_a_gpu`` makes balora take the
path that it takes there: its buffers, products and launchers are the real ones, the Triton kernels alone do not run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import accelerate
import peft
import torch
import torch.distributed as dist
import transformers
from balora_bench import harness
from balora_bench.training_methods import ALL_TERMS, SHAPES, published_loss
from scaling_counts import LLAMA_3_70B
from scaling_ledger import Ledger
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import balora
from balora import adapters, fused, modeling, pissa, spectral, targets

aten = torch.ops.aten
PHASES = ("forward", "teacher", "student", "loss", "backward")  # AdamW returns nothing, and is not timed
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class Setting(NamedTuple):
    """A training step: what is trained, and how."""

    shape: dict[str, Any]  # transformers' configuration
    method: str  # of METHODS; LoRA costs what "pissa" does
    checkpointing: bool = True
    batch: int = 4
    length: int = 512
    r: int = 128
    ranks: int = 1  # above 1: fully_shard of every layer, the head and the rest
    gpu: bool = True  # balora as on a GPU, else its streaming path


class Simulated(NamedTuple):
    peak: int  # bytes of the second step; the first one makes AdamW's states
    phase: str  # where the peak is
    by_phase: dict[str, int]  # the peak of each phase
    at_peak: dict[str, int]  # bytes at the peak by what they are, or by the phase that made them
    before: int  # bytes before a step: weights, adapters, buffers, optimizer
    gathered: int  # bytes that a rank gets by all-gathers in a step, its own part counted
    scattered: int  # bytes that a rank gives to reduce-scatters in a step
    flops: dict[str, int]  # of products and attention, by phase
    seconds: dict[str, float]  # of a step at the nominal rates, by phase, without AdamW and communication


def simulate(setting: Setting) -> Simulated:
    """Two steps as Hugging Face's Trainer makes them: bfloat16 weights, float32 adapters, autocast, fused AdamW."""
    ledger = Ledger(setting.batch * (setting.length - 1))
    with as_on_a_gpu(ledger) if setting.gpu else contextlib.nullcontext(), _processes(setting.ranks):
        return _simulate(setting, ledger)


@contextlib.contextmanager
def _processes(ranks: int) -> Iterator[None]:
    """This process as the first of so many; collectives with the others do nothing."""
    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _simulate(setting: Setting, ledger: Ledger) -> Simulated:
    model, teacher = build(setting)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True, device_placement=False)
    if setting.ranks > 1:
        for module in (model, teacher):
            if module is not None:
                shard(module, setting.ranks, setting.method)
    prepared = accelerator.prepare_model(model.train())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        ledger.add(tensor, _kind(name))
    for tensor in teacher.parameters() if teacher is not None else ():
        ledger.add(tensor, "second model")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as the Trainer's default
    _mark_phases(model, ledger)
    with FAKE:
        ids = torch.zeros(setting.batch, setting.length, dtype=torch.int64)
        count = torch.tensor(ledger.rows)
    with FAKE, ledger, mock.patch("transformers.masking_utils.is_tracing", return_value=False):
        for _ in range(2):
            before = ledger.total
            ledger.start_peak()
            ledger.phase = "forward"
            loss = _loss(prepared, teacher, ids, count)
            ledger.phase = "backward"
            loss.backward()
            del loss
            ledger.phase = "optimizer"
            optimizer.step()
            optimizer.zero_grad()
    return Simulated(
        ledger.peak, ledger.peak_phase, dict(ledger.by_phase), {k: v for k, v in ledger.at_peak.items() if v}, before,
        ledger.moved["gathered"], ledger.moved["scattered"], dict(ledger.flops), dict(ledger.seconds),
    )  # fmt: skip


def _loss(model: nn.Module, teacher: nn.Module | None, ids: Tensor, count: Tensor) -> Tensor:
    labels = ids.clone()
    if teacher is None:
        return model(input_ids=ids, labels=labels, num_items_in_batch=count).loss
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids).logits
    outputs = model(input_ids=ids, labels=labels)
    return published_loss(outputs.loss, outputs.logits, teacher_logits, labels)


def _kind(name: str) -> str:
    if "lora_offset" in name:
        return "frozen factors"
    if "lora_" in name:
        return "adapters"
    return "weights"


def _mark_phases(model: nn.Module, ledger: Ledger) -> None:
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()

    def enter(*_: Any) -> None:
        ledger.phase = "student" if torch.is_grad_enabled() else "teacher"

    def leave(*_: Any) -> None:
        ledger.phase = "loss"

    decoder.register_forward_pre_hook(enter)
    decoder.register_forward_hook(leave)


def build(setting: Setting) -> tuple[nn.Module, nn.Module | None]:
    """The model of a method on fake tensors, and the published method's second model."""
    with torch.device("meta"):
        model = _from_shape(setting)
        if setting.checkpointing:
            model.enable_input_require_grads()
        if setting.method == "balora":
            model = balora_model(model, setting.r)
        elif setting.method != "full":
            config = peft.LoraConfig(
                r=setting.r, lora_alpha=setting.r, target_modules=targets.default_targets(model), task_type="CAUSAL_LM"
            )
            model = peft.get_peft_model(model, config)
        teacher = _from_shape(setting).eval().requires_grad_(False) if setting.method == "published" else None
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in (model, teacher):
        if module is not None:
            to_fake(module)
    return model, teacher


def _from_shape(setting: Setting) -> nn.Module:
    config = transformers.AutoConfig.for_model(**setting.shape)
    config.use_cache = False
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def balora_model(model: nn.Module, r: int) -> nn.Module:
    """``get_pissa_model`` and ``attach`` without what needs numbers: the decomposition, the comparison of the head."""

    def initialize(layers, *_: Any) -> None:
        for layer in layers:
            a, b = (
                m["default"].weight.detach().to(layer.get_base_layer().weight.dtype)
                for m in (layer.lora_A, layer.lora_B)
            )
            adapters.OffsetVariant.init(layer, "default", a0=a, b0=b)

    with (
        mock.patch.object(pissa, "_initialize", initialize),
        mock.patch.object(pissa, "_check_layer"),
        mock.patch.object(modeling, "difference", return_value=None),
    ):
        return balora.attach(balora.get_pissa_model(model, r=r, lora_alpha=r, task_type="CAUSAL_LM"), ALL_TERMS)


def to_fake(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU; shared ones stay shared."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    with FAKE:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = known[id(tensor)]


def shard(model: nn.Module, ranks: int, method: str) -> None:
    """FSDP2 as Accelerate sets it up: every layer, the head and the rest a unit of its own, gathered in bfloat16. With
    balora as ``BALoraTrainer`` does it: A₀ and B₀ sharded too, everything gathered in the type that it has."""
    mesh = init_device_mesh("cpu", (ranks,))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    policy = MixedPrecisionPolicy(None if method == "balora" else torch.bfloat16, torch.float32)
    with FAKE:
        if method == "balora":
            adapters.shard_frozen_factors(model)
        for unit in (*base.get_decoder().layers, base.get_output_embeddings(), model):
            fully_shard(unit, mesh=mesh, mp_policy=policy)


class _NoKernel:
    """In place of a Triton kernel: every tensor that it is given is read or written once."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.ledger.spend(0, torch.float32, *(t for t in args if isinstance(t, Tensor)))


@contextlib.contextmanager
def as_on_a_gpu(ledger: Ledger) -> Iterator[None]:
    """balora takes its path for GPUs with fake tensors of a CPU; only the kernels themselves are left out."""
    from balora_kernels import eigh, row_kernels, rows

    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        stack.enter_context(mock.patch.dict("os.environ", {"BALORA_IMPL": "triton", "TRITON_INTERPRET": "1"}))
        for module, names in (
            (row_kernels, ("tile_states", "merge", "gradient", "add_top", "cap", "capped_gradient")),
            (eigh, ("jacobi", "cholesky_inverse")),
        ):
            for name in names:
                patch(module, name, _NoKernel(ledger))
        for module in (rows, eigh):
            patch(module, "on", lambda _: contextlib.nullcontext())
        patch(fused._Run, "_on_tensor_cores", lambda run: run.half is not None and run.linear.extra is None)
        patch(fused, "_never_waits", lambda _: True)
        patch(fused, "product", lambda a, b, out: aten.mm.dtype_out(a, b, torch.float32, out=out))
        patch(fused, "add_product", _add_product)
        patch(fused, "_times_weight", _times_weight)
        patch(spectral, "accumulation_dtype", lambda t: torch.float64 if t.dtype == torch.float64 else torch.float32)
        yield


def _add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    aten.addmm.dtype_out(total, a, b, torch.float32, beta=1, alpha=alpha, out=total)


def _times_weight(g: Tensor, weight: Tensor) -> Tensor:
    from balora_kernels import tiles

    slices = tiles.vocabulary_slices(len(g), weight.shape[1], g.shape[1])
    out = g.new_empty(slices, len(g), weight.shape[1], dtype=torch.float32)
    a, b = g.unflatten(1, (slices, -1)).transpose(0, 1), weight.unflatten(0, (slices, -1))
    aten.bmm.dtype_out(a, b, torch.float32, out=out)
    return out[0] if slices == 1 else out.sum(0)


# ---------------------------------------------------------------- all settings

METHODS = ("full", "pissa", "published", "balora")
CONFIGURATIONS = {**SHAPES, "llama-3-70b": LLAMA_3_70B}
RESULTS = Path(__file__).parent / "results" / "scaling-simulated.csv"


def plan() -> Iterator[tuple[str, Setting]]:
    """The name of a shape and a setting: every method on three shapes; LLaMA-3-8B along N, V, r and ranks; 70B."""
    for name, method, checkpointing in itertools.product(SHAPES, METHODS, (True, False)):
        yield name, Setting(SHAPES[name], method, checkpointing)
    shape = SHAPES["llama-3-8b"]
    for method in METHODS[1:]:
        for batch in (1, 16):
            yield "llama-3-8b", Setting(shape, method, batch=batch)
        for vocab in (32000, 256000):
            yield "llama-3-8b", Setting({**shape, "vocab_size": vocab}, method)
        for r in (16, 512):
            yield "llama-3-8b", Setting(shape, method, r=r)
        for ranks in (2, 8, 64):
            yield "llama-3-8b", Setting(shape, method, ranks=ranks)
        yield "llama-3-70b", Setting(LLAMA_3_70B, method, ranks=8)
    for name in ("llama-2-7b", "llama-3-8b"):
        yield name, Setting(SHAPES[name], "balora", gpu=False)


def columns_of(name: str, setting: Setting) -> dict[str, Any]:
    """The columns that say what was simulated."""
    return {
        "model": name,
        "method": setting.method,
        "checkpointing": "on" if setting.checkpointing else "off",
        "batch": setting.batch,
        "length": setting.length,
        "V": setting.shape["vocab_size"],
        "r": setting.r,
        "ranks": setting.ranks,
        "balora_path": ("triton" if setting.gpu else "streaming") if setting.method == "balora" else "",
    }


def row(name: str, setting: Setting, found: Simulated) -> dict[str, Any]:
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "peft", "accelerate")}
    return {
        **columns_of(name, setting),
        "peak_bytes": found.peak,
        "peak_in": found.phase,
        "bytes_between_steps": found.before,
        "flops": sum(found.flops.values()),
        "nominal_seconds": f"{sum(found.seconds.values()):.6f}",
        **{f"{phase}_seconds": f"{found.seconds.get(phase, 0):.6f}" for phase in PHASES},
        "gathered_bytes": found.gathered,
        "scattered_bytes": found.scattered,
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=METHODS, metavar="METHOD", help="one of %(choices)s: replace its rows alone")
    arguments = parser.parse_args()
    settings = {tuple(str(c) for c in columns_of(*setting).values()): setting for setting in plan()}
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    if arguments.only:
        with arguments.out.open(encoding="utf-8") as file:
            rows = {tuple(row.values())[: len(next(iter(settings)))]: row for row in csv.DictReader(file)}
    todo = {key: found for key, found in settings.items() if arguments.only in (None, found[1].method)}
    for i, (key, (name, setting)) in enumerate(todo.items()):
        harness.progress(f"{i + 1} of {len(todo)}: {name}, {setting.method}")
        rows[key] = row(name, setting, simulate(setting))
        harness.write_csv(arguments.out, [rows[key] for key in settings if key in rows])
    harness.progress("")


if __name__ == "__main__":
    main()
