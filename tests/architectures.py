"""Tiny random causal language models of the architectures that people fine-tune, each with what sets its head apart."""

from __future__ import annotations

import torch
import transformers

VOCAB = 97
_LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,  # logits of unit size: a soft-cap of 3 bends them
)
_TIED = dict(tie_word_embeddings=True)
# name: (prefix of transformers' classes, its configuration where it differs, the linear layers of a block)
_DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FC = ("q_proj", "k_proj", "v_proj", "fc1", "fc2")
_SHORT = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, initializer_range=0.2, init_std=0.2)
ARCHITECTURES = {
    "llama": ("Llama", {}, _DENSE),
    "mistral": ("Mistral", dict(sliding_window=8), _DENSE),
    "qwen2": ("Qwen2", _TIED, _DENSE),
    "qwen3": ("Qwen3", {}, _DENSE),
    "gemma": ("Gemma", _TIED, _DENSE),
    "gemma2": ("Gemma2", dict(**_TIED, final_logit_softcapping=3.0, sliding_window=8), _DENSE),
    "gemma3": ("Gemma3", dict(**_TIED, final_logit_softcapping=3.0, sliding_window=8), _DENSE),
    "phi": ("Phi", dict(partial_rotary_factor=0.5), (*_FC, "dense")),
    "gpt2": (
        "GPT2",
        dict(**_SHORT, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        ("c_attn", "c_proj", "c_fc"),
    ),
    "cohere": ("Cohere", dict(**_TIED, logit_scale=0.25), _DENSE),
    "granite": ("Granite", dict(logits_scaling=8.0), _DENSE),
    "opt": (
        "OPT",
        dict(
            **_SHORT,
            pad_token_id=0,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.0,
        ),
        (*_FC, "out_proj"),
    ),
    "mixtral": (
        "Mixtral",
        dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
}
_OWN_FIELDS = ("gpt2", "opt")  # whose configuration does not have Llama's names


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random model of that architecture with 2 layers, V 97; biases are random too, transformers leaves them at 0."""
    prefix, fields, _ = ARCHITECTURES[name]
    fields = fields if name in _OWN_FIELDS else {**_LLAMA, **fields}
    prefix_config = "Gemma3Text" if name == "gemma3" else prefix
    config = getattr(transformers, f"{prefix_config}Config")(**{**fields, **changes})
    kind = "GPT2LMHeadModel" if name == "gpt2" else f"{prefix}ForCausalLM"
    if hasattr(config, "num_local_experts"):
        config._experts_implementation = "eager"  # grouped products know no float64
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def block_layers(name: str) -> tuple[str, ...]:
    """The names of the attention and dense MLP projections in a block."""
    return ARCHITECTURES[name][2]
