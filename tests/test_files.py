"""A file is there whole or not at all."""

import pytest

from balora import files


def test_an_error_leaves_the_file_before_and_nothing_beside_it(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    files.write(path, "before")
    with pytest.raises(UnicodeEncodeError):
        files.write(path, "\ud800")
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]
    assert path.read_text() == "before"
    files.write(path, "after")
    assert path.read_text() == "after"
