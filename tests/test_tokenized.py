"""Token rows in flat arrays."""

import pytest

from balora.tokenized import Examples, Tokenized


def test_rows_come_back_as_they_went_in():
    rows = [dict(input_ids=[5, 6, 2**31 - 1], labels=[-100, 6, 7], kind=0.5), dict(input_ids=[], labels=[], kind=1)]
    rows += [dict(input_ids=[1], labels=[-100], kind=2)]
    examples = Examples(["input_ids", "labels"], ["kind"])
    assert not examples
    for row in rows:
        examples.append(**row)
    assert list(examples) == rows
    assert len(examples) == 3
    assert examples[-1] == rows[-1]
    assert examples[1:] == rows[1:]
    assert examples.lengths().tolist() == [3, 0, 1]
    with pytest.raises(IndexError):
        examples[3]


def test_what_was_not_used_and_answers_without_an_end_are_said():
    examples = Examples(["input_ids", "labels"])
    examples.append(input_ids=[5, 6], labels=[-100, 6])
    rows = Tokenized(examples, max_length=2, ends=True)
    assert rows.warnings() == []
    assert rows.summary().endswith("longest 2")
    rows.unwritten.update(["name", "thinking"])
    rows.unwritten.update(["name"])
    rows.unused = ["type", "original_question"]
    assert rows.summary().endswith(
        "longest 2; keys of messages that change nothing: name (2 rows), thinking (1 row); columns not used: type, "
        "original_question"
    )
    message = "no answer ends with a special token, so the model does not learn to stop: "
    rows.ends = False
    assert rows.warnings() == [
        message + "expected a chat template that writes one, or a tokenizer with an end-of-text token"
    ]
    rows.cut = 1
    assert rows.warnings() == [message + "max_length=2 cuts every row"]
