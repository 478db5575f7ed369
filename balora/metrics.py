"""What a classifier, a regression or an encoder-decoder is evaluated by, on numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .checks import IGNORE_INDEX

_NAMED_CLASSES = 10  # with more classes than these, their recalls would drown the rest of a log

Metrics = Callable[[Any], dict[str, float]]  # of a transformers.EvalPrediction, as the Trainer calls it


def of_classes(names: Sequence[str], counts: Sequence[int]) -> Metrics:
    """The metrics of :func:`classification` by name, and the recall of each of up to 10 classes, as ``recall_NAME``.

    All are NaN where a logit is not finite: a diverged model has no classes, and argmax takes NaN for the largest.

    Args:
        names: of the classes, by number.
        counts: how many rows of the training data each class has; ``rare_class_recall`` is the recall of the class with
            the fewest, but at least one (the mean over the classes that tie).
    """
    least = min(count for count in counts if count)
    rare = [i for i, count in enumerate(counts) if count == least]

    def metrics(prediction: Any) -> dict[str, float]:
        logits = np.asarray(prediction.predictions)
        predicted = logits.argmax(-1)
        labels = np.asarray(prediction.label_ids)
        found = classification(predicted, labels)
        recall = recalls(predicted, labels, len(names))
        if not np.isnan(recall[rare]).all():
            found["rare_class_recall"] = float(np.nanmean(recall[rare]))
        if len(names) <= _NAMED_CLASSES:
            named = zip(names, recall.tolist(), strict=True)
            found |= {f"recall_{name}": value for name, value in named if value == value}
        return found if np.isfinite(logits).all() else dict.fromkeys(found, math.nan)

    return metrics


def of_numbers(prediction: Any) -> dict[str, float]:
    """The metrics of :func:`regression`, of predictions [N, 1] or [N]."""
    return regression(np.asarray(prediction.predictions).reshape(-1), np.asarray(prediction.label_ids).reshape(-1))


def of_texts(prediction: Any) -> dict[str, float]:
    """``exact_match``: the share of the rows whose every token is the most likely one after those before it.

    Greedy decoding writes exactly those targets, so nothing has to be generated. Predictions are token ids [N, S], the
    labels [N, S] are −100 where nothing is expected.
    """
    predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"exact_match": float(((predicted == labels) | (labels == IGNORE_INDEX)).all(-1).mean())}


def classification(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, macro_f1 and matthews of class numbers [N].

    ``macro_f1`` is the mean of 2·TP/(2·TP + FP + FN) over the classes that are predicted or true at least once;
    ``matthews`` the correlation coefficient for many classes (Gorodkin 2004, eq. 8), 0 where all rows have one class or
    are predicted to have it.
    """
    size = int(max(predicted.max(), labels.max())) + 1
    confusion = np.zeros((size, size))  # [true, predicted]
    np.add.at(confusion, (labels, predicted), 1)
    hits, true, guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    there = true + guessed > 0
    n = len(labels)
    spread = (n**2 - true @ true) * (n**2 - guessed @ guessed)
    return {
        "accuracy": float(hits.sum() / n),
        "macro_f1": float((2 * hits[there] / (true + guessed)[there]).mean()),
        "matthews": float((n * hits.sum() - true @ guessed) / np.sqrt(spread)) if spread > 0 else 0.0,
    }


def recalls(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The share of each class's rows that are predicted to be of it, [classes]; NaN for a class without rows."""
    rows = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    return np.where(rows > 0, hits / np.maximum(rows, 1), np.nan)


def regression(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """pearson, spearman (pearson of the ranks, ties at their mean) and mse of numbers [N]; 0 with a constant.

    All are NaN where a prediction is not finite.
    """
    if not np.isfinite(predicted).all():
        return dict.fromkeys(("pearson", "spearman", "mse"), math.nan)
    predicted, targets = predicted.astype(np.float64), targets.astype(np.float64)
    return {
        "pearson": _correlation(predicted, targets),
        "spearman": _correlation(_ranks(predicted), _ranks(targets)),
        "mse": float(((predicted - targets) ** 2).mean()),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if (a == a[0]).all() or (b == b[0]).all():
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[which]
