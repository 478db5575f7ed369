"""JSONL to tokens: every column set, the mask, and errors that say where."""

import json

import numpy as np
import pytest

from balora import data

from .conftest import TEMPLATE, tiny_tokenizer


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def trained_text(example, tokenizer):
    return tokenizer.decode([t for t in example["labels"] if t != -100])


PAIRS = [("instruction", "output"), ("query", "response"), ("query", "answer"), ("problem", "solution")]
PAIRS += [("question", "answer"), ("prompt", "response"), ("question", "completion")]


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


@pytest.mark.parametrize("prompt", ["instruction", "query", "question", "problem", "prompt"])
@pytest.mark.parametrize(("name", "response"), [("input", "output"), ("context", "answer")])
def test_an_input_column_is_appended_to_the_question(tmp_path, prompt, name, response):
    rows = [{prompt: "Add.", name: "1, 2", response: "3"}, {prompt: "Add.", name: "", response: "3"}]
    rows = data.read_jsonl(write(tmp_path, *rows))
    assert [row.messages[0]["content"] for row in rows] == ["Add.\n\n1, 2", "Add."]


UNUSED = [
    ({"type": "t", "question": "q", "answer": "a", "original_question": "o"}, ["type", "original_question"]),
    ({"question": "q", "answer": "a", "input": "i", "context": ""}, []),
    ({"prompt": "p", "completion": "c", "context": "x"}, ["context"]),  # nothing is appended to these two
    ({"messages": [dict(role="user", content="u"), dict(role="assistant", content="a")], "tools": "[]"}, ["tools"]),
]


@pytest.mark.parametrize(("row", "unused"), UNUSED)
def test_the_columns_that_are_not_used_are_named(tmp_path, row, unused):
    rows = data.read(write(tmp_path, row))
    assert rows.unused == unused
    result = data.tokenize(rows, tiny_tokenizer(TEMPLATE), 200, "rows")
    assert ("columns not used" in result.summary()) is bool(unused)
    if unused:
        assert result.summary().endswith(f"; columns not used: {', '.join(unused)}")


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


TOOLS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
CALLED = '<call>{"name": "add", "arguments": {"x": 1}}<eos>'


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("content", ["", None, "absent"])
def test_tool_calls_and_reasoning_reach_the_chat_template(tmp_path, monkeypatch, suffix, content):
    call = {**CALL, "content": content, "name": None}
    if content == "absent":
        del call["content"]
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "b"}}}]}
    result = {"role": "tool", "content": "2", "tool_call_id": "7"}
    answer = {"role": "assistant", "content": "It is 2.", "reasoning_content": "hm", "tool_calls": []}
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, call, result, other, result, answer]}
    path = write(tmp_path, row)
    if suffix == "parquet":  # which gives each message, and each call's arguments, the keys of the others
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.Dataset.from_list([row]).to_parquet(path := tmp_path / "rows.parquet")
    tokenizer = tiny_tokenizer(TOOLS)
    found = data.tokenize(data.read(path), tokenizer, 400, "rows")
    (example,) = found.examples
    second = '<call>{"name": "look", "arguments": {"at": "b"}}<eos>'
    assert tokenizer.decode(example["input_ids"]) == (
        f"<|user|>1 + 1?<eos><|assistant|>{CALLED}<|tool|>2<eos><|assistant|>{second}<|tool|>2<eos>"
        "<|assistant|><think>hm</think>It is 2.<eos>"
    )
    assert trained_text(example, tokenizer) == f"{CALLED}{second}<think>hm</think>It is 2.<eos>"
    assert found.unwritten == {"tool_call_id": 1}


def test_keys_that_change_nothing_are_counted_and_tool_calls_are_refused():
    def rows(*answers):
        turns = [[dict(role="user", content="u"), dict(role="assistant", content="a") | answer] for answer in answers]
        return [data.Row(messages=m, where=f"FILE, line {i}") for i, m in enumerate(turns, start=1)]

    asks = "{% for m in messages %}{% if m.role == 'assistant' and m.name != 'n' %}{{ raise_exception('who?') }}"
    asks += "{% endif %}{{ m.content }}{% endfor %}"
    for template, unwritten in [
        (None, {"name": 2, "weight": 1}),
        (TEMPLATE, {"name": 2, "weight": 1}),
        (TEMPLATE.replace("m['content'] }}", "m['content'] }}{{ m['name'] }}"), {"weight": 1}),
        (asks, {"weight": 1}),
        (GENERATION, {"name": 2, "weight": 1}),
    ]:
        answers = rows({"name": "n", "weight": 0}, {"name": "n", "thinking": ""})
        found = data.tokenize(answers, tiny_tokenizer(template), 50, "rows")
        assert found.unwritten == unwritten
    with pytest.raises(ValueError, match="FILE, line 2: expected a chat template that writes tool_calls; the token"):
        data.tokenize(rows({}, CALL), tiny_tokenizer(TEMPLATE), 50, "rows")
    for answer in (CALL, CALL | {"content": "a"}):
        with pytest.raises(ValueError, match="FILE, line 1: expected no tool_calls, because the tokenizer has no chat"):
            data.tokenize(rows(answer), tiny_tokenizer(), 50, "rows")
    with pytest.raises(ValueError, match="FILE, line 1: expected Unicode text, found half a surrogate pair"):
        data.tokenize(rows({"reasoning_content": "\ud800"}), tiny_tokenizer(TOOLS), 50, "rows")


def test_conversations_of_sharegpt_and_keys_that_are_not_needed(tmp_path):
    roles = [("system", "S"), ("human", "U1"), ("gpt", "A1"), ("user", "U2"), ("assistant", "A2")]
    rows = [{"conversations": [{"from": r, "value": c, "weight": None, "role": "x"} for r, c in roles], "idx": 7}]
    rows += [{"conversations": [dict(role="user", content="U", name=None), dict(role="assistant", content="A")]}]
    first, second = data.read_jsonl(write(tmp_path, *rows))
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert first.messages == [
        dict(role=r, content=c) for r, c in zip(roles, ("S", "U1", "A1", "U2", "A2"), strict=True)
    ]
    assert second.messages == [dict(role="user", content="U"), dict(role="assistant", content="A")]
    third = {"messages": [dict(role="user", content="U"), dict(role="assistant", content="A", tool_calls=[])]}
    assert data.read_jsonl(write(tmp_path, third))[0].messages == second.messages


def test_a_conversation_is_taken_before_what_stands_beside_it(tmp_path):
    messages = [dict(role="user", content="U"), dict(role="assistant", content="A")]
    (row,) = data.read_jsonl(write(tmp_path, {"problem": "p", "solution": "s", "messages": messages}))
    assert row.messages == messages


GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(("template", "end"), [(TEMPLATE, "<|end|>\n"), (GENERATION, "<|end|>")])
def test_of_prompt_and_completion_as_messages_the_completion_is_trained_on(tmp_path, template, end):
    prompt = [("user", "U1"), ("assistant", "A1"), ("user", "U2")]
    completion = [("assistant", "A2"), ("user", "U3"), ("assistant", "A3"), ("user", "U4")]
    row = {"prompt": [dict(role=r, content=c) for r, c in prompt]}
    row["completion"] = [dict(role=r, content=c) for r, c in completion]
    tokenizer = tiny_tokenizer(template)
    (example,) = data.tokenize(data.read_jsonl(write(tmp_path, row)), tokenizer, 200, "rows").examples
    assert trained_text(example, tokenizer) == f"A2{end}A3{end}"
    text = tokenizer.decode(example["input_ids"])
    assert "U1" in text
    assert "U4" not in text  # nothing follows it that is trained on


def test_the_generation_blocks_of_a_template_say_what_is_trained_on():
    tokenizer = tiny_tokenizer(GENERATION)
    turns = [dict(role=r, content=c) for r, c in [("user", "U1"), ("assistant", "A1 ✓"), ("user", "U2")]]
    rows = [data.Row(messages=[*turns, dict(role="assistant", content="A2")])]
    (example,) = data.tokenize(rows, tokenizer, 200, "rows").examples
    assert trained_text(example, tokenizer) == "A1 ✓<|end|>A2<|end|>"
    assert tokenizer.decode(example["input_ids"]).startswith("<|user|>U1<|end|><|assistant|>A1")


REASONING = (  # of earlier answers only what follows the reasoning is written, as Qwen3's template does it
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_of_turns_that_the_template_rewrites_the_last_answer_is_trained_on():
    tokenizer = tiny_tokenizer(REASONING)
    answer = dict(role="assistant", content="<think>hm</think>A")
    turns = [dict(role="user", content="U"), answer]
    plain = [dict(role="user", content="U"), dict(role="assistant", content="B")]
    rows = [data.Row(messages=turns), data.Row(messages=turns + turns), data.Row(messages=plain + plain)]
    rows += [data.Row(messages=plain + turns + turns)]
    result = data.tokenize(rows, tokenizer, 200, "rows")
    assert [trained_text(e, tokenizer) for e in result.examples] == [
        "<think>hm</think>A<|end|>",
        "<think>hm</think>A<|end|>",
        "B<|end|>B<|end|>",
        "<think>hm</think>A<|end|>",
    ]
    expected = "<|user|>U<|end|><|assistant|>A<|end|><|user|>U<|end|><|assistant|><think>hm</think>A<|end|>"
    assert tokenizer.decode(result.examples[1]["input_ids"]) == expected
    assert result.last_only == 2
    assert "; 2 rows trained on the last answer only: the chat template rewrites earlier ones" in result.summary()


def test_a_system_message_that_the_template_leaves_out_is_named(tmp_path):
    turns = [dict(role="user", content="U"), dict(role="assistant", content="A")]
    rows = [{"messages": turns}, {"messages": [dict(role="system", content=" Be brief. "), *turns]}]
    rows = data.read_jsonl(write(tmp_path, *rows))
    trims = "{% for m in messages %}{{ m['content'] | trim }}|{% endfor %}"
    assert len(data.tokenize(rows, tiny_tokenizer(trims), 50, "rows").examples) == 2
    deaf = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}|{% endif %}{% endfor %}"
    with pytest.raises(
        ValueError, match="line 2: expected a chat template that writes system messages; .*' Be brief. '"
    ):
        data.tokenize(rows, tiny_tokenizer(deaf), 50, "rows")


def test_rows_of_both_kinds_and_more_than_a_batch_keep_their_order():
    tokenizer = tiny_tokenizer(TEMPLATE)
    rows = []
    for i in range(1100):
        if i % 3:
            rows.append(data.Row(prompt=f"p{i} ", completion="c"))
        else:
            turns = [dict(role="user", content=f"u{i}"), dict(role="assistant", content="a")]
            rows.append(data.Row(messages=turns))
    examples = data.tokenize(rows, tokenizer, 200, "rows").examples
    texts = [tokenizer.decode(e["input_ids"]) for e in examples]
    assert texts == [f"p{i} c<eos>" if i % 3 else f"<|user|>u{i}<|end|>\n<|assistant|>a<|end|>\n" for i in range(1100)]


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
    assert (result.cut, result.lost, result.skipped, result.answers_cut) == (1, 16, 1, 1)
    assert result.summary() == (
        "2 rows, 13 tokens, 54 % of them trained on; lengths: mean 6, median 6, 95 % up to 10, longest 10; "
        "1 row cut to 10 tokens (16 tokens lost); 1 row skipped: no token of them would be trained on "
        "(of 1 the answer begins after 10 tokens; row 2)"
    )
    with pytest.raises(ValueError, match="rows: no row has a token to train on within max_length=10"):
        data.tokenize(rows[1:2], tiny_tokenizer(), 10, "rows")


def test_rows_without_an_answer_are_skipped_whatever_their_length():
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    turns = [[dict(role="user", content="u"), dict(role="assistant", content=c)] for c in ("a", *[""] * 7)]
    rows = [data.Row(messages=m, where=f"FILE, line {i}") for i, m in enumerate(turns, start=1)]
    result = data.tokenize(rows, tokenizer, 10, "rows")
    assert (len(result.examples), result.skipped, result.answers_cut) == (1, 7, 0)
    assert result.summary().endswith(
        "; 7 rows skipped: no token of them would be trained on (line 2, line 3, line 4, line 5, line 6, …)"
    )
    assert result.warnings()[-1] == "7 of 8 rows were skipped"


def test_a_warning_if_no_answer_ends_with_a_special_token():
    turns = [data.Row(messages=[dict(role="user", content="u"), dict(role="assistant", content="a")])] * 2

    def stops(template, rows=turns, max_length=100, **changes):
        tokenizer = tiny_tokenizer(template)
        tokenizer.add_tokens(["<call>"])
        tokenizer.add_tokens(["<|stop|>"], special_tokens=True)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        warnings = data.tokenize(rows, tokenizer, max_length, "rows").warnings()
        return not any("no answer ends with a special token" in warning for warning in warnings)

    chat = "{% for m in messages %}{{ m.content }}END{% endfor %}"
    for end in ("<eos>", "<|stop|>", "<|stop|>\n", "<eos>\n \n"):
        assert stops(chat.replace("END", end)), end
    for end in ("", "\n", "<call>", "<|end|>\n", "<eos>."):
        assert not stops(chat.replace("END", end)), end
    assert stops(None)
    assert not stops(None, eos_token=None, pad_token=None)
    long = [data.Row(prompt="p", completion="c" * 20)]
    assert not stops(None, long, 10)
    assert stops(None, [*long, data.Row(prompt="p", completion="c")], 10)


def test_a_small_share_of_trained_tokens_and_many_skipped_rows_give_warnings():
    short = [data.Row(prompt="p" * 97, completion="cc")]  # and the end: 3 of 100
    result = data.tokenize(short, tiny_tokenizer(), 100, "rows")
    assert result.warnings() == ["only 3 % of the tokens are trained on; the rest of each step is spent on prompts"]
    result = data.tokenize([data.Row(prompt="p" * 95, completion="cccc")], tiny_tokenizer(), 100, "rows")
    assert result.trained_share() == 0.05
    assert result.warnings() == []
    # The first token of a row is predicted by nothing, even where it belongs to the answer.
    result = data.tokenize([data.Row(prompt="", completion="ccc")] * 2, tiny_tokenizer(), 100, "rows")
    assert result.trained_share() == 0.75
    with pytest.raises(ValueError, match="rows: no row has a token to train on within max_length=1"):
        data.tokenize([data.Row(prompt="", completion="ccc")], tiny_tokenizer(), 1, "rows")
    long = data.Row(prompt="p" * 100, completion="c")
    good = [data.Row(prompt="p", completion="c")]
    assert data.tokenize(good * 9 + [long], tiny_tokenizer(), 100, "rows").warnings() == []
    assert data.tokenize(good * 8 + [long], tiny_tokenizer(), 100, "rows").warnings() == [
        "1 of 9 rows were skipped: of 1 max_length=100 cuts the answers away"
    ]


GOOD = {"question": "q", "answer": "a"}
BAD = {
    "not json": ([GOOD, "{oops"], r"line 2: expected a JSON object, found '\{oops'"),
    "a list": ([GOOD, "[1]"], r"line 2: expected a JSON object, found \[1\]"),
    "unknown columns": (
        [{"text": "x", "label": 1}],
        "line 1: expected a column of instruction, .* and one of output, .*; or messages or .*; found text, label",
    ),
    "no column": (["{}"], "line 1: expected a column of .*; found no column"),
    "column missing": (
        [GOOD, {"question": "q"}],
        "line 2: expected the column 'answer', as in the rows before; found question",
    ),
    "null": (
        [GOOD, GOOD, {"question": "q", "answer": None}],
        "line 3, column 'answer': expected a text .*; found None",
    ),
    "empty": (
        [{"question": " ", "answer": "a"}],
        "line 1, column 'question': expected a text that is not empty, or a number; found ' '",
    ),
    "bad input": (
        [{"instruction": "i", "input": True, "output": "o"}],
        "line 1, column 'input': expected a text that is not empty, or a number; found True",
    ),
    "messages not a list": ([{"messages": "hi"}], "line 1, column 'messages': expected a list .*, found 'hi'"),
    "message without role": (
        [{"messages": [{"content": "x"}]}],
        "column 'messages': expected texts 'role' and 'content' in message 0",
    ),
    "an answer of nothing": (
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " ", "tool_calls": []}]}],
        "line 1, column 'messages': expected a text or tool calls in message 1, found {'role': 'assistant'",
    ),
    "an answer of nothing in sharegpt": (
        [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]}],
        "line 1, column 'conversations': expected a text or tool calls in message 1, found {'from': 'gpt'",
    ),
    "an answer of null": (
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}],
        "line 1, column 'messages': expected texts 'role' and 'content' in message 1",
    ),
    "tool calls as a number": (
        [{"messages": [{"role": "user", "content": "x"}, {**CALL, "tool_calls": 3}]}],
        "column 'messages': expected a list of objects as tool_calls in message 1, found 3",
    ),
    "tool calls as a text": (
        [{"messages": [{"role": "user", "content": "x"}, {**CALL, "tool_calls": "[]"}]}],
        "column 'messages': expected a list of objects as tool_calls in message 1, found '\\[\\]'",
    ),
    "nothing to train": (
        [{"messages": [{"role": "user", "content": "x"}]}],
        "expected a message of the role 'assistant', found .'user'",
    ),
    "half a surrogate": (['{"question": "q", "answer": "\\ud800"}'], "line 1, column 'answer': expected Unicode text"),
    "an infinity": (['{"question": "q", "answer": 1e999}'], "expected a text .*, or a number; found inf"),
    "not a number": (['{"question": "q", "answer": NaN}'], "expected a text .*, or a number; found nan"),
    "a huge number": (['{"question": ' + "9" * 5000 + "}"], "line 1: expected a JSON object, found '{.question"),
    "two prompts": (
        [{"question": "q", "problem": "p", "answer": "a"}],
        "line 1: expected one column of instruction, query, question, .*; found question, problem",
    ),
    "two responses": (
        [{"question": "q", "answer": "a", "solution": "s"}],
        "line 1: expected one column of output, response, answer, .*; found answer, solution",
    ),
    "two conversations": (
        [{"messages": [], "conversations": []}],
        "line 1: expected one column of messages, conversations; found messages, conversations",
    ),
    "no response": ([{"question": "q"}], "line 1: expected a column of .*; found question"),
    "unknown role": (
        [{"conversations": [{"from": "bing", "value": "x"}]}],
        "column 'conversations': expected one of human, user, gpt, assistant, system in message 0, found 'bing'",
    ),
    "sharegpt without a value": (
        [{"conversations": [{"from": "human"}]}],
        "column 'conversations': expected texts 'from' and 'value' in message 0, found {'from': 'human'}",
    ),
    "prompt a text, completion messages": (
        [{"prompt": "p", "completion": [{"role": "assistant", "content": "x"}]}],
        "line 1, column 'prompt': expected a list of messages that is not empty, found 'p'",
    ),
    "completion without an answer": (
        [{"prompt": [{"role": "assistant", "content": "x"}], "completion": [{"role": "user", "content": "x"}]}],
        "line 1, column 'prompt': expected something before the first message of the assistant",
    ),
    "no answer in the completion": (
        [{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "user", "content": "x"}]}],
        "line 1, column 'completion': expected a message of the role 'assistant', found .'user'",
    ),
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


def test_a_number_stands_for_its_digits(tmp_path):
    """As they were written: 4.10 as a text is not 4.1."""
    numbers = ["4", "-7", "0", "4.10", "1e3", "1E-05", "9" * 400, "0.1000000000000000055"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"question": {n}, "answer": {n}, "input": {n}}}\n' for n in numbers)
    )
    for row, number in zip(data.read_jsonl(tmp_path / "rows.jsonl"), numbers, strict=True):
        assert [m["content"] for m in row.messages] == [f"{number}\n\n{number}", number]


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
    offsets = np.array([(0, 0), (4, 5), (4, 6), (5, 5), (7, 7), (8, 9), (9, 10), (11, 13), (0, 0)])
    assert data._trained(offsets, [(5, 9)]).tolist() == [0, 0, 1, 0, 1, 1, 0, 0, 0]
    assert data._trained(offsets, [(5, 9), (12, 20)]).tolist() == [0, 0, 1, 0, 1, 1, 0, 1, 0]


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
    backwards = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rows: expected a chat template that begins an answer as it asks for one"):
        data.tokenize(turns, tiny_tokenizer(backwards), 50, "rows")


def test_a_reader_is_read_as_it_is_tokenized(tmp_path):
    path = write(tmp_path, *[GOOD] * 3, {"question": "q"})
    rows = data.read(path)
    message = "rows.jsonl, line 4: expected the column 'answer', as in the rows before"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            data.tokenize(rows, tiny_tokenizer(), 50, "rows")
    with pytest.raises(ValueError, match=r"line 1: expected a column of .*; found text"):
        data.read(write(tmp_path, {"text": "x"}))
