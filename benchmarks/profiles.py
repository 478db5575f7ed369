"""Where the time of every operation goes, with pictures: the pages' figures of docs/profiles.md.

    python benchmarks/profiles.py --out docs/profiles                # all of it, on the CPU or the GPU that is there
    python benchmarks/profiles.py --only linear_objective --out runs/profiles
    python benchmarks/profiles.py --once                             # on a GPU: each operation once, for Nsight Compute

torch.profiler runs over functions of balora that are named here (``PARTS``): what an operator takes itself belongs to
the innermost of them, but for a few operators that are a part of their own (``OPERATORS``). So the parts add up to the
whole. The round with the median total is shown, beside the time without the profiler and a floor measured in turns with
it. On a GPU the parts are its kernels, by name. Writes results/profiles-cpu.md (-gpu.md), the counts of
``kernel_counts``, the ``alternatives`` tried, and the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import alternatives
import kernel_counts
import profile_plots
import torch
from balora_bench import harness, linear_objective
from balora_bench.harness import DEVICE, ON_GPU
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import balora
from balora import batch, dispatch, head, principal, rows, spectral, streaming
from balora import functional as F

IMPL = "triton" if ON_GPU else "streaming"
CUDA_BUILT = ON_GPU and not dispatch.why_not("cuda")
OTHER = "chunks, copies, Python"
PRODUCTS = "products with A, passes over it"

# Whose function, its name, the part that its time is.
PARTS = (
    (head.Linear, "forward", "three products"),
    (head.Linear, "backward", "three products"),
    (streaming.Run, "_difference", "three products"),
    (streaming.Run, "gram", "Gram matrix XᵀX"),
    (streaming.Run, "_add_svd", "gradient X·K of the SVD term"),
    (spectral, "svd_term", "eigenvalues"),
    (spectral, "gradient_matrix", "eigenvalues"),
    (spectral, "svd_term_of_tiles", "Krylov passes over the logits"),
    (batch.Batch, "_collect", "Gram matrix ZZᵀ"),
    (batch.Batch, "gradient", "gradient K·Z"),
    (rows, "block", "CE and the gradient in place"),
    (rows, "_kl", "KL passes"),
    (rows, "_top_k", "top K"),
    (rows, "_entropy", "top K"),
    (rows, "subtract_logits", "difference of the logits"),
    (spectral, "randomized_svd", PRODUCTS),
    (spectral, "orthonormal", "CholeskyQR"),
)
OPERATORS = {
    "aten::_softmax": "softmax",
    "aten::scatter_add_": "scatter",
    "aten::_linalg_svd": "small decomposition",
    "balora::randomized_svd": PRODUCTS,
    "aten::linalg_cholesky_ex": "CholeskyQR",
    "aten::linalg_solve_triangular": "CholeskyQR",
}
PREFIX = "part: "


class Case(NamedTuple):
    operation: str  # the picture's name
    label: str
    run: Callable[[], object]
    floor: Callable[[], object]  # timed beside it
    floor_label: str


# ---------------------------------------------------------------- what is profiled


class Sizes(NamedTuple):
    objective: tuple[tuple[int, int, int], ...] = ((1000, 288, 32000), (2048, 576, 49152))
    logits: tuple[int, int] = (256, 32000)
    matrix: tuple[int, int, int] = (512, 8000, 10)  # m, n, rank
    weights: tuple[int, int, int, int] = (8, 1024, 1024, 128)  # count, m, n, rank
    model: tuple[int, int, int, int] = (288, 768, 6, 32000)  # of a small Llama: d, MLP, layers, V
    batch: tuple[int, int] = (4, 250)
    rounds: int = 3


GPU_SIZES = Sizes(
    objective=((4096, 4096, 32000), (4096, 4096, 131072)),
    logits=(2048, 131072),
    matrix=(512, 131072, 10),
    weights=(8, 4096, 1024, 32),
    model=(1536, 4096, 8, 32000),
    batch=(4, 512),
    rounds=10,
)


def cases(sizes: Sizes, only: str | None) -> Iterator[Case]:
    makers = {
        "linear_objective": objectives,
        "consistency_loss diversity_loss svd_loss": losses_on_logits,
        "randomized_svd": matrices,
        "pissa_setup": weights,
        "training_step": steps,
    }
    for operations, make in makers.items():
        if not only or only in operations:
            yield from (case for case in make(sizes) if not only or only in case.operation)


def objectives(sizes: Sizes) -> Iterator[Case]:
    for n, d, vocab in sizes.objective:
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        case = linear_objective.LinearObjective((n, d, vocab), dtype, "all")
        run = case.run(linear_objective.Objective(IMPL))
        label = f"N {n}, d {d}, V {vocab:,}"
        yield Case("linear_objective", label, run, case.floor(), "three bare products")


def losses_on_logits(sizes: Sizes) -> Iterator[Case]:
    n, vocab = sizes.logits
    g = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(n, vocab, generator=g)).to(DEVICE).requires_grad_()
    teacher = z.detach() + 0.3 * torch.randn(n, vocab, generator=g).to(DEVICE)
    out = torch.empty_like(z)
    losses: dict[str, tuple[Callable[[], Tensor], Callable[[], object], str]] = {
        "consistency_loss": (
            lambda: F.consistency_loss(z, teacher, impl=IMPL),
            lambda: torch.add(z.detach(), teacher, out=out),
            "both read, one written",
        ),
        "diversity_loss": (
            lambda: F.diversity_loss(z, impl=IMPL),
            lambda: (z.detach().amax(), out.zero_()),
            "one read, one written",
        ),
        "svd_loss": (
            lambda: F.svd_loss(z, impl="cuda" if CUDA_BUILT else "streaming"),
            lambda: torch.mul(z.detach(), 2, out=out),
            "one read, one written",
        ),
    }
    for name, (loss, floor, text) in losses.items():
        yield Case(name, f"N {n}, V {vocab:,}", lambda loss=loss: torch.autograd.grad(loss(), z), floor, text)


def matrices(sizes: Sizes) -> Iterator[Case]:
    m, n, rank = sizes.matrix
    g = torch.Generator().manual_seed(0)
    a = (torch.randn(1, m, n, generator=g) * torch.arange(1, n + 1) ** -1.0).to(DEVICE)
    a = a.bfloat16() if ON_GPU else a
    floor, text = six_products(a, rank + 10, 2), "6 bare products with A"
    label = f"{m:,} × {n:,}, rank {rank}"
    yield Case("randomized_svd", f"{label}, torch", lambda: F.randomized_svd(a, rank, impl="torch"), floor, text)
    if not isinstance(dispatch.extension(), str):
        operator, name = torch.ops.balora.randomized_svd, "CUDA" if CUDA_BUILT else "C++"
        yield Case("randomized_svd", f"{label}, {name}", lambda: operator(a, rank, 10, 2, 0), floor, text)


def six_products(a: Tensor, width: int, n_iter: int) -> Callable[[], object]:
    """2 (n_iter + 1) products with A [batch, m, n], of panels held as rows."""
    q, p = a.new_ones(len(a), width, a.shape[1]), a.new_ones(len(a), width, a.shape[2])
    return lambda: [(p @ a.mT, q @ a) for _ in range(n_iter + 1)]


def weights(sizes: Sizes) -> Iterator[Case]:
    count, m, n, rank = sizes.weights
    g = torch.Generator().manual_seed(0)
    found = [(0.02 * torch.randn(m, n, generator=g)).to(DEVICE, torch.bfloat16) for _ in range(count)]
    floor = six_products(torch.stack(found).float(), rank + principal._oversample(rank), principal._ITERATIONS)
    run = lambda: principal.factors(found, rank, [1.0] * count, n_iter=principal._ITERATIONS)  # noqa: E731
    text = f"{2 * principal._ITERATIONS + 2} bare products with W"
    yield Case("pissa_setup", f"{count} of {m:,} × {n:,}, r {rank}", run, floor, text)


def steps(sizes: Sizes) -> Iterator[Case]:
    """One step of an attached Llama with random weights, and one of plain PiSSA with a forward of a teacher."""
    constant = balora.BALoraConfig(consistency_schedule="constant", focus_schedule="constant")
    attached, plain = pissa_model(sizes.model), pissa_model(sizes.model)
    balora.attach(attached, constant)
    ids = torch.randint(sizes.model[-1], sizes.batch, device=DEVICE)
    step, plain_step = stepper(attached, ids), stepper(plain, ids)

    def floor() -> None:
        plain_step()
        with torch.no_grad(), balora.teacher(plain):
            plain.get_base_model().get_decoder()(input_ids=ids)

    for _ in range(2):  # away from the start, where the teacher is the student
        step()
    d, _, layers, vocab = sizes.model
    label = f"Llama d {d}, {layers} layers, V {vocab:,}, {sizes.batch[0]} × {sizes.batch[1]}"
    yield Case("training_step", label, step, floor, "PiSSA's step, plus a teacher's forward")


def pissa_model(shape: tuple[int, int, int, int]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    d, mlp, layers, vocab = shape
    heads, r = max(1, d // 48), min(32, d // 2)
    config = AutoConfig.for_model(
        "llama", hidden_size=d, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocab, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if ON_GPU else torch.float32).to(DEVICE)
    return balora.get_pissa_model(base, r=r, lora_alpha=r, task_type="CAUSAL_LM").train()


def stepper(model: Any, ids: Tensor) -> Callable[[], None]:
    """A training step on these ids [B, S], whose phases show in a profile."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    decoder = model.get_base_model().get_decoder()
    forward = decoder.forward

    def named(*args: Any, **kwargs: Any) -> Any:
        with phase("student's forward" if torch.is_grad_enabled() else "teacher's forward"):
            return forward(*args, **kwargs)

    decoder.forward = named

    def step() -> None:
        with phase("loss"):
            loss = model(input_ids=ids, labels=ids).loss
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


# ---------------------------------------------------------------- how


def part(name: str) -> Any:
    return record_function(PREFIX + name)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part with all that it has launched: on a GPU the host waits for the end of it."""
    with part(name):
        yield
        harness.synchronize()


@contextlib.contextmanager
def parts_named() -> Iterator[None]:
    """Calls of the functions in ``PARTS`` show in a profile."""

    def naming(function: Callable, name: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with part(name):
                return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for owner, function, name in PARTS:
            stack.enter_context(mock.patch.object(owner, function, naming(getattr(owner, function), name)))
        yield


def profiled(case: Case) -> dict[str, float]:
    """Milliseconds of each part of one call."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU
    whole_step = case.operation == "training_step"  # has parts of its own, the phases
    names = contextlib.nullcontext() if whole_step else parts_named()
    with names, profile(activities=activities, acc_events=True) as found:
        with part(OTHER):
            case.run()
        harness.synchronize()
    events = found.events()
    if whole_step:
        return by_part(events, {})
    return by_kernel(events) if ON_GPU else by_part(events, OPERATORS)


def by_part(events: Any, operators: dict[str, str]) -> dict[str, float]:
    """What each event takes itself, without those that it calls, at the innermost part around it."""
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        around = event
        while around is not None and not around.name.startswith(PREFIX):
            around = around.cpu_parent
        if around is not None:  # else the profiler's own
            name = operator_part(event, operators) or around.name.removeprefix(PREFIX)
            spent[name] += event.self_cpu_time_total / 1e3
    return dict(spent)


def operator_part(event: Any, operators: dict[str, str]) -> str | None:
    """Of the outermost operator, up to the part around it, that is a part of its own."""
    found = None
    while event is not None and not event.name.startswith(PREFIX):
        found = operators.get(event.name, found)
        event = event.cpu_parent
    return found


def by_kernel(events: Any) -> dict[str, float]:
    """Device time of balora's kernels by name; of the rest products and others."""
    ours = kernel_counts.kernels_of_the_sources()
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        named = event.name.startswith(PREFIX) or event.is_user_annotation  # a range around kernels
        if event.device_type == DeviceType.CUDA and not named:
            words = set(re.findall(r"\w+", event.name))
            product = re.search(r"gemm|xmma|cutlass|nvjet", event.name)
            name = next(iter(words & ours), "products" if product else "torch's kernels")
            spent[name] += event.self_device_time_total / 1e3
    return dict(spent)


def measured(case: Case, rounds: int) -> dict[str, Any]:
    seconds = harness.interleaved({"floor": case.floor, "call": case.run}, rounds, warm_up=3 if ON_GPU else 1)
    often = min(rounds, 3)  # under the profiler: its events take longer than the calls
    found = sorted((profiled(case) for _ in range(often)), key=lambda parts: sum(parts.values()))[often // 2]
    (floor, _), (call, spread) = (harness.median_and_spread(seconds[name]) for name in ("floor", "call"))
    row = {"operation": case.operation, "case": case.label, "floor": floor, "floor_label": case.floor_label}
    return {**row, "call": call, "spread": spread, "profiled": sum(found.values()), "parts": found}


def text_of(found: list[dict[str, Any]]) -> str:
    """Markdown: a table of the calls, a table of their parts."""
    calls, parts = [], []
    for row in found:
        numbers = {key: profile_plots.milliseconds(row[key]) for key in ("call", "spread", "floor", "profiled")}
        calls.append({**row, **numbers, "ratio": f"{row['call'] / row['floor']:.2f}"})
        for name, ms in sorted(row["parts"].items(), key=lambda item: -item[1]):
            share = f"{100 * ms / row['profiled']:.1f} %"
            parts.append({**row, "part": name, "ms": profile_plots.milliseconds(ms), "share": share})
    columns = {"operation": "operation", "case": "case", "call": "ms", "spread": "±", "floor": "floor, ms"}
    columns |= {"ratio": "× floor", "floor_label": "the floor is", "profiled": "ms under the profiler"}
    of_parts = {"operation": "operation", "case": "case", "part": "part", "ms": "ms", "share": "share"}
    return f"{harness.table(calls, columns)}\n\n## The parts\n\n{harness.table(parts, of_parts)}\n"


def heading(title: str, options: argparse.Namespace) -> str:
    command = f"python benchmarks/profiles.py --out {options.out}"
    return f"# {title}\n\n`{command}`; {harness.in_words(harness.machine())}\n\n"


def once(sizes: Sizes) -> None:
    """Each operation once between the marks that `ncu --profile-from-start off` waits for; warm before.

    Of the objective one chunk; its kernels are replayed for every group of counters.
    """
    if not ON_GPU:
        raise SystemExit("--once: expected a CUDA device, found none")
    for case in cases(sizes._replace(objective=((512, 4096, 131072),)), None):
        case.run()
        harness.synchronize()
        torch.cuda.profiler.start()
        case.run()
        harness.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/profiles"), help="the pictures' folder")
    parser.add_argument("--results", type=Path, default=kernel_counts.RESULTS, help="the tables' folder")
    parser.add_argument("--only", help="a part of an operation's name; the kernels and alternatives are left out")
    parser.add_argument("--once", action="store_true", help="each operation once, on a GPU, under ncu")
    options = parser.parse_args(arguments)
    sizes = sizes or (GPU_SIZES if ON_GPU else Sizes())
    if options.once:
        return once(sizes)
    for folder in (options.out, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    where = "gpu" if ON_GPU else "cpu"
    found = []
    for case in cases(sizes, options.only):
        harness.progress(f"{case.operation}, {case.label}")
        found.append(measured(case, sizes.rounds))
        name = f"{case.operation.replace('_', '-')}-{where}.png"
        profile_plots.parts([row for row in found if row["operation"] == case.operation], options.out / name)
    text = heading("Where the time goes", options) + text_of(found)
    if not options.only:
        (options.results / f"profiles-{where}.md").write_text(text, encoding="utf-8")
        kernels(options)
        if not ON_GPU:
            tried = alternatives.measure(*sizes.objective[0], sizes.rounds)
            text += "\n## Alternatives\n\n" + harness.table(tried, alternatives.COLUMNS) + "\n"
            table = heading("What was tried", options) + harness.table(tried, alternatives.COLUMNS) + "\n"
            (options.results / "profiles-alternatives.md").write_text(table, encoding="utf-8")
            profile_plots.alternatives(tried, options.out / "alternatives.png")
    print(text)


def kernels(options: argparse.Namespace) -> None:
    """The counts and their pictures."""
    found = kernel_counts.counts(kernel_counts.instructions())
    table = harness.table(kernel_counts.rows(found), kernel_counts.COLUMNS)
    timed = (options.results / "profiles-gpu.md").is_file()
    so_far = "what they took is in profiles-gpu.md" if timed else "none has run on a device"
    text = heading(f"What the GPU kernels must do, counted; {so_far}", options) + table + "\n"
    (options.results / "profiles-kernels.md").write_text(text, encoding="utf-8")
    profile_plots.roofline(found, kernel_counts.DEVICES, options.out / "roofline.png", timed=timed)
    profile_plots.kernels(found, kernel_counts.rows(found), kernel_counts.DEVICES, options.out / "kernels.png")


if __name__ == "__main__":
    main()
