"""Files of a folder replaced all at once: after a crash at any instant it holds the old or the new.

A folder can't be exchanged for another in one step everywhere (it may be a mount point, a link, or
hold files of others), so the new files are made inside it:

1. They are written into `.incoming` and flushed to the disk. A crash leaves a folder that nobody
   reads and that the next replacement deletes; the old files are untouched.
2. `.incoming` is renamed to `.committed`. This one step makes the new files the valid ones.
3. The old files are deleted, then the new ones moved to their place. A crash leaves some of them in
   `.committed`, where `current_files` finds them, and the next replacement moves the rest. A reader
   that doesn't know `.committed` finds files missing, never old ones mixed with new ones.

One process at a time may replace files of a folder; any number may read meanwhile.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

INCOMING = ".incoming"
COMMITTED = ".committed"
MANIFEST = "manifest.json"  # names of the files that go when those of the folder come


def current_files(path: Path) -> dict[str, Path]:
    """Where each valid file of the folder lies, by name."""
    files = {entry.name: entry for entry in path.iterdir() if entry.is_file()}
    committed = path / COMMITTED
    if (committed / MANIFEST).is_file():
        for name in json.loads((committed / MANIFEST).read_text()):
            files.pop(name, None)
        files |= {entry.name: entry for entry in committed.iterdir() if entry.name != MANIFEST}
    return files


@contextmanager
def replace_files(path: Path, obsolete: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write new files into; when the block ends they take their place in `path`.

    With them go the files of `path` whose name is `obsolete`; all others stay. `path` is made if it
    isn't there. If the block raises, or the disk is full, `path` keeps what it held.

    Raises:
        OSError: if something can't be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    _put_in_place(path)
    incoming = path / INCOMING
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    try:
        yield incoming
        new = {entry.name for entry in incoming.iterdir()}
        old = [name for name in current_files(path) if obsolete(name) and name not in new]
        (incoming / MANIFEST).write_text(json.dumps(old))
        for entry in incoming.iterdir():
            flush(entry)
        flush(incoming)
        os.rename(incoming, path / COMMITTED)
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    flush(path)
    _put_in_place(path)


def _put_in_place(path: Path) -> None:
    """Finish a replacement that was committed; may be cut short and called again at any point."""
    committed = path / COMMITTED
    if not committed.is_dir():
        return
    manifest = committed / MANIFEST
    if manifest.is_file():
        pending = [entry.name for entry in committed.iterdir() if entry != manifest]
        for name in [*json.loads(manifest.read_text()), *pending]:
            (path / name).unlink(missing_ok=True)
        flush(path)
        for name in pending:
            os.replace(committed / name, path / name)
        flush(path)
        manifest.unlink()
    committed.rmdir()
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
