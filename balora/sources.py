"""Data sets as records: JSONL, JSON, CSV, TSV; Parquet, folders and the hub through Hugging Face's datasets."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = tuple[str, dict[str, Any]]  # where the row stands, for errors, and its columns

_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zip")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SEPARATORS = {",": "commas", "\t": "tabs"}


class _Number(float):
    """A number of JSON that is no whole one, as it was written: 4.10 as a text is not 4.1."""

    def __new__(cls, written: str) -> _Number:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str


@dataclass(frozen=True)
class Source:
    """The rows of a data set, read anew each time they are gone through."""

    name: str
    read: Callable[[], Iterator[Record]]
    total: int | None = None  # number of rows, where it is known before reading
    class_names: dict[str, list[str]] = field(default_factory=dict)  # of the columns that are a datasets.ClassLabel

    def __iter__(self) -> Iterator[Record]:
        empty = True
        for record in self.read():
            empty = False
            yield record
        if empty:
            raise ValueError(f"{self.name}: expected at least one row, found none")


def find(source: str | Path, split: str | None = None, usual: str = "train") -> Source:
    """The data set that ``source`` names: a file, a folder of data files or of ``datasets.save_to_disk``, or
    ``owner/name`` of Hugging Face's hub. A folder and a name may be followed by ``:config``.

    ``split`` is a name or a slice (``"train[:1000]"``) of folders and hub data sets; without it they give the split
    ``usual``, or the only one that they have. A single file has no splits. What is there on disk is never asked of the
    hub, nor is what looks like a path.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: the splits, the configuration or the files do not fit, or the hub cannot be reached.
        ImportError: the package datasets is needed and missing.
    """
    name, config = str(source), None
    path = Path(name)
    if not name:  # Path("") is the folder that one is in
        raise FileNotFoundError("data: expected a file, a folder, or owner/name of a data set on the hub; found ''")
    if path.is_file():
        if split is not None:
            raise ValueError(f"{path}: expected no split, because a single file has none; found {split!r}")
        return _file(path)
    base = name
    if not path.is_dir() and ":" in name:
        base, _, config = name.rpartition(":")
        path = Path(base)
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _saved(name, path, config, split, usual)
    if path.is_dir():
        return _loaded(name, base, config, split, usual)
    if path.suffix.lower() == ".jsonl":
        raise FileNotFoundError(f"data: expected a JSONL file, found nothing at {path}")
    if not _HUB_NAME.fullmatch(base) or path.suffix.lower() in _FILES or path.parent.is_dir():
        raise FileNotFoundError(
            f"data: expected a file, a folder, or owner/name of a data set on the hub; found nothing at {source}"
        )
    return _loaded(name, base, config, split, usual)


def located(source: str) -> str:
    """The name of the same data set from any folder: an absolute path if it is on disk, else the name as it is."""
    base, _, config = source.rpartition(":")
    if os.path.exists(source):
        return os.path.abspath(source)
    return f"{os.path.abspath(base)}:{config}" if base and os.path.exists(base) else source


def not_loaded(model: str, error: Exception) -> str:
    """Why a model could not be loaded: a path where nothing is, Hugging Face takes for a malformed name of the hub."""
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return "found nothing there" if is_path and not os.path.exists(model) else str(error)


def jsonl(path: Path, expected: str = "a JSON object") -> Iterator[Record]:
    """The objects of a file with one JSON object a line; empty lines are passed over. ``expected``: for errors."""
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if line.strip():
            yield where, _object(_json(line, where, expected), where)


def _file(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        files = {"train": str(path)}
        return _table(str(path), _call_datasets(str(path), "load_dataset", suffix[1:], data_files=files, split="train"))
    if suffix in (".csv", ".tsv"):
        return Source(str(path), lambda: _csv(path, "\t" if suffix == ".tsv" else ","))
    if suffix != ".json":
        return Source(str(path), lambda: jsonl(path))
    expected = "a list of JSON objects, or one on each line"
    if not _starts_a_list(path):
        return Source(str(path), lambda: jsonl(path, expected))
    rows = _json("".join(line for _, line in _lines(path)), str(path), expected)
    return Source(str(path), lambda: _objects(rows, path), len(rows))


def _starts_a_list(path: Path) -> bool:
    for _, line in _lines(path):
        if line.strip():
            return line.lstrip().startswith("[")
    return False


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, which end at line feeds only: JSON texts may hold the other separators of Unicode."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            yield number, _decoded(raw, "utf-8-sig" if number == 1 else "utf-8", f"{path}, line {number}")


def _decoded(raw: bytes, encoding: str, where: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected UTF-8 text, found the byte {raw[error.start]:#x}") from None


def _objects(rows: list[Any], path: Path) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _object(row, where)


def _json(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text, parse_float=_Number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected {expected}, found {short(text)} ({error})") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {short(value)}")
    return value


def _csv(path: Path, delimiter: str) -> Iterator[Record]:
    """Every field as the text that it is: a reader that guesses types would turn "NA" into nothing and "007" into 7."""
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1  # of the row, which may go over several lines
    limit = csv.field_size_limit(2**31 - 1)  # of the process; 128 KiB by default, and texts are longer
    try:
        for fields in reader:
            where = f"{path}, line {start}"
            start = reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                other = next((c for c in ";\t|," if c != delimiter and c in header[0]), None)
                if len(header) == 1 and other:
                    raise ValueError(
                        f"{where}: expected the columns' names between {_SEPARATORS[delimiter]}, found 1 field, "
                        f"{short(header[0])}; is {other!r} what separates the fields of this file?"
                    )
                if len(set(header)) < len(header):
                    raise ValueError(
                        f"{where}: expected the columns' names, each once, in the first line; found {short(fields)}"
                    )
            elif len(fields) != len(header):
                expected = "1 field" if len(header) == 1 else f"{len(header)} fields"
                raise ValueError(f"{where}: expected {expected}, as in the first line; found {len(fields)}")
            else:
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {start}: expected quotes in pairs, and doubled inside others; {error}"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _saved(name: str, path: Path, config: str | None, split: str | None, usual: str) -> Source:
    if config is not None:
        raise ValueError(f"{name}: expected no configuration in a folder of save_to_disk, found {config!r}")
    found = _call_datasets(name, "load_from_disk", str(path))
    if isinstance(found, dict):
        return _split(name, found, split or usual, split is not None)
    if split is not None:
        raise ValueError(f"{name}: expected no split, because save_to_disk wrote a single table; found {split!r}")
    return _table(name, found)


def _loaded(name: str, path: str, config: str | None, split: str | None, usual: str) -> Source:
    if split is None:
        return _split(name, _call_datasets(name, "load_dataset", path, config), usual)
    name = f"{name}, split {split}"
    return _table(name, _call_datasets(name, "load_dataset", path, config, split=split))


def _call_datasets(name: str, function: str, *arguments: Any, **options: Any) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError(
            f"data: {name} needs {error.name}, which is not installed: pip install {error.name}"
        ) from error
    try:
        return getattr(datasets, function)(*arguments, **options)
    except Exception as error:  # datasets, pyarrow and huggingface_hub raise types of their own
        hint = ""
        if isinstance(error, OSError):
            hint = (
                "; expected a file, a folder of data files, or a data set of the hub that is cached or can be reached"
            )
        raise ValueError(f"{name}: {error}{hint}") from error


def _split(name: str, found: dict[str, Any], wanted: str, asked: bool = False) -> Source:
    """``asked``: the user named the split, so that another one will not do even where it is the only one."""
    if len(found) == 1 and not asked:
        [wanted] = found
    if wanted not in found:
        raise ValueError(f"{name}: expected one of the splits {', '.join(found)}; found {wanted!r}")
    return _table(f"{name}, split {wanted}", found[wanted])


def _table(name: str, table: Any) -> Source:
    table = table.with_format(None)

    def read() -> Iterator[Record]:
        number = 0
        for batch in table.iter(batch_size=1000):  # of a file that is mapped into memory
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{name}, row {number}", dict(zip(batch, map(_without_nulls, values), strict=True))

    # A ClassLabel is known by its names: its class is not imported here.
    names = {n: list(f.names) for n, f in table.features.items() if hasattr(f, "names")}
    return Source(name, read, len(table), names)


def _without_nulls(value: Any) -> Any:
    """The value without the nulls of its objects, at any depth.

    A table gives each object (a message, the arguments of a tool call) the keys of all the others, as nulls.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def text_of(value: Any, where: str) -> str:
    """``value``, if it is a text that is not blank and that UTF-8 can hold, or a number, as it was written; ValueError
    otherwise.
    """
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return value.written if isinstance(value, _Number) else str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: expected a text that is not empty, or a number; found {short(value)}")
    check_unicode(value, where)
    return value


def check_unicode(text: str, where: str) -> None:
    """Raise ValueError if the text holds half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected Unicode text, found half a surrogate pair, {text[error.start]!r}"
        ) from None


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
