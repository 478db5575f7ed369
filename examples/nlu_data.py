"""Classification data as `balora train --task nlu` reads it: train.csv and test.csv, with the columns text and label.

    python examples/nlu_data.py cola DIR OUT       # train.tsv and dev.tsv of nyu-mll/CoLA-baselines
    python examples/nlu_data.py clinc150 FILE OUT  # data_imbalanced.json of clinc/oos-eval
    python examples/nlu_data.py davidson FILE OUT  # labeled_data.csv of t-davidson/hate-speech-and-offensive-language

Davidson's tweets come with the votes of their annotators. A tenth of them, of each class the same share and always the
same ones, are the test part, with the majority's label. `--votes one` gives each training row one of its votes, drawn
by `--seed`, which is how a single annotator would have labelled it. `--ratio 100:10:1` keeps `--rows` of the training
rows in that ratio of the classes, from the most to the least frequent one. The tweets are offensive by nature.
"""

import argparse
import csv
import json
import random
from collections import Counter
from pathlib import Path

TEST_SEED, TEST_SHARE = 0, 0.1
CLASSES = ("hate_speech", "offensive_language", "neither")  # by Davidson's number


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", choices=("cola", "clinc150", "davidson"))
    parser.add_argument("source", type=Path, help="the raw file, or the folder of CoLA's")
    parser.add_argument("out", type=Path, help="folder that train.csv and test.csv are written to")
    parser.add_argument("--votes", choices=("majority", "one"), default="majority", help="label of a training row")
    parser.add_argument("--ratio", help="of the classes in the training part, such as 100:10:1")
    parser.add_argument("--rows", type=int, default=4000, help="training rows with --ratio")
    parser.add_argument("--seed", type=int, default=0, help="of the votes and of the rows that --ratio keeps")
    asked = parser.parse_args(argv)
    if asked.data != "davidson" and (asked.votes != "majority" or asked.ratio):
        parser.error("--votes and --ratio are of davidson alone")
    if asked.data == "davidson":
        train, test = davidson(asked.source, asked.votes, asked.ratio, asked.rows, asked.seed)
    else:
        train, test = {"cola": cola, "clinc150": clinc150}[asked.data](asked.source)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        with open(asked.out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        print(f"{asked.out / name}.csv: {len(rows):,} rows; {Counter(label for _, label in rows).most_common(3)}")


def cola(folder):
    names = {"0": "unacceptable", "1": "acceptable"}
    parts = []
    for part in ("train", "dev"):
        lines = (folder / f"{part}.tsv").read_text(encoding="utf-8").splitlines()
        fields = [line.split("\t") for line in lines]  # source, label, the author's mark, sentence; nothing is quoted
        parts.append([(sentence, names[label]) for _, label, _, sentence in fields])
    return parts


def clinc150(file):
    parts = json.loads(file.read_text(encoding="utf-8"))
    return parts["train"], parts["test"]


def davidson(file, votes, ratio, rows, seed):
    with open(file, newline="", encoding="utf-8") as lines:
        found = list(csv.DictReader(lines))
    by_class = [[row for row in found if int(row["class"]) == i] for i in range(len(CLASSES))]
    test = []
    for i, of_class in enumerate(by_class):
        random.Random(TEST_SEED).shuffle(of_class)
        held_out = round(TEST_SHARE * len(of_class))
        test += [(row["tweet"], CLASSES[i]) for row in of_class[:held_out]]
        by_class[i] = of_class[held_out:]
    draw = random.Random(seed)
    if ratio:
        shares = [float(share) for share in ratio.split(":")]
        if len(shares) != len(by_class) or min(shares) <= 0:
            raise SystemExit(f"--ratio: expected {len(by_class)} numbers above 0, such as 100:10:1, found {ratio}")
        for of_class, share in zip(sorted(by_class, key=len, reverse=True), shares, strict=True):
            kept = round(rows * share / sum(shares))
            if not 1 <= kept <= len(of_class):
                raise SystemExit(f"--rows: expected a number that takes 1 to {len(of_class)} of a class, found {rows}")
            of_class[:] = draw.sample(of_class, kept)
    train = [(row["tweet"], _label(row, votes, draw)) for of_class in by_class for row in of_class]
    draw.shuffle(train)
    return train, test


def _label(row, votes, draw):
    if votes == "majority":
        return CLASSES[int(row["class"])]
    return draw.choices(CLASSES, weights=[int(row[name]) for name in CLASSES])[0]


if __name__ == "__main__":
    main()
