"""Which implementation runs. The only reader of the environment variable BALORA_IMPL."""

from __future__ import annotations

import os

IMPLEMENTATIONS = ("reference", "streaming", "triton")


def why_not(impl: str) -> list[str]:
    """The reasons why ``impl`` cannot run here; empty if it can."""
    if impl == "triton":
        return ["this version of balora has no Triton kernel for it"]
    return []


def choose(impl: str = "auto") -> str:
    """The implementation that runs for ``impl``.

    ``"auto"`` means what BALORA_IMPL names, or ``"streaming"`` where that is not set. A name never falls back.

    Raises:
        ValueError: the name is unknown, or that implementation cannot run here; the message has every reason.
    """
    asked, name = "impl", impl
    if name == "auto":
        asked, name = "the environment variable BALORA_IMPL", os.environ.get("BALORA_IMPL") or "streaming"
    if name not in IMPLEMENTATIONS:
        allowed = " or ".join(map(repr, ("auto", *IMPLEMENTATIONS) if asked == "impl" else IMPLEMENTATIONS))
        raise ValueError(f"{asked}: expected {allowed}, found {name!r}")
    reasons = why_not(name)
    if reasons:
        raise ValueError(f"{asked}: {name!r} cannot run here: {'; '.join(reasons)}")
    return name
