"""Which layers get adapters, on every architecture: attention and dense MLPs; routers, experts and heads by name."""

import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import balora
from balora.targets import checked_targets, default_targets

from .architectures import ARCHITECTURES, block_layers, tiny
from .conftest import batch, train_a_little
from .test_pissa import assert_principal, logits, offsets

DTYPES = [torch.float32, torch.bfloat16]


def adapted(model):
    return {name.removeprefix("base_model.model.") for name in offsets(model)}


def stack(name):
    return {"gpt2": "transformer.h", "opt": "model.decoder.layers"}.get(name, "model.layers")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_is_attention_and_dense_mlps(name):
    base = tiny(name)
    targets = default_targets(base)
    assert all("." not in target for target in targets)  # short names are enough
    assert set(targets) == set(block_layers(name))
    expected = {
        n
        for n, m in base.named_modules()
        if n.startswith(stack(name)) and isinstance(m, (nn.Linear, Conv1D)) and "expert" not in n and "gate." not in n
    }
    model = balora.get_pissa_model(base, r=2)
    assert adapted(model) == expected
    assert set(model.peft_config["default"].target_modules) == set(block_layers(name))
    for layer in offsets(model).values():
        if not layer.fan_in_fan_out:
            assert_principal(layer, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_bits_exact_teacher_and_an_export_that_loads_with_peft_alone(name, dtype, tmp_path):
    base = tiny(name, dtype)
    before = logits(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        model = balora.get_pissa_model(base, r=4, lora_alpha=8)
    assert torch.equal(logits(model), before)
    train_a_little(model, steps=6)
    model.eval()
    trained = logits(model)
    with balora.teacher(model):
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "checkpoint")
    again = balora.get_pissa_model(tiny(name, dtype), r=4, lora_alpha=8)
    again.load_adapter(tmp_path / "checkpoint", "default")
    assert torch.equal(logits(again.eval()), trained)
    balora.export_lora(model, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        alone = peft.PeftModel.from_pretrained(tiny(name, dtype), tmp_path / "lora").eval()
    size, eps = trained.abs().max(), torch.finfo(dtype).eps
    assert (trained - before).abs().max() > 16 * eps * size
    # A router that rounding sends elsewhere changes its token's logits altogether.
    near = (logits(alone) - trained).abs().amax(-1) <= (16 if dtype == torch.bfloat16 else 64) * eps * size
    assert near.float().mean() > (0.8 if name == "mixtral" and dtype == torch.bfloat16 else 0.9999)


@pytest.mark.parametrize("targets", [None, ["c_attn", "lm_head"]], ids=["Conv1D", "mixed with nn.Linear"])
def test_conv1d_is_decomposed_and_merged_the_right_way_round(targets):
    base = tiny("gpt2", torch.float64)
    weights = {n: p.clone() for n, p in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        model = balora.get_pissa_model(base, r=4, lora_alpha=8, target_modules=targets)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    u, s, vh = torch.linalg.svd(weights["transformer.h.0.attn.c_attn.weight"].T, full_matrices=False)
    found = 2 * layer.lora_offset_B.default @ layer.lora_offset_A.default
    torch.testing.assert_close(found, (u[:, :4] * s[:4]) @ vh[:4])
    if targets is None:
        assert model.peft_config["default"].fan_in_fan_out
        train_a_little(model)
        model.eval()
        trained = logits(model)
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(logits(model), trained)
            model.unmerge_adapter()
            torch.testing.assert_close(logits(model), trained)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"], ids=["untied", "tied", "tied Conv1D"])
def test_a_head_that_is_named_is_adapted(name, tmp_path):
    base = tiny(name)
    before = logits(base)
    model = balora.get_pissa_model(base, r=4, target_modules=[*block_layers(name), "lm_head"])
    assert "lm_head" in adapted(model)
    assert torch.equal(logits(model), before)
    train_a_little(model)
    model.eval()
    trained = logits(model)
    with balora.teacher(model):
        assert torch.equal(logits(model), before)
    balora.export_lora(model, tmp_path)
    alone = peft.PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert (trained - before).abs().max() > 0.1
    torch.testing.assert_close(logits(alone), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("name", ["llama", "gemma"], ids=["untied", "tied"])
def test_modules_to_save_are_trained_in_full_and_exported(name, form, tmp_path):
    base = tiny(name, torch.float64)
    before, head = logits(base), base.lm_head.weight.detach().clone()
    model = balora.get_pissa_model(base, r=4, form=form, modules_to_save=["lm_head"])
    torch.testing.assert_close(logits(model), before)
    start = logits(model)
    expected = {n for n, _ in model.named_parameters() if ".lora_" in n or "modules_to_save" in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert len(expected) == 2 * 14 + 1
    train_a_little(model)
    model.eval()
    trained = logits(model)
    wrapper = model.base_model.model.lm_head
    assert torch.equal(wrapper.original_module.weight, head)
    assert not torch.equal(wrapper.modules_to_save.default.weight, head)
    with balora.teacher(model):
        assert torch.equal(logits(model), start)
    balora.export_lora(model, tmp_path)
    alone = peft.PeftModel.from_pretrained(tiny(name, torch.float64), tmp_path).eval()
    torch.testing.assert_close(logits(alone), trained, rtol=1e-6, atol=1e-6)


def test_an_error_gives_modules_to_save_back():
    base = tiny("llama")
    before, modules = logits(base), {n: id(m) for n, m in base.named_modules()}
    with pytest.raises(ValueError, match="r: expected at most 16"):
        balora.get_pissa_model(base, r=20, modules_to_save=["lm_head", "norm"])
    assert {n: id(m) for n, m in base.named_modules()} == modules
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(logits(base), before)


EXPERTS = r"experts that are fused into 3-D parameters: model\.layers\.\*\.mlp\.experts\.{}"


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "experts"], r"gate_up_proj \[4, 96, 32\], model.*down_proj \[4, 32, 48\]"),
        (["q_proj", "gate_up_proj"], r"gate_up_proj \[4, 96, 32\];"),
        (["down_proj"], r"down_proj \[4, 32, 48\];"),
        (["q_proj", "v_proj", "w1", "w2", "w3"], r"gate_up_proj \[4, 96, 32\], "),
        (["mlp.experts.down_proj"], r"down_proj \[4, 32, 48\];"),
        (r".*\.(q_proj|down_proj)", r"down_proj \[4, 32, 48\];"),
        (r".*experts", r"gate_up_proj \[4, 96, 32\], "),
    ],
    ids=str,
)
def test_fused_experts_are_named_with_their_shapes(targets, named):
    base = tiny("mixtral")
    modules = {n: id(m) for n, m in base.named_modules()}
    with pytest.raises(ValueError, match=EXPERTS.format(named)):
        balora.get_pissa_model(base, r=2, target_modules=targets)
    assert {n: id(m) for n, m in base.named_modules()} == modules
    assert all(p.requires_grad for p in base.parameters())


def test_a_dense_models_down_proj_is_adapted():
    assert adapted(balora.get_pissa_model(tiny("llama"), r=2, target_modules=["down_proj"])) == {
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    }


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"}),
        (r".*layers\.1\.self_attn\.q_proj", {"model.layers.1.self_attn.q_proj"}),
        (["layers.0.self_attn.k_proj"], {"model.layers.0.self_attn.k_proj"}),
    ],
    ids=["all-linear", "pattern", "list"],
)
def test_patterns_mean_what_they_say_beside_fused_experts(targets, expected):
    """peft alone rewrites them: it keeps the last part of the names, and adds the experts and the router."""
    base = tiny("mixtral")
    model = balora.get_pissa_model(base, r=2, target_modules=targets)
    assert adapted(model) == expected
    assert not model.peft_config["default"].target_parameters


def qwen_moe(**changes):
    shape = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=24)
    shape |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97, num_experts=4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen2MoeConfig(**{**shape, **changes})).eval()


@pytest.mark.parametrize("dense", [[], [0]], ids=["experts everywhere", "a dense layer"])
def test_shared_experts_and_their_gate_are_left_alone(dense):
    """peft would turn the name of a dense up_proj into the experts' parameter, also when the adapter is loaded."""
    base = qwen_moe(mlp_only_layers=dense)
    model = balora.get_pissa_model(base, r=2)
    assert adapted(model) == {f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"}
    for targets in ["all-linear", ["q_proj", "shared_expert_gate"]]:
        with pytest.raises(ValueError, match=r"expected no router .*exclude_modules=\['.*gate'\]"):
            balora.get_pissa_model(qwen_moe(), r=2, target_modules=targets)


def test_a_name_that_peft_turns_into_experts_is_refused():
    base = qwen_moe()
    modules = {n: id(m) for n, m in base.named_modules()}
    with pytest.raises(ValueError, match=r"target_modules: .*fused into 3-D parameters: .*down_proj \[4, 32, 16\]"):
        balora.get_pissa_model(base, r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert {n: id(m) for n, m in base.named_modules()} == modules


class Mixture(nn.Module):
    """Experts that are modules, as transformers 4 had them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 8)}) for _ in range(3))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)  # a gate without experts is a layer like any other
        self.mlp = Mixture()

    def forward(self, x):
        routed = self.mlp.gate(x).softmax(-1)
        mixed = sum(routed[..., i, None] * expert["w1"](x) for i, expert in enumerate(self.mlp.experts))
        return self.gate(self.q_proj(x)) + mixed


class Handmade(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 5)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


def test_experts_and_routers_that_are_modules():
    torch.manual_seed(0)
    x, base = torch.randn(4, 8), Handmade()
    before = base(x)
    assert default_targets(base) == ["q_proj", "layers.0.gate", "layers.1.gate"]
    for targets in (["q_proj", "gate"], "all-linear", r".*\.(q_proj|gate)"):
        with pytest.raises(ValueError, match=r"found layers.0.mlp.gate; leave it out with exclude_modules=\['gate'\]"):
            balora.get_pissa_model(base, r=2, target_modules=targets)
    for targets in ("all-linear", ["q_proj", "gate", "w1"]):
        model = balora.get_pissa_model(Handmade(), r=2, target_modules=targets, exclude_modules=["mlp.gate"])
        assert "layers.0.mlp.experts.1.w1" in adapted(model)
        assert "layers.0.gate" in adapted(model)
        assert not any("mlp.gate" in name for name in adapted(model))
    model = balora.get_pissa_model(base, r=2)
    assert adapted(model) == {f"layers.{i}.{x}" for i in range(2) for x in ("q_proj", "gate")}
    assert torch.equal(model(x), before)


def test_dense_models_keep_the_users_pattern():
    assert checked_targets(tiny("llama"), r".*q_proj", None) == r".*q_proj"
    assert checked_targets(tiny("llama"), "all-linear", None) == "all-linear"
    assert checked_targets(tiny("llama"), ["q_proj"], None) == ["q_proj"]


def jamba():
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8)
    torch.manual_seed(0)
    config = JambaConfig(**shape, mamba_dt_rank=4, initializer_range=0.2, use_mamba_kernels=False)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_state_space_layers_whose_weights_are_read_directly_are_left_out(form):
    base = jamba()
    before = logits(base)
    model = balora.get_pissa_model(base, r=2, form=form)
    names = [name for name, m in model.named_modules() if hasattr(m, "lora_A")]
    assert not any(name.endswith(("x_proj", "dt_proj", "out_proj")) for name in names)
    assert any(name.endswith("mamba.in_proj") for name in names)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    train_a_little(model, steps=1)
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    base = jamba()
    with pytest.raises(ValueError, match=r"expected layers that the model calls, found .*mamba.dt_proj"):
        balora.get_pissa_model(base, r=2, target_modules=["q_proj", "dt_proj"], form=form)
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("argument", ["modules_to_save", "exclude_modules"])
def test_a_name_that_no_module_has_is_refused(argument):
    base = tiny("llama")
    with pytest.raises(ValueError, match=f"{argument}: expected modules of the model, found 'lm_haed', which"):
        balora.get_pissa_model(base, r=2, **{argument: ["lm_head", "lm_haed"]})
    assert balora.get_pissa_model(base, r=2, exclude_modules=".*down_proj").peft_config


def test_routers_of_other_names_are_no_targets():
    block = nn.Module()
    block.modality_router, block.q_proj, block.altup = nn.Linear(8, 4), nn.Linear(8, 8), nn.Module()
    block.altup.prediction_coefs = nn.Linear(8, 8)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert default_targets(model) == ["q_proj"]


def test_an_encoder_has_blocks_too():
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    for base in (BertForSequenceClassification(config), AutoModel.from_config(config)):
        targets = default_targets(base)
        assert targets == ["query", "key", "value", "output.dense", "intermediate.dense"]
        model = balora.get_pissa_model(base, r=2)
        assert len(adapted(model)) == 12
        assert not any("pooler" in name or "classifier" in name for name in adapted(model))


def test_a_model_that_sees_gets_adapters_in_its_language_model():
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=16)
    base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**shape)))
    assert "o_proj" in default_targets(base)  # short where the vision tower has no such name
    model = balora.get_pissa_model(base, r=2)
    assert len(adapted(model)) == 14
    assert all(name.startswith("model.language_model.layers.") for name in adapted(model))


def test_an_encoder_decoder_has_two_stacks():
    config = T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=97)
    base = T5ForConditionalGeneration(config)
    assert default_targets(base) == ["q", "k", "v", "o", "wi", "wo"]
    assert len(adapted(balora.get_pissa_model(base, r=2))) == 2 * 6 + 2 * 10


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "dispatch"])
def test_offloaded_weights_are_refused(offload, tmp_path):
    import accelerate

    base = tiny("llama")
    before = logits(base)
    if offload == "dispatch":
        devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        base = accelerate.dispatch_model(base, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    elif offload == "cpu_offload":
        accelerate.cpu_offload(base, "cpu")
    else:
        accelerate.disk_offload(base, tmp_path, "cpu")
    modules = {n: id(m) for n, m in base.named_modules()}
    first = "layers.1" if offload == "dispatch" else "layers.0"
    with pytest.raises(ValueError, match=f"expected weights in memory, found .*{first}.*offloaded by accelerate"):
        balora.get_pissa_model(base, r=2)
    assert {n: id(m) for n, m in base.named_modules()} == modules
    assert torch.equal(logits(base), before)


def test_a_layer_that_stays_in_memory_may_be_adapted_beside_an_offloaded_one(tmp_path):
    import accelerate

    base = tiny("llama")
    before = logits(base)
    accelerate.disk_offload(base.lm_head, tmp_path, "cpu")
    model = balora.get_pissa_model(base, r=2)
    assert torch.equal(logits(model), before)
    model(**batch()).loss.backward()
    with balora.teacher(model):
        assert torch.equal(logits(model), before)


def test_a_name_that_no_module_has_is_told():
    """A list may serve several models, so the others do."""
    with pytest.warns(UserWarning, match="target_modules: no module of the model is named 'v_porj'"):
        model = balora.get_pissa_model(tiny("llama"), r=2, target_modules=["q_proj", "v_porj"])
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"q_proj"}
    with pytest.raises(TypeError, match="model: expected a transformers model, found 'llama' of type str"):
        balora.get_pissa_model("llama", r=2)
