"""Rows of measurements on disk: one JSON object a line, appended so that a killed run loses none.

The fields are described in results/README.md.
"""

import datetime
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured: the fields that, with the fingerprint of the sources, make a row's key."""

    suite: str
    op: str
    backend: str
    pass_: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    head_dim: int
    value_dim: int
    dtype: str
    device: str
    layer: str | None  # whose slopes an op has; a model has those of all its layers
    precision: str
    input: str
    model: str | None = None
    ranks: int | None = None  # that share the sequence; a point of one process has no such field

    def fields(self) -> Row:
        """The point's fields under the names they have in a row."""
        found = {name.rstrip("_"): value for name, value in asdict(self).items()}
        if self.ranks is None:
            del found["ranks"]
        return found

    def key(self, fingerprint: str) -> str:
        """Identity of the point, given the sources that it runs."""
        text = json.dumps([self.fields(), fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the rows of one run come from: its name, its commit, the versions that it ran on."""

    run_id: str
    commit: str | None
    versions: Row

    def row(
        self,
        point: Point,
        fingerprint: str,
        outcome: Row,
        *,
        pred_ms: float | None = None,
        pred_bytes: int | None = None,
    ) -> Row:
        """Whole row of a point, from what was found (or why nothing was) and what was predicted."""
        base = {
            "schema": SCHEMA,
            "run_id": self.run_id,
            "key": point.key(fingerprint),
            "fingerprint": fingerprint,
            **point.fields(),
            "commit": self.commit,
            "versions": self.versions,
            "pred_ms": pred_ms,
            "pred_bytes": pred_bytes,
        }
        return base | outcome | {"ts_utc": now_utc()}


def git_commit() -> str | None:
    """Commit of the tree, `-dirty` if it differs from it; None outside a repository."""

    def git(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def now_utc() -> str:
    """Time of day in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append_row(path: Path, *rows: Row) -> None:
    """Add one row, or those of one unit, and see them to the disk before returning."""
    lines = [json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def mend_last_line(path: Path) -> None:
    """Cut off a last line that a killed run left without its end."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        _notice(path)
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def load_rows(path: Path) -> list[Row]:
    """Rows of a file, of several with one key the last, in the order of first appearance.

    A half-written last line is dropped with a notice on stderr.

    Raises:
        ValueError: if the file can't be read, or any other line is not a row.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ValueError(
            f"expected a readable results file, got {path}: {error.strerror}"
        ) from None
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):  # no newline after it
                _notice(path)
                break
            raise ValueError(
                f"expected a JSON row in {path}, got line {number}: {line[:60]!r}"
            ) from None
        if not isinstance(row, dict) or not {"key", "status", "op"} <= row.keys():
            raise ValueError(
                f"expected a row with key, status and op in {path}, got line {number}: {line[:60]!r}"
            )
        rows[row["key"]] = row
    return list(rows.values())


def write_json(path: Path, content: Row) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _notice(path: Path) -> None:
    print(f"notice: dropped a half-written last line of {path}", file=sys.stderr)
