"""examples/nlu_data.py on small files of the same form."""

import csv
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

from balora import classification

main = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "nlu_data.py"))["main"]


def made(folder):
    return [[(row.text, data.names[row.label]) for row in data.rows] for data in parts(folder)]


def parts(folder):
    train = classification.read(folder / "train.csv")
    return train, classification.read(folder / "test.csv", training=train)


def test_cola(tmp_path):
    (tmp_path / "train.tsv").write_text('gj04\t1\t\tA "quoted one.\nks08\t0\t*\tNot one this.\n')
    (tmp_path / "dev.tsv").write_text("gj04\t1\t\tYes.\n")
    main(["cola", str(tmp_path), str(tmp_path / "out")])
    train = [('A "quoted one.', "acceptable"), ("Not one this.", "unacceptable")]
    assert made(tmp_path / "out") == [train, [("Yes.", "acceptable")]]


def test_clinc150(tmp_path):
    rows = {"train": [["a, b", "x"], ["c", "y"]], "test": [["d", "y"]], "oos_train": [["e", "oos"]]}
    (tmp_path / "file.json").write_text(json.dumps(rows))
    main(["clinc150", str(tmp_path / "file.json"), str(tmp_path / "out")])
    assert made(tmp_path / "out") == [[("a, b", "x"), ("c", "y")], [("d", "y")]]


@pytest.fixture
def davidson(tmp_path):
    """200 rows of class 1, 60 of class 2, 40 of class 0; 2 of 3 votes are of the class, 1 of the next one."""
    names = ["hate_speech", "offensive_language", "neither"]
    with open(tmp_path / "file.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["", "count", *names, "class", "tweet"])
        rows.writeheader()
        for i, number in enumerate([1] * 200 + [2] * 60 + [0] * 40):
            votes = dict(zip(names, [0, 0, 0], strict=True)) | {names[number]: 2, names[(number + 1) % 3]: 1}
            rows.writerow({"": i, "count": 3, **votes, "class": number, "tweet": f"row {i},\nof {number}"})

    def run(*argv):
        main(["davidson", str(tmp_path / "file.csv"), str(tmp_path / "out"), *argv])
        return made(tmp_path / "out")

    return run


def test_davidsons_majority(davidson):
    train, test = davidson()
    assert Counter(label for _, label in test) == {"offensive_language": 20, "neither": 6, "hate_speech": 4}
    assert len({text for text, _ in train + test}) == 300
    names = ["hate_speech", "offensive_language", "neither"]
    assert all(label == names[int(text[-1])] for text, label in train + test)


def test_davidsons_votes_are_drawn_and_the_test_part_is_fixed(davidson):
    majority, test = davidson()
    one, test_of_one = davidson("--votes", "one", "--seed", "3")
    another, test_of_another = davidson("--votes", "one", "--seed", "4")
    assert davidson("--votes", "one", "--seed", "3") == [one, test_of_one]
    assert test == test_of_one == test_of_another
    assert dict(one) != dict(another)
    assert dict(one).keys() == dict(majority).keys()
    wrong = sum(label != dict(majority)[text] for text, label in one) / len(one)
    assert 0.2 < wrong < 0.45  # a third of the votes


def test_davidsons_ratio(davidson):
    train, test = davidson("--ratio", "20:2:1", "--rows", "115")
    assert Counter(label for _, label in train) == {"offensive_language": 100, "neither": 10, "hate_speech": 5}
    assert len(test) == 30
    assert dict(davidson("--ratio", "20:2:1", "--rows", "115", "--seed", "1")[0]) != dict(train)
    with pytest.raises(SystemExit, match="--rows: expected a number that takes 1 to 180 of a class, found 9000"):
        davidson("--ratio", "20:2:1", "--rows", "9000")
    with pytest.raises(SystemExit, match="--ratio: expected 3 numbers above 0, such as 100:10:1, found 1:2"):
        davidson("--ratio", "1:2")


def test_options_of_davidson_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["cola", "x", "y", "--votes", "one"])
    assert "--votes and --ratio are of davidson alone" in capsys.readouterr().err
