"""benchmarks/scaling_counts.py against real models, torch's counter of operations, and what autograd really keeps."""

# ruff: noqa: E402

import csv
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("triton")  # the sizes of chunks lie beside the kernels
import scaling
import scaling_counts as counts
import scaling_ledger
import scaling_simulation as simulation
from balora_bench.training_methods import ALL_TERMS, published_loss
from scaling_counts import Shape, Step

import balora

LLAMA = dict(
    model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=397, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
GEMMA = dict(
    model_type="gemma2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=24,
    num_key_value_heads=2, vocab_size=397, max_position_embeddings=64, tie_word_embeddings=True,
    final_logit_softcapping=30.0, attn_logit_softcapping=50.0, query_pre_attn_scalar=24, pad_token_id=0,
)  # fmt: skip


pytestmark = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def accelerate_begins_anew():
    """A simulated step has its own precision and processes; Accelerate keeps those of the first that asks."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def model_of(fields, attention="eager", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**fields, attn_implementation=attention)
    return transformers.AutoModelForCausalLM.from_config(config, **changes)


def adapted(model, method, step):
    if step.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method == "full":
        return model
    if method == "balora":
        return balora.attach(balora.get_pissa_model(model, r=step.r, lora_alpha=step.r), ALL_TERMS)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=step.r, target_modules=names, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("fields", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GEMMA])
def test_parameters_and_adapters_are_those_of_the_model(fields):
    model, shape = model_of(fields), Shape.of(fields)
    assert counts.parameters(shape) == sum(p.numel() for p in model.parameters())
    model = adapted(model, "balora", Step(r=5, checkpointing=False))
    assert counts.adapter_parameters(shape, 5) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "pissa", "published", "balora"])
def test_operations_are_those_that_torch_counts(method, checkpointing):
    step = Step(batch=3, length=24, r=6, checkpointing=checkpointing)
    shape = Shape.of(LLAMA)._replace(eager=True)
    model, teacher = adapted(model_of(LLAMA), method, step).train(), model_of(LLAMA).eval().requires_grad_(False)
    ids = torch.randint(397, (3, 24), generator=torch.Generator().manual_seed(0))
    if method == "balora":
        model(input_ids=ids, labels=ids)  # what is computed once, the head's Gram matrix
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, labels=ids)
        loss = output.loss
        if method == "published":
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids).logits
            loss = published_loss(loss, output.logits, teacher_logits, ids)
        loss.backward()
    parts = counts.flops(shape, step, method)
    if method == "balora":  # d is small here: S = HᵀH, CᵀSC and the gradients by full eigenvectors, H·K once
        n, d = step.scored, shape.d
        parts["SVD"] = 4 * n * d**2 + 4 * d**3
    close = 0.01 if method in ("published", "balora") else 0.003  # d is small beside the sketch
    assert sum(parts.values()) == pytest.approx(counter.get_total_flops(), rel=close)


@pytest.mark.parametrize("fields", [LLAMA, GEMMA])
@pytest.mark.parametrize("method", ["pissa", "balora"])
def test_saved_activations_are_those_that_autograd_keeps(fields, method):
    """The difference of two layers: what every model keeps once is not a layer's."""
    step = Step(batch=4, length=32, r=8, checkpointing=False)
    found = []
    for layers in (2, 4):
        attention = "eager" if fields is GEMMA else "sdpa"
        model = model_of({**fields, "num_hidden_layers": layers}, attention, dtype=torch.bfloat16)
        model = adapted(model, method, step).train()
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        kept = {}

        def keep(tensor, own=own, kept=kept):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
            return tensor

        ids = torch.randint(397, (4, 32), generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids)
        found.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    shape = Shape.of(fields)
    a_layer = (found[1] - found[0]) / 2
    if method == "pissa":
        a_layer -= 2 * counts.adapter_parameters(shape._replace(layers=1), step.r)  # copies of A and B, by autocast
    assert counts.saved_by_a_layer(shape, step, method) == pytest.approx(a_layer, rel=0.03)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("method", ["pissa", "published", "balora"])
def test_the_counted_peak_is_that_of_the_simulated_step(method, ranks):
    """A shape in which a step is mostly what is counted, of two layers."""
    fields = dict(LLAMA, hidden_size=2048, intermediate_size=5504, vocab_size=64000, num_attention_heads=16)
    fields |= dict(num_key_value_heads=4, num_hidden_layers=2, max_position_embeddings=512)
    found = simulation.simulate(simulation.Setting(fields, method, batch=2, length=256, r=64, ranks=ranks))
    shape, step = Shape.of(fields), Step(2, 256, 64, True, ranks)
    assert counts.memory(shape, step, method).peak == pytest.approx(found.peak, rel=0.04)
    assert sum(counts.flops(shape, step, method).values()) == pytest.approx(sum(found.flops.values()), rel=0.003)
    if ranks == 1 or method != "published":  # whose second embedding stays gathered
        assert sum(counts.memory(shape, step, method).always.values()) == pytest.approx(found.before, rel=0.005)
    if ranks > 1:
        assert counts.gathered(shape, step, method) == pytest.approx(found.gathered, rel=0.001)
        assert counts.scattered(shape, step) == found.scattered


@pytest.mark.parametrize("vocab", [48000, 900])  # above and below N: tiles of columns and of rows
def test_a_soft_capped_head_is_counted_as_it_is_simulated(vocab):
    fields = dict(
        GEMMA, hidden_size=2048, intermediate_size=5504, num_attention_heads=8, head_dim=256, vocab_size=vocab
    )
    fields |= dict(num_key_value_heads=4, max_position_embeddings=512)
    found = simulation.simulate(simulation.Setting(fields, "balora", batch=4, length=512, r=64))
    shape, step = Shape.of(fields), Step(4, 512, 64)
    in_loss = found.by_phase["loss"]
    assert sum(counts.flops(shape, step, "balora").values()) == pytest.approx(sum(found.flops.values()), rel=0.001)
    memory = counts.memory(shape, step, "balora")
    assert sum(memory.always.values()) + sum(memory.loss.values()) == pytest.approx(
        in_loss, rel=0.04 if vocab > step.scored else 0.08
    )
    if vocab > step.scored:  # in half precision: float32 beside the tensor cores takes fifteen times as long
        assert found.seconds["loss"] < 2 * found.flops["loss"] / scaling_ledger.HALF_RATE


def test_the_rows_of_one_method_are_replaced(tmp_path, monkeypatch):
    methods = [("pissa", True), ("balora", True), ("balora", False)]
    settings = [("llama", simulation.Setting(LLAMA, method, checkpointing)) for method, checkpointing in methods]
    monkeypatch.setattr(simulation, "plan", lambda: iter(settings))
    out, peaks = tmp_path / "rows.csv", []
    for peak, options in ((1, []), (2, ["--only", "balora"])):
        found = simulation.Simulated(peak, "loss", {}, {}, 0, 0, 0, {}, {})
        monkeypatch.setattr(simulation, "simulate", lambda setting, found=found: found)
        monkeypatch.setattr(sys, "argv", ["scaling_simulation.py", "--out", str(out), *options])
        simulation.main()
        with out.open(encoding="utf-8") as file:
            peaks.append([(row["method"], row["checkpointing"], row["peak_bytes"]) for row in csv.DictReader(file)])
    assert peaks[0] == [("pissa", "on", "1"), ("balora", "on", "1"), ("balora", "off", "1")]
    assert peaks[1] == [("pissa", "on", "1"), ("balora", "on", "2"), ("balora", "off", "2")]


def test_a_simulated_step_leaves_nothing_behind():
    """The next one starts like the first."""
    fields = dict(LLAMA, num_hidden_layers=1)
    first, second = (simulation.simulate(simulation.Setting(fields, "balora", length=32, r=4)) for _ in range(2))
    assert first == second


def test_the_ratios_of_the_design():
    """1.36 times PiSSA's operations with checkpointing, 1.51 times without, at r = 128."""
    shape = Shape.of(scaling.SHAPES["llama-2-7b"])
    for checkpointing, ratio in ((True, 1.36), (False, 1.51)):
        step = Step(checkpointing=checkpointing)
        ours, plain = (sum(counts.flops(shape, step, m).values()) for m in ("balora", "pissa"))
        assert ours / plain == pytest.approx(ratio, abs=0.005)


def test_the_text_has_the_tables_that_the_figures_make():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.fill(text, scaling.tables()) == text
    with pytest.raises(ValueError, match="<!-- nothing -->"):
        scaling.fill(text, {"nothing": ""})


def test_every_simulated_setting_is_close_to_its_count():
    with scaling.RESULTS.joinpath("scaling-simulated.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(simulation.plan()))
    for row in rows:
        shape = Shape.of({**simulation.CONFIGURATIONS[row["model"]], "vocab_size": int(row["V"])})
        checkpointing = row["checkpointing"] == "on"
        step = Step(int(row["batch"]), int(row["length"]), int(row["r"]), checkpointing, int(row["ranks"]))
        assert counts.memory(shape, step, row["method"]).peak == pytest.approx(int(row["peak_bytes"]), rel=0.035), row
        assert sum(counts.flops(shape, step, row["method"]).values()) == pytest.approx(int(row["flops"]), rel=0.003), (
            row
        )


def step_row(method, teraflops, **changes):
    """A row of training-cost-cpu.csv."""
    row = {"model": "stories15M", "method": method, "dtype": "float32", "batch": "4", "length": "250", "r": "32"}
    row |= {"checkpointing": "False", "seconds": "1", "TFLOP": teraflops}
    return row | {"x_seconds": "0.75", "x_peak": "0.5", "x_TFLOP": "1.5"} | changes


def test_measured_steps_are_read_with_their_counts():
    """The operations are those that torch counted in real steps of stories15M."""
    measured = {"full": "0.091127808", "lora": "0.066502656", "published": "0.113236353", "balora": "0.101013405696"}
    points = scaling.measured_steps([step_row(*pair) for pair in measured.items()])
    assert [point["flops"] for point in points] == [pytest.approx(p["measured_flops"], rel=0.01) for p in points]
    table = scaling.step_table(points)
    assert "| stories15M, float32, 4 × 250, r 32, checkpointing off |" in table
    assert " 1.53, 1.50, 0.75, 0.50 |" in table  # balora's
    assert scaling.measured_steps([step_row("balora", "", seconds="", note="its losses are …")]) == []
    with pytest.raises(ValueError, match="found 'another'"):
        scaling.measured_steps([step_row("full", "1", model="another")])


def test_every_measured_step_is_close_to_its_count():
    rows = scaling.read("training-cost-cpu.csv")
    if not rows:
        pytest.skip("benchmarks/results/training-cost-cpu.csv is not there")
    for point in scaling.measured_steps(rows):
        assert point["flops"] == pytest.approx(point["measured_flops"], rel=0.03), point
