"""Files, folders and names of the hub to records, and errors that say where."""

import csv
import json
import subprocess
import sys

import pytest

from balora import data, sources

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """datasets writes what it converts to its cache: here, and nowhere beside the data."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return datasets


def table(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def write(path, rows):
    """The rows as a file of the format that the name says."""
    if path.suffix == ".parquet":
        table(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text("\n " + json.dumps(rows, indent=1))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def records(found):
    return [record for _, record in found]


@pytest.fixture
def hub_folder(tmp_path):
    """A folder laid out as a data set of the hub: two configurations, Parquet files, a card."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "train-00000-of-00001.parquet", ROWS)
    write(folder / "data" / "test-00000-of-00001.parquet", ROWS[3:])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n- config_name: small\n  data_files:\n  - split: validation\n"
        "    path: data/test-*\n---\n"
    )
    return folder


def test_a_name_that_means_the_same_from_any_folder(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path / "set")
    assert sources.located("../rows.jsonl") == sources.located(str(tmp_path / "rows.jsonl"))
    assert sources.located("../rows.jsonl") == str(tmp_path / "rows.jsonl")
    assert sources.located("../set:main") == f"{tmp_path / 'set'}:main"
    for name in ("openai/gsm8k", "openai/gsm8k:main", "gone.jsonl", ":main", ""):
        assert sources.located(name) == name


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file(tmp_path, suffix):
    rows = [*ROWS, {"question": 'Say "NA",\nor\tnull.', "answer": "007"}, {"question": "é\u2028", "answer": "None"}]
    path = write(tmp_path / f"rows.{suffix}", rows)
    found = sources.find(path)
    assert records(found) == rows
    assert records(found) == rows  # and once more
    assert found.total == (len(rows) if suffix in ("json", "parquet") else None)
    where, _ = list(found)[-1]
    line = len(rows)  # the rows before it, and one text of two lines
    place = {"jsonl": f"line {line}", "csv": f"line {line + 2}", "tsv": f"line {line + 2}"}.get(suffix, f"row {line}")
    assert where == f"{path}, {place}"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no cache beside the data
    with pytest.raises(ValueError, match="expected no split, because a single file has none; found 'test'"):
        sources.find(path, "test")


def test_lines_of_objects_in_a_json_file_and_an_unknown_suffix(tmp_path):
    for name in ("rows.json", "rows.data"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, ROWS)))
        assert records(sources.find(tmp_path / name)) == ROWS


def test_texts_of_a_csv_file_may_be_long(tmp_path):
    usual = csv.field_size_limit(100_000)
    rows = [{"question": "q" * 200_000, "answer": "a"}]
    assert records(sources.find(write(tmp_path / "rows.csv", rows))) == rows
    assert csv.field_size_limit(usual) == 100_000


BAD = {
    "json text": (
        "rows.json",
        '[{"a": 1},',
        r"rows.json: expected a list of JSON objects, or one on each line, found ",
    ),
    "json item": ("rows.json", '[{"a": 1}, 7]', "rows.json, row 2: expected a JSON object, found 7"),
    "json dict": (
        "rows.json",
        '{\n "train": []}',
        "line 1: expected a list of JSON objects, or one on each line, found",
    ),
    "json none": ("rows.json", " [] ", "rows.json: expected at least one row, found none"),
    "json nothing": ("rows.json", "", "rows.json: expected at least one row, found none"),
    "csv none": ("rows.csv", "question,answer\n", "rows.csv: expected at least one row, found none"),
    "csv short": (
        "rows.csv",
        'a,b\n"1\n2",3\n4\n',
        "rows.csv, line 4: expected 2 fields, as in the first line; found 1",
    ),
    "csv short of one": ("rows.csv", "a\n1,2\n", "rows.csv, line 2: expected 1 field, as in the first line; found 2"),
    "csv semicolons": (
        "rows.csv",
        "question;answer\n1;2\n",
        "rows.csv, line 1: expected the columns' names between commas, found 1 field, 'question;answer'; is ';' what",
    ),
    "tsv commas": (
        "rows.tsv",
        "a,b\n1,2\n",
        "line 1: expected the columns' names between tabs, found 1 field, 'a,b'; is ','",
    ),
    "csv twice": ("rows.csv", "a,b,a\n1,2,3\n", "rows.csv, line 1: expected the columns' names, each once"),
    "csv open quote": ("rows.csv", 'a,b\n1,2\n3,"4\n5,6\n', "rows.csv, line 3: expected quotes in pairs"),
    "csv stray quote": ("rows.tsv", 'a\tb\n"x" y\tz\n', "rows.tsv, line 2: expected quotes in pairs"),
    "csv bytes": ("rows.csv", b"a,b\n1,2\n\xff,3\n", "rows.csv, line 3: expected UTF-8 text, found the byte 0xff"),
    "parquet": ("rows.parquet", b"no table", "rows.parquet: .*Parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(tmp_path, case):
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        records(sources.find(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_of_a_data_set_with_configurations_and_splits(hub_folder):
    def answers(*asked, **options):
        return [record["answer"] for record in records(sources.find(*asked, **options))]

    main = f"{hub_folder}:main"
    assert answers(main) == ["a0", "a1", "a2", "a3", "a4"]
    assert answers(main, usual="test") == answers(main, "test") == ["a3", "a4"]
    assert answers(main, "train[:2]") == ["a0", "a1"]
    assert answers(f"{hub_folder}:small") == ["a3", "a4"]  # the only split, whatever its name
    assert [where for where, _ in sources.find(main, "test")] == [f"{main}, split test, row {i}" for i in (1, 2)]
    for asked, message in [
        ((main, "tst"), r"set:main, split tst: Unknown split \"tst\"\. Should be one of \['train', 'test'\]"),
        ((main, None, "validation"), "set:main: expected one of the splits train, test; found 'validation'"),
        ((main, "train[:x]"), r"set:main, split train\[:x\]: "),
        ((f"{hub_folder}:big",), r"set:big: BuilderConfig 'big' not found\. Available: \['main', 'small'\]"),
        ((hub_folder,), r"set: Config name is missing(.|\n)*'main', 'small'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sources.find(*asked)


def test_a_folder_of_plain_files_and_an_empty_one(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name, ROWS if name == "train.jsonl" else ROWS[:1])
    assert records(sources.find(tmp_path)) == ROWS
    assert records(sources.find(tmp_path, "test")) == ROWS[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: .*doesn't contain any data files"):
        sources.find(tmp_path / "empty")


def test_a_folder_of_save_to_disk(tmp_path, own_cache):
    one, several = tmp_path / "one", tmp_path / "several"
    table(ROWS).with_format("numpy").save_to_disk(one)
    own_cache.DatasetDict(train=table(ROWS), test=table(ROWS[:1])).save_to_disk(several)
    before = sorted(tmp_path.rglob("*"))
    assert records(sources.find(one)) == records(sources.find(several)) == ROWS
    assert type(records(sources.find(one))[0]["question"]) is str  # and not NumPy's
    assert records(sources.find(several, "test")) == records(sources.find(several, usual="test")) == ROWS[:1]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="several: expected one of the splits train, test; found 'dev'"):
        sources.find(several, "dev")
    own_cache.DatasetDict(train=table(ROWS)).save_to_disk(tmp_path / "single")
    assert records(sources.find(tmp_path / "single", usual="test")) == ROWS  # the only split, where none is asked for
    with pytest.raises(ValueError, match="single: expected one of the splits train; found 'test'"):
        sources.find(tmp_path / "single", "test")
    with pytest.raises(
        ValueError, match="one: expected no split, because save_to_disk wrote a single table; found 'dev'"
    ):
        sources.find(one, "dev")
    with pytest.raises(
        ValueError, match="one:main: expected no configuration in a folder of save_to_disk, found 'main'"
    ):
        sources.find(f"{one}:main")


def test_names_of_classes_are_kept(tmp_path, own_cache):
    rows = table([{"text": "x", "label": 1}]).cast_column("label", own_cache.ClassLabel(names=["no", "yes"]))
    rows.to_parquet(tmp_path / "rows.parquet")
    assert sources.find(tmp_path / "rows.parquet").class_names == {"label": ["no", "yes"]}


def test_the_hub_is_asked_for_names_only(tmp_path, monkeypatch, own_cache):
    asked = []

    def load_dataset(path, config=None, split=None):
        asked.append((path, config, split))
        return table(ROWS) if split else own_cache.DatasetDict(train=table(ROWS))

    monkeypatch.setattr(own_cache, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("gone.jsonl", "sub/gone.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"data: expected a JSONL file, found nothing at {path}"):
            sources.find(path)
    for path in ["gone", "gone.parquet", "./gone/set", "../set", "/gone/set", "folder/set", "a/b/c", "own/rows.csv"]:
        with pytest.raises(FileNotFoundError, match=f"data: expected a file, a folder, or .*found nothing at {path}"):
            sources.find(path)
    with pytest.raises(FileNotFoundError, match="data: expected a file, a folder, or .*; found ''"):
        sources.find("")
    assert asked == []
    found = sources.find("openai/gsm8k:main", None)
    assert records(found) == ROWS
    assert found.name == "openai/gsm8k:main, split train"
    sources.find("meta-math/MetaMathQA", "train[:2]")
    assert asked == [("openai/gsm8k", "main", None), ("meta-math/MetaMathQA", None, "train[:2]")]


def test_a_hub_that_cannot_be_reached():
    message = (
        "nobody/nothing:main: Couldn't reach .*; expected a file, a folder of data files, or a data set of the hub that"
    )
    with pytest.raises(ValueError, match=message):
        sources.find("nobody/nothing:main")


def test_files_of_text_are_read_without_datasets_and_others_give_the_command(tmp_path):
    write(tmp_path / "rows.parquet", ROWS)
    code = "import sys\n"
    code += "class Hide:\n    def find_spec(self, name, path=None, target=None):\n"
    code += "        if name == 'datasets': raise ModuleNotFoundError(name, name=name)\n"
    code += "sys.meta_path.insert(0, Hide())\nfrom balora import sources\n"
    for suffix in ("jsonl", "json", "csv"):
        code += f"assert len(list(sources.find({str(write(tmp_path / f'rows.{suffix}', ROWS))!r}))) == 5\n"
    code += f"sources.find({str(tmp_path / 'rows.parquet')!r})\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "rows.parquet needs datasets, which is not installed: pip install datasets" in result.stderr


def test_the_nulls_that_a_table_adds_to_its_objects_are_taken_away(tmp_path):
    calls = [{"function": {"name": n, "arguments": a}} for n, a in (("add", {"x": [1, None]}), ("look", {"at": "b"}))]
    rows = [{"calls": calls, "note": "n"}, {"calls": calls[:1], "note": None}]
    assert records(sources.find(write(tmp_path / "rows.parquet", rows))) == rows


def test_rows_of_a_table_are_checked_where_they_stand(tmp_path):
    write(tmp_path / "rows.parquet", [*ROWS, {"question": "q", "answer": None}])
    rows = data.read(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet, row 6, column 'answer': expected a text .*; found None"):
        list(rows)
