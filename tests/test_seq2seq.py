"""Data of encoder-decoders: instruction rows, and labels cast as text."""

import json

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from balora import seq2seq

from .conftest import tiny_tokenizer


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
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    found = seq2seq.tokenize([seq2seq.Pair("abc", "de"), seq2seq.Pair("a", "d")], tokenizer, 9, "rows")
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(list(found.examples))
    assert batch["labels"][1, -1] == -100
    assert batch["decoder_input_ids"][0].tolist() == [0, *batch["labels"][0, :-1].tolist()]
    loss = model(**batch).loss
    del batch["decoder_input_ids"]
    assert torch.equal(model(**batch).loss, loss)
