"""Checkpoints of a run: whole files under one folder, of which the last few are kept."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnlab.checks import expect
from attnlab.model.transaction import flush

PATTERN = "step-*.pt"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path` that then takes its place: `path` is old or new.

    Raises:
        OSError: if the file can't be written; what was at `path` before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(
            f"could not write {path}, what was there before is intact: {error}"
        ) from error


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> None:
    """Write the state after `step` steps, then remove all but the last `keep` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"step-{step:08d}.pt", lambda path: torch.save(state, path))
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the oldest first."""
    return sorted(folder.glob(PATTERN))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state of the latest checkpoint on the CPU; None if there is none.

    Raises:
        ValueError: if the file is damaged, or the checkpoints are folders, which a job writes.
    """
    sharded = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
    expected = f"checkpoints of one process in {folder}"
    expect(not sharded, expected, f"{sharded[-1:]} of a job: go on with torchrun")
    paths = list_checkpoints(folder)
    if not paths:
        return None
    try:
        return torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises nearly anything
        raise ValueError(
            f"expected a whole checkpoint, got {paths[-1]} ({error}); remove it to go on from the "
            f"one before"
        ) from None
