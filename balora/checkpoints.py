"""The checkpoints that the Trainer leaves in the folder of a run: which there are, and which it has finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, finished or not."""
    return sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)


def newest(folder: Path, complete: Callable[[Path], bool], say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that is complete; ``say`` is told of newer ones."""
    for path in newest_first(folder):
        if complete(path):
            return path
        say(f"{path} is incomplete (the run ended while it was written), looking further back")
    return None


def finished(path: Path) -> bool:
    """Whether the adapters are there and whole, and trainer_state.json, which the Trainer writes last."""
    try:
        for name in ("adapter_config.json", "trainer_state.json"):
            json.loads((path / name).read_text())
        with safe_open(path / WEIGHTS, framework="pt"):  # a file that was cut off does not open
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def resumable(path: Path) -> bool:
    """Whether a run can go on from it: finished, and with the optimizer's state."""
    # One process and DDP; FSDP; ZeRO, which has its scheduler in there.
    optimizer = (path / "optimizer.pt", path / "optimizer.bin", path / "latest")
    return finished(path) and any(file.is_file() for file in optimizer)


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
