"""Every recipe runs as it stands, on a tiny random model of its architecture and a few rows with its data's columns."""

import functools
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import yaml
from transformers import (
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from balora import cli, elements
from balora.config import BALoraConfig

from .architectures import tiny
from .conftest import tiny_tokenizer

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
TITLES = [path.stem for path in RECIPES]
CAUSAL = {
    "meta-llama/Llama-2-7b-hf": "llama",
    "meta-llama/Meta-Llama-3-8B": "llama",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "google/gemma-7b": "gemma",
    "Qwen/Qwen1.5-7B": "qwen2",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
}
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = "The cat sat."
COLUMNS = {
    "meta-math/MetaMathQA": {"query": "1 + 1?", "response": "2", "type": "x", "original_question": "1 + 1?"},
    "m-a-p/CodeFeedback-Filtered-Instruction": {"query": "Add.", "answer": "a + b", "resource": "x", "lang": "x"},
    "WizardLMTeam/WizardLM_evol_instruct_70k": {"instruction": "Count.", "output": "1 2 3"},
    "nyu-mll/glue:mnli": {"premise": TEXT, "hypothesis": TEXT},
    "nyu-mll/glue:sst2": {"sentence": TEXT},
    "nyu-mll/glue:mrpc": {"sentence1": TEXT, "sentence2": TEXT},
    "nyu-mll/glue:cola": {"sentence": TEXT},
    "nyu-mll/glue:qnli": {"question": TEXT, "sentence": TEXT},
    "nyu-mll/glue:qqp": {"question1": TEXT, "question2": TEXT},
    "nyu-mll/glue:rte": {"sentence1": TEXT, "sentence2": TEXT},
    "nyu-mll/glue:stsb": {"sentence1": TEXT, "sentence2": TEXT},
}


@functools.cache
def sentencepiece_file():
    """The content of a spm.model, all that DeBERTa-v3 has for a tokenizer."""
    content = io.BytesIO()
    special = dict(pad_id=0, pad_piece="[PAD]", bos_id=1, bos_piece="[CLS]", eos_id=2, eos_piece="[SEP]")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=content,
        vocab_size=40,
        hard_vocab_limit=False,
        user_defined_symbols=["[MASK]"],
        **special,
        unk_id=3,
        unk_piece="[UNK]",
        minloglevel=2,
    )
    return content.getvalue()


def checkpoint(name, folder):
    """A random pre-trained model of that name's architecture, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    if "deberta" in name:
        folder.mkdir()
        (folder / "spm.model").write_bytes(sentencepiece_file())
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
        (folder / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    shape = dict(vocab_size=len(tokenizer), pad_token_id=end)
    if name in CAUSAL:
        model = tiny(CAUSAL[name], vocab_size=len(tokenizer))
    elif "deberta" in name:
        relative = dict(relative_attention=True, pos_att_type="p2c|c2p", position_buckets=8, share_att_key=True)
        fields = dict(**relative, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0)
        model = DebertaV2ForMaskedLM(DebertaV2Config(**SHAPE, **shape, **fields))
    elif "roberta" in name:
        model = RobertaForMaskedLM(RobertaConfig(**SHAPE, **shape, max_position_embeddings=514))
    else:
        fields = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=end)
        model = T5ForConditionalGeneration(T5Config(**shape, **fields, eos_token_id=end))
    model.save_pretrained(folder)
    if "deberta" not in name:
        tokenizer.save_pretrained(folder)


def rows(name, file):
    """Eight rows with the columns of that data set."""
    label = {"nyu-mll/glue:stsb": lambda i: i / 2, "nyu-mll/glue:mnli": lambda i: i % 3}.get(name, lambda i: i % 2)
    labels = [{"label": label(i), "idx": i} if "glue" in name else {} for i in range(8)]
    file.write_text("\n".join(json.dumps({**COLUMNS[name], **extra}) for extra in labels))


@pytest.mark.parametrize("path", RECIPES, ids=TITLES)
def test_a_recipe_runs(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(elements, "draw", lambda *_, **__: "<svg></svg>")  # most of the time, and not the recipe's
    recipe = yaml.safe_load(path.read_text())
    checkpoint(recipe["model"], tmp_path / "model")
    rows(recipe["data"], tmp_path / "rows.jsonl")
    here = dict(model=tmp_path / "model", data=tmp_path / "rows.jsonl", output_dir=tmp_path / "run")
    here |= dict(r=4, max_steps=1, use_cpu=True, disable_tqdm=True)  # a rank that tiny layers have
    if "eval_data" in recipe:
        here["eval_data"] = tmp_path / "rows.jsonl"
    # A single file has no splits.
    without = {name: value for name, value in recipe.items() if name not in ("data_split", "eval_split")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(without))
    flags = [word for name, value in here.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), *flags]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "lora" / "adapter_model.safetensors").is_file()
    metrics = json.loads((tmp_path / "run" / "all_results.json").read_text())
    if "metric_for_best_model" in recipe:
        assert f"eval_{recipe['metric_for_best_model']}" in metrics


# (epochs, batch, learning rate, alpha) of DeBERTa-v3-base: 2025 paper, table 8.
PUBLISHED = {
    "mnli": (5, 16, 5e-5, 8),
    "sst2": (20, 16, 3e-5, 8),
    "mrpc": (20, 32, 2e-4, 8),
    "cola": (20, 16, 1e-4, 8),
    "qnli": (10, 32, 1e-4, 16),
    "qqp": (10, 16, 1e-4, 8),
    "rte": (50, 16, 1e-4, 8),
    "stsb": (20, 8, 3e-4, 8),
}


def test_published_settings():
    assert len(RECIPES) == 41
    names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "lora_alpha")
    for task, values in PUBLISHED.items():
        (path,) = (p for p in RECIPES if p.stem == f"deberta-v3-base-{task}")
        recipe = yaml.safe_load(path.read_text())
        assert tuple(recipe[name] for name in names) == values, task
        assert recipe["r"] == 8
    llama = yaml.safe_load(next(p for p in RECIPES if p.stem == "llama-2-7b-metamathqa").read_text())
    published = dict(r=128, lora_alpha=128, learning_rate=2e-5, lr_scheduler_type="cosine", warmup_steps=0.03)
    published |= dict(bf16=True, max_length=512, num_train_epochs=1, seed=42, data_split="train[:100000]")
    assert {name: llama[name] for name in published} == published
    assert llama["per_device_train_batch_size"] * llama["gradient_accumulation_steps"] == 32


def test_the_settings_are_those_of_the_presets():
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text())
        BALoraConfig.preset(recipe["preset"])
        fixed = set(BALoraConfig().to_dict()) & set(recipe)
        assert not fixed, f"{path.name} sets {fixed} beside its preset"
