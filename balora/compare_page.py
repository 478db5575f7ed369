"""The page of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = "compare.html"


def write_page(comparison: Any, found: Any) -> Path:
    return comparison.folder / PAGE
