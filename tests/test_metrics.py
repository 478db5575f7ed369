"""The metrics of classifiers, regressions and texts: by hand, and against scikit-learn and scipy where they are."""

from types import SimpleNamespace

import numpy as np
import pytest

from balora import metrics


def predictions(values, labels):
    return SimpleNamespace(predictions=np.array(values), label_ids=np.array(labels))


def test_classes_by_hand():
    logits = np.eye(3)[[0, 0, 0, 1, 0, 1]]
    found = metrics.of_classes(["a", "b", "c"], [6, 2, 2])(predictions(logits, [0, 0, 1, 1, 2, 1]))
    # a: 2 hits of 2 rows, 4 predictions; b: 2 of 3, 2; c: 0 of 1, none
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["macro_f1"] == pytest.approx((2 * 2 / 6 + 2 * 2 / 5 + 0) / 3)
    assert found["matthews"] == pytest.approx((6 * 4 - (2 * 4 + 3 * 2)) / np.sqrt((36 - 14) * (36 - 20)))
    recalls = {name: value for name, value in found.items() if "recall" in name}
    assert recalls == pytest.approx({"recall_a": 1, "recall_b": 2 / 3, "recall_c": 0, "rare_class_recall": 1 / 3})


def test_classes_without_rows_and_many_classes():
    one = predictions(np.eye(2)[[0, 0]], [0, 0])
    found = metrics.of_classes(["a", "b"], [9, 1])(one)
    assert found == {"accuracy": 1.0, "macro_f1": 1.0, "matthews": 0.0, "recall_a": 1.0}  # no row of the rare class
    assert metrics.of_classes(["a", "b"], [9, 0])(one)["rare_class_recall"] == 1.0  # in training there is none of b
    many = predictions(np.eye(11), range(11))
    assert set(metrics.of_classes(list("abcdefghijk"), [1] * 11)(many)) == {
        "accuracy",
        "macro_f1",
        "matthews",
        "rare_class_recall",
    }


@pytest.mark.parametrize("seed", range(3))
def test_classes_as_scikit_learn_has_them(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    g = np.random.default_rng(seed)
    labels = g.choice(6, 200, p=[0.6, 0.2, 0.1, 0.05, 0.05, 0.0])
    logits = g.normal(size=(200, 6)) + 2 * np.eye(6)[labels]
    logits[:, 4] = -99  # never predicted
    guesses = logits.argmax(1)
    counts = [60, 20, 10, 5, 5, 0]
    found = metrics.of_classes(list("abcdef"), counts)(predictions(logits, labels))
    each = sklearn.recall_score(labels, guesses, average=None, labels=range(5), zero_division=0)
    expected = {f"recall_{name}": value for name, value in zip("abcde", each, strict=True)}
    expected |= {
        "accuracy": sklearn.accuracy_score(labels, guesses),
        "macro_f1": sklearn.f1_score(labels, guesses, average="macro", zero_division=0),
        "matthews": sklearn.matthews_corrcoef(labels, guesses),
        "rare_class_recall": each[3:].mean(),
    }
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_diverged_has_no_metrics(bad):
    logits = np.eye(2)[[0, 1, 0]]
    measure = metrics.of_classes(["a", "b"], [2, 1])
    names = set(measure(predictions(logits, [0, 1, 0])))
    logits[2] = bad
    found = measure(predictions(logits, [0, 1, 0]))
    assert set(found) == names
    assert np.isnan(list(found.values())).all()
    found = metrics.of_numbers(predictions([[1.0], [bad], [3.0]], [1.0, 2.0, 3.0]))
    assert set(found) == {"pearson", "spearman", "mse"}
    assert np.isnan(list(found.values())).all()


def test_numbers():
    found = metrics.of_numbers(predictions([[1.0], [2.0], [2.0], [9.0]], [1.0, 3.0, 2.0, 4.0]))
    assert found["mse"] == pytest.approx((0 + 1 + 0 + 25) / 4)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 2, 9], [1, 3, 2, 4])[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    constant = metrics.of_numbers(predictions([0.1, 0.1, 0.1], [1.0, 2.0, 4.0]))
    assert (constant["pearson"], constant["spearman"]) == (0, 0)


def test_numbers_as_scipy_has_them():
    stats = pytest.importorskip("scipy.stats")
    g = np.random.default_rng(0)
    targets = g.integers(0, 6, 300) / 2  # with ties
    guesses = (targets + g.normal(size=300)).round(1).astype(np.float32)
    found = metrics.of_numbers(predictions(guesses[:, None], targets))
    assert found["pearson"] == pytest.approx(stats.pearsonr(guesses.astype(float), targets).statistic, rel=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(guesses, targets).statistic, rel=1e-12)


def test_texts_match_where_every_token_does():
    guesses = [[5, 6, 7], [5, 6, 7], [5, 6, -100], [1, 6, 7]]
    labels = [[5, 6, 7], [5, 6, -100], [5, 6, 7], [5, 6, 7]]
    assert metrics.of_texts(predictions(guesses, labels)) == {"exact_match": 0.5}
