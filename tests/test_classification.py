"""Texts with labels: columns, kinds of labels, the classes of training in evaluation, token rows."""

import json

import pytest

from balora import classification

from .conftest import tiny_tokenizer


def write(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def labelled(tmp_path, *labels, **options):
    return classification.read(write(tmp_path, *[{"text": "t", "label": label} for label in labels]), **options)


@pytest.mark.parametrize(
    "columns",
    [("text",), ("sentence",), ("text", "text_pair"), ("sentence1", "sentence2"), ("question", "sentence")],
)
def test_texts_and_pairs(tmp_path, columns):
    rows = [{**{name: f"{name} {i}" for name in columns}, "label": i, "idx": 9} for i in range(2)]
    found = classification.read(write(tmp_path, *rows))
    pairs = [(f"{columns[0]} {i}", f"{columns[1]} {i}" if len(columns) == 2 else None) for i in range(2)]
    assert [(row.text, row.text_pair) for row in found.rows] == pairs
    assert found.rows[1].where == f"{tmp_path / 'rows.jsonl'}, line 2"


LABELS = {
    "texts": (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
    "whole numbers": ([10, 2, 10, 3], ["2", "3", "10"], [2, 0, 2, 1]),
    "texts of whole numbers": (["10", "2", "-1"], ["-1", "2", "10"], [2, 1, 0]),
    "codes": (["007", "7", "007"], ["007", "7"], [0, 1, 0]),
    "booleans": ([True, False, True], ["False", "True"], [1, 0, 1]),
    "floats": ([1.0, 2.5, 3], None, [1.0, 2.5, 3.0]),
    "texts of floats": (["3.8", "0", "1e-1"], None, [3.8, 0.0, 0.1]),
    "texts of which one is a number": (["1.5", "x"], ["1.5", "x"], [0, 1]),
}


@pytest.mark.parametrize("case", LABELS)
def test_kinds_of_labels(tmp_path, case):
    labels, names, numbers = LABELS[case]
    found = labelled(tmp_path, *labels)
    assert found.names == names
    assert [row.label for row in found.rows] == numbers
    assert [type(row.label) for row in found.rows] == [type(number) for number in numbers]


def test_the_classes_of_a_class_label_keep_their_names_and_order(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    label = datasets.ClassLabel(names=["no", "maybe", "yes"])

    def parquet(name, *labels):
        table = datasets.Dataset.from_dict({"text": ["t"] * len(labels), "label": list(labels)})
        table.cast_column("label", label).to_parquet(tmp_path / name)
        return tmp_path / name

    found = classification.read(parquet("rows.parquet", 2, 0, 2))
    assert found.names == ["no", "maybe", "yes"]
    assert [row.label for row in found.rows] == [2, 0, 2]
    assert found.counts() == [1, 0, 2]
    assert found.summary() == "3 rows, 3 classes: yes 66.7 %, no 33.3 %; no row of maybe"
    other = labelled(tmp_path, "maybe", "no", training=found)  # another file, by name
    assert [row.label for row in other.rows] == [1, 0]
    message = r"test.parquet, row 2, column 'label': expected a class from 0 to 2, found -1"
    with pytest.raises(ValueError, match=message):  # as the hub writes a test set whose labels are kept secret
        classification.read(parquet("test.parquet", 1, -1), training=found)


def test_evaluation_takes_the_classes_of_training(tmp_path):
    training = labelled(tmp_path, "a", "b", "c")
    found = labelled(tmp_path, "c", "c", training=training)
    assert found.names == training.names
    assert [row.label for row in found.rows] == [2, 2]
    message = "rows.jsonl, line 2, column 'label': expected one of the classes trained on, a, b, c; found 'd'"
    with pytest.raises(ValueError, match=message):
        labelled(tmp_path, "a", "d", training=training)
    targets = labelled(tmp_path, 0.5, 1.5)
    assert [row.label for row in labelled(tmp_path, 3, 4, training=targets).rows] == [3.0, 4.0]
    with pytest.raises(ValueError, match="line 1, column 'label': expected a number, as in training; found 'x'"):
        labelled(tmp_path, "x", training=targets)


def test_labels_that_are_texts_in_training_stay_texts(tmp_path):
    training = labelled(tmp_path, "1.50", "2.0", "n/a")
    assert [row.label for row in labelled(tmp_path, "1.50", "2.0", "1.50", training=training).rows] == [0, 1, 0]
    with pytest.raises(ValueError, match="line 2, .* trained on, 1.50, 2.0, n/a; found '1.5'"):
        labelled(tmp_path, "1.50", "1.5", training=training)


def test_the_summary_shows_imbalance(tmp_path):
    found = labelled(tmp_path, *[1] * 77, *[2] * 17, *[0] * 6)
    assert found.summary() == "100 rows, 3 classes: 1 77 %, 2 17 %, 0 6 %"
    found = labelled(tmp_path, *[f"c{i:02d}" for i in range(20)] * 2, "c07")
    assert found.summary() == "41 rows, 20 classes: c07 7.32 %, c00 4.88 %, c01 4.88 %, …, c19 4.88 %"
    assert labelled(tmp_path, 0.5, 4.0, 3).summary() == "3 rows, regression: labels from 0.5 to 4, mean 2.5"


def test_the_summary_names_the_columns_that_are_not_used(tmp_path):
    for labels, start in (((1, 2), "2 rows, 2 classes: 1 50 %, 2 50 %"), ((0.5, 1.5), "2 rows, regression: ")):
        rows = [{"idx": 7, "text": "t", "text_pair": "p", "label": label, "title": "x"} for label in labels]
        summary = classification.read(write(tmp_path, *rows)).summary()
        assert summary.startswith(start)
        assert summary.endswith("; columns not used: idx, title")


BAD = {
    "no label": ([{"text": "t"}], "line 1: expected the column label, and the text in one of: .*; found text"),
    "no text": ([{"tweet": "t", "label": 1}], "line 1: expected the column label, .*; found tweet, label"),
    "two texts": (
        [{"text": "t", "sentence1": "a", "sentence2": "b", "label": 1}],
        "line 1: expected one text or pair of texts, found sentence1 and sentence2; text",
    ),
    "label gone": ([{"text": "t", "label": 1}, {"text": "t"}], "line 2: expected the column 'label', as in the rows"),
    "empty text": (
        [{"text": "", "label": 1}],
        "line 1, column 'text': expected a text that is not empty, or a number; found ''",
    ),
    "empty pair": (
        [{"text": "t", "text_pair": None, "label": 1}],
        "line 1, column 'text_pair': expected a text that is not empty, or a number; found None",
    ),
    "no class": (
        [{"text": "t", "label": 1}, {"text": "t", "label": None}],
        "line 2, column 'label': expected a text, a boolean or a number, found None",
    ),
    "blank class": ([{"text": "t", "label": " "}], "line 1, column 'label': expected a text, .*, found ' '"),
    "nan": ([{"text": "t", "label": float("nan")}], "line 1, column 'label': expected a finite number, found nan"),
    "mixed": (
        [{"text": "t", "label": 1}, {"text": "t", "label": "1"}],
        "line 2, column 'label': expected a number, as in the rows before; found '1'",
    ),
    "boolean and number": (
        [{"text": "t", "label": True}, {"text": "t", "label": 1}],
        "line 2, column 'label': expected a boolean, as in the rows before; found 1",
    ),
    "one class": ([{"text": "t", "label": "a"}] * 2, "column 'label': expected at least two classes, found only a"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path, case):
    rows, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        classification.read(write(tmp_path, *rows))
    assert str(tmp_path / "rows.jsonl") in str(caught.value)


def test_files_laid_out_as_the_published_ones_after_the_obvious_step(tmp_path):
    """An index column and quoted texts of several lines; a table without quotes, its names put in front."""
    path = tmp_path / "votes.csv"
    path.write_text(',count,label,text\n0,3,2,"one, ""two""\nthree"\n1,3,1,four\n')
    found = classification.read(path)
    assert [(row.text, row.label) for row in found.rows] == [('one, "two"\nthree', 1), ("four", 0)]
    path = tmp_path / "cola.tsv"
    rows = 'gj04\t1\t\tThe more, the crazier.\ngj04\t0\t*\tThey said "so" it.\n'
    path.write_text(rows)
    with pytest.raises(
        ValueError, match="line 2: expected the column label, .*found gj04, 1, , The more, the crazier."
    ):
        classification.read(path)
    path.write_text("source\tlabel\tmark\tsentence\n" + rows)
    found = classification.read(path)
    assert [(r.text, r.label) for r in found.rows] == [("The more, the crazier.", 1), ('They said "so" it.', 0)]
    path = tmp_path / "intents.json"
    path.write_text(json.dumps([dict(text=f"t{i}", label=f"intent_{i % 3}") for i in range(6)]))
    assert classification.read(path).counts() == [2, 2, 2]


def test_token_rows(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{"text": "abc", "text_pair": "d", "label": 0.5}, {"text": "abcdefg", "text_pair": "hi", "label": 1.5}]
    found = classification.read(write(tmp_path, *rows))
    result = classification.tokenize(found, tokenizer, 6, "rows")
    texts = [tokenizer.decode(e["input_ids"]) for e in result.examples]
    assert texts == ["abcd", "abcdhi"]  # of the longer text the end is cut
    assert [e["labels"] for e in result.examples] == [0.5, 1.5]
    assert (result.cut, result.lost) == (1, 3)
    assert result.warnings() == []
    assert result.summary() == (
        "2 rows, 10 tokens; lengths: mean 5, median 5, 95 % up to 6, longest 6; 1 row cut to 6 tokens (3 tokens lost)"
    )


def test_token_types_of_pairs_where_the_tokenizer_has_them(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    special = [("<eos>", tokenizer.eos_token_id)]
    pair = "<eos> $A <eos> $B:1 <eos>:1"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", pair=pair, special_tokens=special
    )
    rows = [{"text": "ab", "text_pair": "c", "label": i} for i in range(2)] * 600  # more than a batch
    result = classification.tokenize(classification.read(write(tmp_path, *rows)), tokenizer, 5, "rows")
    assert [e["token_type_ids"] for e in result.examples] == [[0, 0, 0, 1, 1]] * 1200
    assert tokenizer.decode(result.examples[0]["input_ids"]) == "<eos>a<eos>c<eos>"
    assert [e["labels"] for e in result.examples] == [0, 1] * 600
    assert (result.cut, result.lost) == (1200, 1200)
