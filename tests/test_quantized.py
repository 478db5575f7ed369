"""4-bit bases on the CPU: what the layers compute, the two forms, the folder of ``balora quantize``, and its LoRAs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import balora
from balora import cli, four_bit, quantized
from balora.adapters import ADAPTER, base_weight, form_of, frozen, pretrained_weight
from balora.pissa import principal_errors

from .architectures import tiny
from .conftest import ALL_TERMS, TEMPLATE, batch, tiny_checkpoint, tiny_tokenizer, train_a_little

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="transformers loads 4-bit models onto the GPU: tests/gpu/test_quantized.py"
)

WIDE = dict(hidden_size=64, intermediate_size=128)  # rows of whole blocks of 64: others the CPU computes wrongly
R, ALPHA = 8, 12
# The 16 values of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 += (0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0)


def by_hand(weight):
    """NF4 in blocks of 64 along the rows, in float64: the nearest of 16 values times the block's largest."""
    blocks = weight.double().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4, dtype=torch.float64)
    nearest = (blocks / largest)[..., None].sub(values).abs().argmin(-1)
    return (values[nearest] * largest).reshape(weight.shape)


def norm(t):
    return t.double().norm().item()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def full(request, tmp_path_factory):
    """A folder with a random Llama in full precision, its head tied in bfloat16."""
    tied = request.param == torch.bfloat16
    return tiny_checkpoint(
        tmp_path_factory.mktemp("full") / "model",
        TEMPLATE,
        dtype=request.param,
        tied=tied,
        initializer_range=0.2,
        **WIDE,
    )


@pytest.fixture(scope="module")
def prepared(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "nf4"
    balora.quantize(full, folder, r=R, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj", "down_proj"])
    return folder


def in_4_bits(folder, double_quant=False):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    config = quantized.nf4_config(base.dtype, double_quant)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=config)


def layers(model):
    return {name: m for name, m in model.named_modules() if form_of(m)}


def logits(model):
    inputs = {name: t for name, t in batch().items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def on_dense(model, folder):
    """The model in ``folder``, in float64, with the weights that the layers of ``model`` compute with."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, m in model.get_base_model().named_modules():
        if four_bit.is_4bit(m):
            owner = name.removesuffix(".base_layer")
            dense.get_submodule(owner).weight.data.copy_(four_bit.dequantized(m))
    return dense


# What NF4 is


@pytest.mark.parametrize("shape", [(96, 64), (30, 128), (7, 64 * 5), (64, 96), (32, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nf4_is_that_of_the_paper(shape, dtype):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = four_bit.nf4(weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), by_hand(weight), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    once = norm(weight - found)
    assert once != norm(weight - four_bit.nf4(weight, double_quant=True)) < 1.1 * once


def test_of_a_zero_matrix_nothing_is_lost():
    zero = torch.zeros(8, 64)
    found = quantized.quantization_error("layer", zero, zero, 2)
    assert (found.plain, found.residual, found.plain_nuclear, found.residual_nuclear) == (0, 0, 0, 0)
    assert "none" in quantized.summary([found])


def test_a_width_that_the_cpu_computes_wrongly_is_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "narrow")  # 32 and 48 wide
    base = in_4_bits(folder)
    layer = base.model.layers[0].self_attn.q_proj
    wrong = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if torch.equal(wrong, four_bit.dequantized(layer)):
        pytest.skip("this bitsandbytes is right about rows of 32 on this CPU")
    with pytest.raises(ValueError, match="expected 4-bit layers with in_features of whole blocks of 64, found 32 at"):
        balora.get_pissa_model(base, r=4)
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in base.modules())
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="found 32 at"):
        balora.attach(adapted, ALL_TERMS)


def test_a_base_that_bitsandbytes_has_repacked_is_refused(full):
    base = in_4_bits(full)
    state = base.model.layers[1].mlp.up_proj.weight.quant_state
    state.packing_format_for_cpu = True  # what an evaluation forward sets on a CPU with AVX-512 BF16
    with pytest.raises(ValueError, match=r"found model\.layers\.1\.mlp\.up_proj repacked by bitsandbytes"):
        balora.get_pissa_model(base, r=4)


# The offset form


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_offset_form_starts_at_the_quantized_model(full, double_quant):
    base = in_4_bits(full, double_quant)
    stored = {name: t.clone() for name, t in base.state_dict().items()}
    model = balora.get_pissa_model(base, r=R, lora_alpha=ALPHA)
    with model.disable_adapter():
        before = logits(model)
    start = logits(model)
    assert torch.equal(start, before)
    with balora.teacher(model):
        assert torch.equal(logits(model), before)
    # dense weights of the same values give the same logits
    expected = logits(on_dense(model, full))
    assert norm(start - expected) < (1e-5 if start.dtype == torch.float32 else 3e-2) * norm(expected)
    for layer in layers(model).values():
        weight = pretrained_weight(layer)
        a0, b0 = frozen(layer)
        assert a0.dtype == b0.dtype == weight.dtype == base.dtype
        assert layer.lora_A[ADAPTER].weight.dtype == torch.float32
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        best = (u[:, :R] * s[:R]) @ vh[:R]
        found = ALPHA / R * b0.double() @ a0.double()
        assert norm(found - best) < (1e-4 if a0.dtype == torch.float32 else 2e-2) * norm(best)
    assert all(e.error < 1.001 * e.least + 1e-2 for e in principal_errors(model, all_layers=True).layers)
    balora.attach(model, ALL_TERMS)
    train_a_little(model)
    assert not torch.equal(logits(model), before)
    with balora.teacher(model):
        assert torch.equal(logits(model), before)
    names = {name.replace(".base_layer", ""): t for name, t in model.get_base_model().state_dict().items()}
    assert all(torch.equal(names[name], t) for name, t in stored.items())


def test_gradients_are_those_of_the_dense_weights(tmp_path):
    """Also after the teacher's forward in evaluation mode, which repacks the weights where it is let."""
    folder = tiny_checkpoint(tmp_path / "model", initializer_range=0.2, **WIDE)
    model = balora.get_pissa_model(in_4_bits(folder), r=R, lora_alpha=ALPHA)
    dense = balora.get_pissa_model(on_dense(model, folder).float(), r=R, lora_alpha=ALPHA)
    with torch.no_grad():
        for name in layers(model):
            for part in ("lora_A", "lora_B", "lora_offset_A", "lora_offset_B"):
                own, other = (getattr(m.get_submodule(name), part).state_dict() for m in (model, dense))
                for key in own:
                    other[key].copy_(own[key])
    for m in (model, dense):
        balora.attach(m, ALL_TERMS)
        train_a_little(m, steps=1)
        m.train()
        m(**batch()).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert norm(grad) > 0
        assert norm(found[name] - grad) < 1e-4 * norm(grad), name


def test_the_offset_form_is_exported_for_the_quantized_base(full, tmp_path):
    model = balora.get_pissa_model(in_4_bits(full, double_quant=True), r=R, lora_alpha=ALPHA)
    train_a_little(model)
    balora.export_lora(model, tmp_path / "lora")
    base = in_4_bits(full, double_quant=True)
    four_bit.prepare(base)
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    expected = logits(model)
    assert norm(logits(plain) - expected) < (1e-5 if expected.dtype == torch.float32 else 2e-2) * norm(expected)


def test_merging_quantizes_the_sum(full):
    model = balora.get_pissa_model(in_4_bits(full), r=R, lora_alpha=ALPHA, target_modules=["q_proj"])
    train_a_little(model, lr=0.1)
    layer = next(iter(layers(model).values()))
    expected = four_bit.nf4(base_weight(layer).double().add(quantized_change(layer)).to(base_weight(layer).dtype))
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter()
    assert torch.equal(base_weight(layer), expected)
    with pytest.raises(ValueError, match="merged into the weights"), balora.teacher(model):
        pass


def quantized_change(layer):
    a0, b0 = frozen(layer)
    a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    return ALPHA / R * (b.double() @ a.double() - b0.double() @ a0.double())


def test_conv1d_layers_in_4_bits(tmp_path):
    tiny("gpt2", n_embd=64).save_pretrained(tmp_path / "gpt2")
    base = in_4_bits(tmp_path / "gpt2")
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").transformer.h[0].attn.c_attn.weight
    model = balora.get_pissa_model(base, r=4, lora_alpha=4)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert pretrained_weight(layer).shape == (192, 64)  # [out, in], unlike the Conv1D's
    torch.testing.assert_close(pretrained_weight(layer), four_bit.nf4(weight.T.detach()))
    start = logits(model)
    with balora.teacher(model):
        assert torch.equal(logits(model), start)


@pytest.mark.parametrize(
    ("load", "form", "message"),
    [
        (dict(load_in_8bit=True), "offset", "expected linear layers of floating-point or 4-bit weights, found Linear8"),
        (dict(load_in_4bit=True), "residual", "form: 'residual' subtracts from full-precision weights, found 4-bit"),
    ],
)
def test_what_cannot_be_adapted_is_refused(full, load, form, message):
    from transformers import BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(full, quantization_config=BitsAndBytesConfig(**load))
    with pytest.raises(ValueError, match=message):
        balora.get_pissa_model(base, r=4, form=form)
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in base.modules())


# The folder of balora quantize


def test_a_prepared_folder_holds_the_model(full, prepared):
    model = balora.load_quantized(prepared)
    original = AutoModelForCausalLM.from_pretrained(full, dtype="auto")
    dtype = original.dtype
    targets = layers(model)
    assert {name.rpartition(".")[2] for name in targets} == {"q_proj", "v_proj", "down_proj"}
    for name, m in model.get_base_model().named_modules():
        if not four_bit.is_4bit(m):
            continue
        owner = name.removesuffix(".base_layer")
        weight, found = original.get_submodule(owner).weight.detach(), four_bit.dequantized(m)
        if owner == name:
            torch.testing.assert_close(found, four_bit.nf4(weight), rtol=0, atol=0)
            continue
        a0, b0 = frozen(model.get_base_model().get_submodule(owner))
        residual = weight.double() - ALPHA / R * b0.double() @ a0.double()
        assert torch.equal(found, four_bit.nf4(residual.to(dtype)))
        assert torch.equal(model.get_base_model().get_submodule(owner).lora_A[ADAPTER].weight, a0.float())
    assert not four_bit.is_4bit(model.get_base_model().lm_head)
    start = logits(model)
    with balora.teacher(model):
        assert torch.equal(logits(model), start)
    config = json.loads((prepared / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["pissa_residual"] == {"adapter": "pissa", "base_model": str(full)}
    card = (prepared / "README.md").read_text()
    assert "W_res in 4 bits" in card
    assert "NF4: error below plain NF4's by" in card
    assert sorted(p.suffix for p in prepared.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")) == []
    assert [p.name for p in prepared.parent.iterdir()] == ["nf4"]


def test_reload_gives_the_same_bits(prepared, full, tmp_path):
    first, second = (balora.load_quantized(prepared).state_dict() for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    balora.quantize(full, tmp_path / "again", r=R, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj", "down_proj"])
    for file in ("model.safetensors", "pissa/adapter_model.safetensors"):
        again, was = load_file(tmp_path / "again" / file), load_file(prepared / file)
        assert again.keys() == was.keys()
        assert all(torch.equal(t, was[name]) for name, t in again.items())


def test_the_start_is_nearer_to_the_model_than_plain_nf4(full, tmp_path):
    errors = balora.quantize(full, tmp_path / "nf4", r=R, lora_alpha=ALPHA)
    assert [e.name.rpartition(".")[2] for e in errors] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    original = AutoModelForCausalLM.from_pretrained(full, dtype="auto")
    model = balora.load_quantized(tmp_path / "nf4")
    for e in errors:
        layer = model.get_submodule(e.name)
        weight = original.get_submodule(e.name.removeprefix("base_model.model.")).weight.detach().double()
        lost = weight - pretrained_weight(layer)
        tolerance = 1e-3 if original.dtype == torch.float32 else 0.05
        assert e.residual == pytest.approx(norm(lost) / norm(weight), rel=tolerance)
        nuclear = torch.linalg.svdvals(lost).sum() / torch.linalg.svdvals(weight).sum()
        assert e.residual_nuclear == pytest.approx(nuclear.item(), rel=tolerance)
        assert e.plain == pytest.approx(norm(weight - by_hand(weight)) / norm(weight), rel=tolerance)
        assert e.residual < e.plain
        assert e.residual_nuclear < e.plain_nuclear


def test_the_three_models_that_come_out(prepared, full, tmp_path):
    """The LoRA on the 4-bit residual is the trained model; the one on the original misses the quantization error."""
    model = balora.load_quantized(prepared)
    balora.attach(model, ALL_TERMS)
    train_a_little(model, steps=8)
    trained, dtype = logits(model), model.dtype
    balora.export_lora(model, tmp_path / "residual", onto="residual")
    balora.export_lora(model, tmp_path / "pretrained")

    base = AutoModelForCausalLM.from_pretrained(prepared)
    four_bit.prepare(base)
    on_residual = peft.PeftModel.from_pretrained(base, tmp_path / "residual")
    assert on_residual.peft_config["default"].r == R
    assert norm(logits(on_residual) - trained) <= (0 if dtype == torch.float32 else 2e-2) * norm(trained)

    on_original = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(full, dtype=torch.float64), tmp_path / "pretrained"
    )
    config = on_original.peft_config["default"]
    assert (config.r, config.base_model_name_or_path) == (2 * R, str(full))
    # W + s·(BA − B₀A₀), and the trained model with W in place of nf4(W_res) + s·B₀A₀
    exact = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float64)
    with torch.no_grad():
        for name, layer in layers(model).items():
            exact.get_submodule(name.removeprefix("base_model.model.")).weight.add_(quantized_change(layer))
    assert norm(logits(on_original) - logits(exact)) < 1e-5 * norm(logits(exact))
    moved = norm(trained - logits(exact)) / norm(trained)
    assert 1e-3 < moved < 0.5, dtype  # random weights; the rest is the 4-bit weights'
    merged = logits(on_original.merge_and_unload())
    assert norm(merged - logits(exact)) < 1e-5 * norm(merged)


def test_a_saved_run_goes_on(prepared, tmp_path):
    model = balora.load_quantized(prepared)
    train_a_little(model)
    model.save_pretrained(tmp_path / "saved")
    again = balora.load_quantized(prepared)
    again.load_adapter(tmp_path / "saved", ADAPTER)
    assert torch.equal(logits(again), logits(model))
    with balora.teacher(again), balora.teacher(model):
        assert torch.equal(logits(again), logits(model))
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_initial_A" in name)
    tensors[name] += 1e-2
    save_file(tensors, tmp_path / "saved" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected the A₀ and B₀ that the 4-bit base was made with, found others at"):
        again.load_adapter(tmp_path / "saved", ADAPTER)


def test_w_res_alone_is_refused(prepared, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(prepared)
    with pytest.raises(ValueError, match=r"its weights are W_res of balora\.quantize; load it with"):
        balora.get_pissa_model(base, r=4)
    plain = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"its base is W_res of balora\.quantize"):
        balora.attach(plain, ALL_TERMS)
    shutil.copytree(prepared, tmp_path / "alone", ignore=shutil.ignore_patterns("pissa"))
    with pytest.raises(ValueError, match="expected the adapter of .*alone in .*pissa, found none; W_res alone is no"):
        balora.load_quantized(tmp_path / "alone")


def test_what_is_no_prepared_folder_or_none_to_write_to(full, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected what balora\.quantize wrote"):
        balora.load_quantized(full)
    with pytest.raises(ValueError, match="onto: 'residual' expects a model of"):
        balora.export_lora(balora.get_pissa_model(in_4_bits(full), r=4), tmp_path / "x", onto="residual")
    with pytest.raises(ValueError, match="onto: expected 'pretrained' or 'residual', found 'base'"):
        balora.export_lora(balora.load_quantized(prepared), tmp_path / "x", onto="base")
    cases = [
        (dict(output_dir=full), "output_dir: expected a new or empty folder"),
        (dict(model=prepared), "model: expected full precision, found quantized weights"),
        (dict(model=tmp_path / "none"), "model: expected a causal language model at .*none; found nothing there"),
        (dict(r=65), "r: expected at most 64, the smaller side of"),
        (dict(dtype="int8"), "dtype: expected auto, float32"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            balora.quantize(**{**dict(model=full, output_dir=tmp_path / "out"), **changes})
    assert list(tmp_path.iterdir()) == []


# The command line


def command(model, out, **changes):
    rows = out.parent / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": f"Count to {i}.", "answer": "1 2 3"}) for i in range(8)))
    values = dict(model=model, data=rows, output_dir=out, max_steps=4, save_steps=2, per_device_train_batch_size=2)
    values |= dict(use_cpu=True, disable_tqdm=True, learning_rate=1e-2, logging_steps=1)
    return ["train", *(word for name, value in {**values, **changes}.items() for word in (f"--{name}", str(value)))]


@pytest.mark.usefixtures("no_pictures")
def test_quantize_and_train_by_the_command_line(tmp_path, capsys):
    full = tiny_checkpoint(tmp_path / "full", TEMPLATE, **WIDE)
    folder, out = tmp_path / "nf4", tmp_path / "run"
    values = ["--model", str(full), "--output_dir", str(folder), "--r", "4", "--lora_alpha", "6", "--double_quant"]
    assert cli.main(["quantize", *values]) == 0
    assert "NF4: error below plain NF4's by" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]
    assert cli.main(["quantize", *values]) == 2
    assert "balora quantize: error: output_dir: expected a new or empty folder" in capsys.readouterr().err

    for said, message in [
        (dict(r=128), "r: expected 4, which"),
        (dict(form="offset"), "form: expected 'residual', which"),
        (dict(adapter="lora"), "adapter: expected 'pissa', which"),
        (dict(quantize="nf4"), "quantize: expected None, which"),
        (dict(target_modules="q_proj"), "target_modules: expected"),
        (dict(task="nlu"), "model, quantize: expected full precision for what is no causal language model, found the"),
    ]:
        assert cli.main(command(folder, out, **said)) == 2
        assert message in capsys.readouterr().err
    assert cli.main(command(folder, out, r=4, lora_alpha=6)) == 0
    printed = capsys.readouterr().out
    assert "the adapters hold" in printed
    assert "lora_pretrained: the same for" in printed
    trained, total = re.search("model: (.*) trained parameters of (.*)", printed).groups()
    assert f"{trained} of {total} (" in (out / "report.html").read_text()
    assert peft.LoraConfig.from_pretrained(out / "lora").r == 4
    assert peft.LoraConfig.from_pretrained(out / "lora_pretrained").r == 8
    whole = load_file(out / "lora" / "adapter_model.safetensors")
    for name, onto in [("lora", []), ("lora_pretrained", ["--onto", "pretrained"])]:
        assert cli.main(["export", str(out), str(tmp_path / name), *onto]) == 0
        expected, found = (load_file(path / name / "adapter_model.safetensors") for path in (out, tmp_path))
        assert expected.keys() == found.keys()
        assert all(torch.equal(t, found[key]) for key, t in expected.items())
        expected, found = (peft.LoraConfig.from_pretrained(path / name).to_dict() for path in (out, tmp_path))
        assert expected == found
    folder.rename(tmp_path / "moved")  # the checkpoint tells what it was trained on
    assert cli.main(["export", str(out), str(tmp_path / "again")]) == 0
    assert peft.LoraConfig.from_pretrained(tmp_path / "again").r == 4
    (tmp_path / "moved").rename(folder)

    # a run that is cut and goes on ends at the same bits
    shutil.rmtree(out / "checkpoint-4")
    assert cli.main([*command(folder, out), "--resume_from_checkpoint", "true"]) == 0
    resumed = load_file(out / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())


@pytest.mark.usefixtures("no_pictures")
def test_a_base_that_this_cpu_computes_wrongly_is_named_early(tmp_path, capsys, monkeypatch):
    """As it is quantized, and before the data are read."""
    full, folder = tiny_checkpoint(tmp_path / "narrow", TEMPLATE), tmp_path / "nf4"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(four_bit, "_right_on_cpu", lambda *_: False)
    values = ["--model", str(full), "--output_dir", str(folder), "--r", "4"]
    with pytest.warns(UserWarning, match="trained on a GPU, but not on this machine: .* found 32 at .*q_proj"):
        assert cli.main(["quantize", *values]) == 0
    for model, changes in ((folder, {}), (full, dict(quantize="nf4", r=4))):
        capsys.readouterr()
        assert cli.main(command(model, tmp_path / "run", **changes)) == 2
        captured = capsys.readouterr()
        assert "in_features of whole blocks of 64, found 32 at model.layers.0.self_attn.q_proj" in captured.err
        assert "train: " not in captured.out


@pytest.mark.usefixtures("no_pictures")
def test_train_quantizes_as_it_loads(tmp_path, capsys):
    full, out = tiny_checkpoint(tmp_path / "full", TEMPLATE, **WIDE), tmp_path / "run"
    assert cli.main(command(full, out, quantize="int3", r=4)) == 2
    assert "quantize: expected nf4 or none, found 'int3'" in capsys.readouterr().err
    assert cli.main(command(full, out, quantize="nf4", form="residual", r=4)) == 2
    assert "make its base with balora.quantize, or use form='offset'" in capsys.readouterr().err
    assert cli.main(command(full, out, quantize="nf4", r=4)) == 0
    of = capsys.readouterr().out.partition(" trained parameters of ")[2].partition("\n")[0]
    adapters = load_file(next(out.glob("checkpoint-*")) / "adapter_model.safetensors")
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(full).parameters())
    whole += sum(t.numel() for name, t in adapters.items() if name.endswith(".weight"))
    assert of == f"{whole:,}"
    assert peft.LoraConfig.from_pretrained(out / "lora").r == 8


def test_nothing_is_fetched_where_hugging_faces_kernels_is_installed(tmp_path):
    """bitsandbytes asks it for a compiled kernel as it is imported, on CPUs with AVX-512 BF16."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "def get_kernel(*a, **k):\n    print('FETCHED', a)\n    raise OSError\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport kernels\nimport balora\nbalora.get_pissa_model\n"
        "import bitsandbytes, kernels as again\nassert again is kernels and 'peft' in sys.modules\n"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert "FETCHED" not in result.stdout
    assert "kernels-community" not in result.stderr


def test_the_tokenizer_comes_along(prepared):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(prepared)("Count to 3.").input_ids
    assert ids == tiny_tokenizer()("Count to 3.").input_ids
