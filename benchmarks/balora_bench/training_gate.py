"""Whether balora's figures may be shown: its terms against the published method's, and against the reference's.

balora shows no figure unless each of its terms, unweighted, follows the published method's in every step (TOLERANCES)
and its loss is the weighted sum of them. The KL is 0 at the start and is compared where training takes it. The
published sketch misses a part of the singular values (SKETCH_MISSES), so the SVD term of all tokens of a step is also
held against an exact one, with the weights of the end. There the terms of 64 tokens are held against
``balora.reference`` (AT_THE_END), which a KL too small for the other comparison does not pass unless it is right (from
2e-6 nats on). Where the published method has no losses this is the gate, and the table says so.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .training_methods import CHECKED, PARTS, TERMS, weighted

# How far balora's terms may be from the published method's in a step, relative; loss: from the sum of its own terms.
# Found in 6 steps of stories15M, 4 × 250 tokens: ce 0.1 %, consistency 3.8 %, diversity 0.2 %, svd 0.1 %; in bfloat16
# ce 0.3 %, diversity 0.3 %, svd 0.3 %. The sketch of torch.svd_lowrank alone may be off by 2 %, as it is drawn.
TOLERANCES = {
    "float32": {"ce": 0.01, "consistency": 0.2, "diversity": 0.02, "svd": 0.05, "loss": 1e-5},
    "bfloat16": {"ce": 0.015, "consistency": 0.2, "diversity": 0.02, "svd": 0.05, "loss": 1e-5},
}
# What the published sketch (q = 15, 2 iterations) may miss of Σσ, relative to balora's, which is held against an exact
# one (AT_THE_END). A sketch never finds more than there is, and of the nearly flat spectrum of random weights less.
# Found: 2.1 % on stories15M; of random LLaMA shapes 5.2 to 5.6 % (N 1020, V 64,000), 5.6 to 6.3 % (N 2044, V 32,000),
# where balora is within 0.05 % of exact; of random matrices 7.2 to 9.1 % (side 500 to 1500), more the larger they are.
SKETCH_MISSES = 0.15
# Nats: of a smaller KL the distance is taken relative to this. In bfloat16 peft's PiSSA rounds W_res, so that the
# published student starts 1.4e-3 from its teacher, and stays up to 4e-3 apart from balora's.
LEAST = {"float32": 1e-3, "bfloat16": 0.1}
# The same against balora.reference, whose float32 logits are those of the same weights: what the KL of half precision
# inputs may be off, and the sketches of the SVD term in half precision. The SVD term of all tokens of a step is held to
# the same bound, against the eigenvalues of ZZᵀ in float64.
AT_THE_END = {"ce": 0.01, "consistency": 0.02, "diversity": 0.01, "svd": 0.02}
LEAST_AT_THE_END = 1e-4  # nats
FIGURES = ("seconds", "spread", "peak_GB", "TFLOP", "floor", *PARTS, "device_seconds")


def gated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """balora's row without figures where its terms leave what they are held against (they stay, as ``refused_…``);
    ratios to PiSSA in all."""
    by_method = {row["method"]: row for row in rows if "seconds" in row}
    ours, published, pissa = (by_method.get(name) for name in ("balora", "published", "pissa"))
    if ours:
        if wrong := away(ours, published):
            for key in [key for key in FIGURES if key in ours]:
                ours[f"refused_{key}"] = ours.pop(key)
            words = (f"{name} {value:.1%} from {whose} (allowed {most:.1%})" for name, value, most, whose in wrong)
            ours["note"] = "; ".join(filter(None, (f"away: {', '.join(words)}", ours.get("unchecked"))))
        elif not published:
            ours["note"] = f"held against balora.reference on {CHECKED} tokens: the published method has no losses"
    for row in rows:
        if pissa and "seconds" in row:
            for ratio, key in (("x_seconds", "seconds"), ("x_peak", "peak_GB"), ("x_TFLOP", "TFLOP")):
                if row[key] and pissa[key]:
                    row[ratio] = row[key] / pissa[key]
    return rows


def away(ours: dict[str, Any], published: dict[str, Any] | None) -> list[tuple[str, float, float, str]]:
    """The terms of balora that are too far from one of what they are held against: how far, what is allowed, from what.

    The row gets the distances.
    """
    reference, exact = (tuple(ours[key] or ({}, {})) for key in ("reference", "exact"))
    allowed = TOLERANCES[ours["dtype"]]
    least = {"consistency": LEAST[ours["dtype"]]}
    if published:
        other, pairs = "the published method's", list(zip(ours["terms"], published["terms"], strict=True))
    else:
        other, pairs = "balora.reference's", [reference]
    near = {name: apart(pairs, name, least.get(name, 1e-6)) for name in TERMS}
    # Where the sketch finds less than balora (a negative term nearer 0), it is what is missed, of balora's.
    sketched = [(a, b) for a, b in pairs if published and b.get("svd", math.nan) > a.get("svd", math.nan)]
    near["svd"] = apart([pair for pair in pairs if pair not in sketched], "svd")
    missed = apart([(b, a) for a, b in sketched], "svd")
    sums = [weighted(dict.fromkeys(TERMS, math.nan) | terms) for terms in ours["terms"]]
    near["loss"] = apart([({"": a}, {"": b}) for a, b in zip(ours["losses"], sums, strict=True)], "")
    at_the_end = {name: apart([reference], name, LEAST_AT_THE_END) for name in TERMS}
    of_all = apart([exact], "svd")
    ours |= {"apart": near, "at_the_end": at_the_end, "svd_of_all": of_all}
    ours["kl"] = max(terms.get("consistency", math.nan) for terms in ours["terms"])
    found = [(name, value, allowed[name], other) for name, value in near.items()]
    found += [(name, value, AT_THE_END[name], "balora.reference's") for name, value in at_the_end.items()]
    found += [("svd", missed, SKETCH_MISSES, "the published method's sketch")]
    found += [("svd", of_all, AT_THE_END["svd"], "the exact one of a step's tokens")]
    near["svd"] = max(missed, near["svd"])
    # NaN, of a term that is none or not there, is not within any tolerance.
    return [one for one in found if not one[1] <= one[2]]


def apart(pairs: list[tuple[dict[str, float], dict[str, float]]], name: str, least: float = 1e-6) -> float:
    """The largest relative distance of a term, of the second value or ``least``; NaN: one is NaN or missing."""
    found = [(ours.get(name, math.nan), theirs.get(name, math.nan)) for ours, theirs in pairs]
    return torch.tensor([abs(a - b) / max(abs(b), least) for a, b in found] or [0.0]).max().item()
