"""Data of encoder-decoders: instruction rows, and labels cast as text."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from balora import cli, seq2seq

from .conftest import tiny_tokenizer
from .test_cli import flags


def tiny_t5():
    tokenizer = tiny_tokenizer()
    shape = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0)
    torch.manual_seed(0)
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **ids))
    return model.eval(), tokenizer


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_questions_and_their_answers(tmp_path):
    rows = [{"question": "2 + 2?", "answer": "4"}, {"question": "3?", "answer": "3"}]
    assert [pair[:2] for pair in seq2seq.read(write(tmp_path / "a", rows)).pairs] == [("2 + 2?", "4"), ("3?", "3")]
    rows = [{"prompt": "a ", "completion": "b"}]
    assert [pair[:2] for pair in seq2seq.read(write(tmp_path / "b", rows)).pairs] == [("a ", "b")]


def test_labels_are_cast_as_text(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": "same"}, {"sentence1": "c", "sentence2": "d", "label": "not"}]
    train = seq2seq.read(write(tmp_path / "a.jsonl", rows))
    assert [pair[:2] for pair in train.pairs] == [
        ("sentence1: a sentence2: b", "same"),
        ("sentence1: c sentence2: d", "not"),
    ]
    rows = [{"text": "a", "label": 2.5}, {"text": "b", "label": 3}]
    numbers = seq2seq.read(write(tmp_path / "b.jsonl", rows))
    assert [pair[:2] for pair in numbers.pairs] == [("text: a", "2.5"), ("text: b", "3.0")]
    with pytest.raises(ValueError, match="line 1, column 'label': expected one of the classes trained on, not, same"):
        seq2seq.read(write(tmp_path / "c.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "x"}]), training=train)


def test_a_conversation_of_several_turns_is_an_error(tmp_path):
    turns = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    pairs = seq2seq.read(write(tmp_path / "a", [{"messages": turns}])).pairs
    with pytest.raises(ValueError, match="line 1: expected one user and one assistant message .* found user, assis"):
        list(pairs)


def test_tokens_end_and_are_cut(tmp_path):
    tokenizer = tiny_tokenizer()
    pairs = [seq2seq.Pair("abc", "de"), seq2seq.Pair("abcdefgh", "d"), seq2seq.Pair("a", "abcdefgh")]
    found = seq2seq.tokenize(pairs, tokenizer, 5, "rows")
    assert [tokenizer.decode(e["input_ids"]) for e in found.examples] == ["abc", "abcde", "a"]
    assert [tokenizer.decode(e["labels"]) for e in found.examples] == ["de<eos>", "d<eos>", "abcd<eos>"]
    assert (found.cut, found.lost) == (2, 3 + 4)
    assert "2 rows cut to 5 tokens (7 tokens lost)" in found.summary()


def test_the_batch_feeds_the_decoder_and_its_loss_is_the_models_own():
    model, tokenizer = tiny_t5()
    found = seq2seq.tokenize([seq2seq.Pair("abc", "de"), seq2seq.Pair("a", "d")], tokenizer, 9, "rows")
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(list(found.examples))
    assert batch["labels"][1, -1] == -100
    assert batch["decoder_input_ids"][0].tolist() == [0, *batch["labels"][0, :-1].tolist()]
    loss = model(**batch).loss
    del batch["decoder_input_ids"]
    assert torch.equal(model(**batch).loss, loss)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    for part in tiny_t5():
        part.save_pretrained(folder)
    return folder


def options(model, data, out, **changes):
    values = dict(model=model, data=data, eval_data=data, output_dir=out, r=8, lora_alpha=8, max_steps=2, use_cpu=True)
    values |= dict(per_device_train_batch_size=8, logging_steps=1, disable_tqdm=True, learning_rate=3e-2)
    return {**values, **changes}


def test_train_on_labels_as_text(model, tmp_path):
    rows = [{"text": letter * 3 + "x" * i, "label": label} for letter, label in ("ay", "bn") for i in range(8)]
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    values = options(model, data, out, adapter="dora", max_steps=24, save_strategy="no", modules_to_save="lm_head")
    assert cli.main(["train", *flags(values)]) == 0
    measured = json.loads((out / "eval_results.json").read_text())["eval_exact_match"]
    assert measured >= 0.5
    page = (out / "report.html").read_text()
    assert "exact match" in page
    assert "Not measured: the probe is of causal language models." in page
    base = AutoModelForSeq2SeqLM.from_pretrained(model)
    lora, tokenizer = peft.PeftModel.from_pretrained(base, out / "lora").eval(), tiny_tokenizer()
    written = []
    for row in rows:
        ids = tokenizer(f"text: {row['text']}", return_tensors="pt").input_ids
        found = lora.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0]
        written.append(tokenizer.decode(found[1:]) == f"{row['label']}<eos>")
    assert sum(written) / len(written) == measured


def test_train_on_instructions_and_go_on_to_the_same_bits(model, tmp_path):
    rows = [{"question": f"Count to {i}.", "answer": "1 2 3"} for i in range(12)]
    values = options(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "run", save_steps=1, form="residual")
    assert cli.main(["train", *flags(values)]) == 0
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results["eval_loss"] > 0
    assert "eval_exact_match" not in results
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert {"ce", "consistency", "svd"} <= history[1].keys()
    whole = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    assert cli.main(["train", *flags(values), "--resume_from_checkpoint", "true"]) == 0
    resumed = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
