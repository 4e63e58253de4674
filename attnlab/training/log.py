"""The log of a run: one JSON object a line, appended and flushed, each step once.

A line has "event": "step" with the fields of one optimiser step, or "validation" with the loss
after so many steps. What a killed run had logged past its last checkpoint is done again and logged
again, so the lines after that checkpoint are cut off when a run is resumed.
"""

import json
import os
from pathlib import Path
from typing import Any

from attnlab.training.checkpoints import write_atomically

Record = dict[str, Any]


class RunLog:
    """The log, open for appending after `step` steps."""

    def __init__(self, path: Path | None, *, step: int) -> None:
        """Keep the lines up to `step`, and open the file; without a path nothing is written."""
        path = Path(os.devnull) if path is None else path
        if path.is_file():
            kept = [line for line in read_log(path) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(path, lambda partial: partial.write_text(text))
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: list[Record]) -> None:
        """Append records and hand them to the system."""
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[Record]:
    """Records of a log; a last line that a killed run left unfinished is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
