"""Token rows in flat arrays."""

import pytest

from balora.tokenized import Examples


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
