"""Tiny random sequence classifiers and encoder-decoders of the architectures that people fine-tune, V 97."""

from __future__ import annotations

import torch
import transformers

from .architectures import _LLAMA as _DECODER
from .architectures import ARCHITECTURES, VOCAB

_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout=0.0,
    initializer_range=0.2,
)
_BERT = ("query", "key", "value", "output.dense", "intermediate.dense")
_DEBERTA = ("query_proj", "key_proj", "value_proj", *_BERT[3:])
_BART = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    classifier_dropout=0.0,
    init_std=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
_BART_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_T5 = dict(
    vocab_size=VOCAB,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    classifier_dropout=0.0,
    initializer_factor=1.0,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
)
_T5_LAYERS = ("q", "k", "v", "o", "wo")

# name: (prefix of transformers' classes, its configuration, the parts of its head, the linear layers of a block)
CLASSIFIERS = {
    "bert": ("Bert", _ENCODER, ("classifier",), _BERT),
    "roberta": ("Roberta", _ENCODER, ("classifier",), _BERT),
    "deberta-v2": (
        "DebertaV2",
        {
            **_ENCODER,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "pooler_dropout": 0.0,
            "pooler_hidden_size": 32,
        },
        ("pooler", "classifier"),
        _DEBERTA,
    ),
    "distilbert": (
        "DistilBert",
        dict(
            vocab_size=VOCAB,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            initializer_range=0.2,
        ),
        ("pre_classifier", "classifier"),
        ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    ),
    "electra": ("Electra", {**_ENCODER, "embedding_size": 32}, ("classifier",), _BERT),
    "modernbert": (
        "ModernBert",
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            initializer_range=0.2,
            reference_compile=False,
            attn_implementation="eager",
        ),
        ("head", "classifier"),
        ("Wqkv", "Wo", "Wi"),
    ),
    "llama": ("Llama", _DECODER, ("score",), ARCHITECTURES["llama"][2]),
    "qwen2": ("Qwen2", _DECODER, ("score",), ARCHITECTURES["qwen2"][2]),
    "gpt2": (
        "GPT2",
        {**ARCHITECTURES["gpt2"][1], "pad_token_id": 0},
        ("score",),
        ARCHITECTURES["gpt2"][2],
    ),
    "t5": ("T5", _T5, ("classification_head",), (*_T5_LAYERS, "wi")),
    "bart": (
        "Bart",
        _BART,
        ("classification_head",),
        ("q_proj", "k_proj", "v_proj", "self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"),
    ),
}
ENCODER_DECODERS = {
    "t5": ("T5", {**_T5, "tie_word_embeddings": True}, (*_T5_LAYERS, "wi")),
    "t5-v1.1": (
        "T5",
        {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        (*_T5_LAYERS, "wi_0", "wi_1"),
    ),
    "mt5": (
        "MT5",
        {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        (*_T5_LAYERS, "wi_0", "wi_1"),
    ),
    "umt5": (
        "UMT5",
        {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        (*_T5_LAYERS, "wi_0", "wi_1"),
    ),
    "bart": ("Bart", _BART, _BART_LAYERS),
    "mbart": ("MBart", _BART, _BART_LAYERS),
    "m2m100": ("M2M100", _BART, _BART_LAYERS),
}


def tiny_classifier(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random classifier of that architecture with 3 labels and no dropout."""
    prefix, fields, _, _ = CLASSIFIERS[name]
    return _random(f"{prefix}ForSequenceClassification", prefix, {"num_labels": 3, **fields, **changes}, dtype, seed)


def tiny_encoder_decoder(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random encoder-decoder of that architecture without dropout; what it adds to its logits is not 0."""
    prefix, fields, _ = ENCODER_DECODERS[name]
    model = _random(f"{prefix}ForConditionalGeneration", prefix, {**fields, **changes}, dtype, seed)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def _random(kind: str, prefix: str, fields: dict, dtype: torch.dtype, seed: int):
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, f"{prefix}Config")(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()
