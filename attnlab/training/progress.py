"""How a run is doing, on stderr: a bar of rich on a terminal, else plain lines."""

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Context that shows steps, loss and tokens a second."""

    def __init__(self, *, step: int, steps: int, quiet: bool = False) -> None:
        """A run of `steps` steps, `step` of which are done; `quiet` shows nothing."""
        self.steps, self.quiet, self._bar, self._last_line = steps, quiet, None, 0.0
        if sys.stderr.isatty() and not quiet:
            self._bar = _rich_bar()
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=steps, completed=step, note="")

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_s: float) -> None:
        """Show a step; as a line of text only if the last one is some seconds old."""
        note = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif step == self.steps or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self.steps}  {note}")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    """The bar, not yet shown; None without rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return RichProgress(*columns, console=Console(stderr=True))
