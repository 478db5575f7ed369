"""JSONL to tokens: every column set, the mask, and errors that say where."""

import json

import pytest

from balora import data

from .conftest import TEMPLATE, tiny_tokenizer


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def trained_text(example, tokenizer):
    return tokenizer.decode([t for t in example["labels"] if t != -100])


PAIRS = [("instruction", "output"), ("query", "response"), ("question", "answer")]


@pytest.mark.parametrize("columns", PAIRS)
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
def test_questions_and_answers(tmp_path, columns, template):
    tokenizer = tiny_tokenizer(template)
    rows = data.read_jsonl(write(tmp_path, dict(zip(columns, ("1 + 1?", "2 ✓."), strict=True)), ""))
    (example,) = data.tokenize(rows, tokenizer, 200, "rows").examples
    text = tokenizer.decode(example["input_ids"])
    if template:
        assert text == "<|user|>1 + 1?<|end|>\n<|assistant|>2 ✓.<|end|>\n"
        assert trained_text(example, tokenizer) == "2 ✓.<|end|>\n"
    else:
        assert text == "### Instruction:\n1 + 1?\n\n### Response:\n2 ✓.<eos>"
        assert trained_text(example, tokenizer) == "2 ✓.<eos>"
    assert text.startswith(data.instruction_prompt("1 + 1?", tokenizer))
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)


def test_an_input_column_is_appended_to_the_instruction(tmp_path):
    (row,) = data.read_jsonl(write(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"}))
    assert row.messages[0]["content"] == "Add.\n\n1, 2"


def test_prompt_and_completion_are_joined_as_they_stand(tmp_path):
    tokenizer = tiny_tokenizer(TEMPLATE)
    rows = data.read_jsonl(write(tmp_path, {"prompt": "Q: a ", "completion": "b"}))
    (example,) = data.tokenize(rows, tokenizer, 200, "rows").examples
    assert tokenizer.decode(example["input_ids"]) == "Q: a b<eos>"
    assert trained_text(example, tokenizer) == "b<eos>"


def test_the_special_tokens_of_the_tokenizer_are_added_to_plain_text_and_not_to_a_chat(tmp_path):
    from tokenizers.processors import TemplateProcessing

    rows = data.read_jsonl(write(tmp_path, {"question": "q", "answer": "a"}))
    for template, starts in ((None, True), (TEMPLATE, False)):
        tokenizer = tiny_tokenizer(template)
        special = [("<eos>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=special)
        (example,) = data.tokenize(rows, tokenizer, 200, "rows").examples
        assert (example["input_ids"][0] == tokenizer.eos_token_id) is starts
        assert example["labels"][0] == -100


def test_every_assistant_turn_of_a_conversation_is_trained_on(tmp_path):
    tokenizer = tiny_tokenizer(TEMPLATE)
    roles = [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    rows = data.read_jsonl(write(tmp_path, {"messages": [dict(role=r, content=c) for r, c in roles]}))
    (example,) = data.tokenize(rows, tokenizer, 200, "rows").examples
    assert trained_text(example, tokenizer) == "A1<|end|>\nA2<|end|>\n"


def test_a_token_across_the_boundary_belongs_to_the_answer(stories15m):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories15m)
    (example,) = data.tokenize([data.Row(prompt="One day ", completion="Lily")], tokenizer, 50, "rows").examples
    assert trained_text(example, tokenizer).strip() == "Lily</s>"
    assert example["input_ids"][-1] == tokenizer.eos_token_id


def test_cut_and_skipped_rows_are_counted():
    rows = [
        data.Row(prompt="p" * 5, completion="c" * 20),
        data.Row(prompt="p" * 40, completion="c"),
        data.Row(prompt="p", completion="c"),
    ]
    result = data.tokenize(rows, tiny_tokenizer(), 10, "rows")
    assert [len(e["input_ids"]) for e in result.examples] == [10, 3]
    assert (result.cut, result.skipped) == (2, 1)
    assert result.summary() == (
        "2 rows, 13 tokens, 54 % of them trained on; mean length 6, longest 10; 2 rows cut to 10 tokens; "
        "1 rows skipped: no token of them would be trained on"
    )
    with pytest.raises(ValueError, match="rows: no row has a token to train on within max_length=10"):
        data.tokenize(rows[1:2], tiny_tokenizer(), 10, "rows")


GOOD = {"question": "q", "answer": "a"}
BAD = {
    "not json": ([GOOD, "{oops"], r"line 2: expected a JSON object, found '\{oops'"),
    "a list": ([GOOD, "[1]"], r"line 2: expected a JSON object, found \[1\]"),
    "unknown columns": (
        [{"text": "x", "label": 1}],
        "line 1: expected the columns instruction and output; .*found text, label",
    ),
    "no column": (["{}"], "line 1: expected the columns .*; found no column"),
    "column missing": (
        [GOOD, {"question": "q"}],
        "line 2: expected the column 'answer', as in the rows before; found question",
    ),
    "null": (
        [GOOD, GOOD, {"question": "q", "answer": None}],
        "line 3, column 'answer': expected a text .*, found None",
    ),
    "empty": (
        [{"question": " ", "answer": "a"}],
        "line 1, column 'question': expected a text that is not empty, found ' '",
    ),
    "bad input": (
        [{"instruction": "i", "input": 3, "output": "o"}],
        "line 1, column 'input': expected a text that is not empty, found 3",
    ),
    "messages not a list": ([{"messages": "hi"}], "line 1, column 'messages': expected a list .*, found 'hi'"),
    "message without role": (
        [{"messages": [{"content": "x"}]}],
        "column 'messages': expected texts 'role' and 'content' in message 0",
    ),
    "nothing to train": (
        [{"messages": [{"role": "user", "content": "x"}]}],
        "expected a message of the role 'assistant', found .'user'",
    ),
    "half a surrogate": (['{"question": "q", "answer": "\\ud800"}'], "line 1, column 'answer': expected Unicode text"),
    "a huge number": (['{"question": ' + "9" * 5000 + "}"], "line 1: expected a JSON object, found '{.question"),
    "deep": (["[" * 100000], r"line 1: expected a JSON object, found '\[\["),
    "assistant first": (
        [{"messages": [{"role": "assistant", "content": "x"}]}],
        "line 1, column 'messages': expected something",
    ),
    "empty file": ([], "expected at least one row, found none"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path, case):
    rows, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        data.read_jsonl(write(tmp_path, *rows))
    assert str(tmp_path / "rows.jsonl") in str(caught.value)


def test_a_missing_file_and_a_file_that_is_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: expected a JSONL file, found nothing at .*gone.jsonl"):
        data.read_jsonl(tmp_path / "gone.jsonl")
    (tmp_path / "binary").write_bytes(b'{"question": "q", "answer": "a"}\n\xff')
    with pytest.raises(ValueError, match="binary, line 2: expected UTF-8 text, found the byte 0xff"):
        data.read_jsonl(tmp_path / "binary")


def test_a_byte_order_mark_carriage_returns_and_unusual_line_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"question": "q", "answer": "a\u2028b"}\r\n'.encode() * 2)
    assert [row.messages[1]["content"] for row in data.read_jsonl(path)] == ["a\u2028b"] * 2


def test_blanks_without_a_width_are_trained_on():
    """Tokenizers that trim offsets give a token of blanks no width; special tokens have none either."""
    assert data._trained(7, 7, first=5, last=9)
    assert not data._trained(0, 0, first=5, last=9)
    assert not data._trained(5, 5, first=5, last=9)
    assert data._trained(4, 6, first=5, last=9)
    assert not data._trained(4, 5, first=5, last=9)
    assert not data._trained(9, 10, first=5, last=9)


def test_an_error_of_the_template_names_the_line(tmp_path):
    good = {"messages": [dict(role="user", content="u"), dict(role="assistant", content="a")]}
    strange = {"messages": [dict(role="tool", content="u"), dict(role="assistant", content="a")]}
    rows = data.read_jsonl(write(tmp_path, good, "", strange))
    strict = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer = tiny_tokenizer(strict + "{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: no tools"):
        data.tokenize(rows, tokenizer, 50, "rows")


def test_conversations_that_cannot_be_rendered_are_named():
    turns = [data.Row(messages=[dict(role="user", content="u"), dict(role="assistant", content="a")] * 2)]
    with pytest.raises(ValueError, match="rows: expected one user and one assistant message, because the token"):
        data.tokenize(turns, tiny_tokenizer(), 50, "rows")
    forgetful = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="rows: the tokenizer's chat template rewrites earlier turns"):
        data.tokenize(turns, tiny_tokenizer(forgetful), 50, "rows")
