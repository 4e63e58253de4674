"""Text from token ids that come one by one."""

from collections.abc import Callable, Sequence

_LONGEST = 4  # bytes of a character in UTF-8


class TextStream:
    """Pieces of text that, put together, are the text of all ids after `context`.

    A token may end within a character. What decodes to U+FFFD at the end is held back until the
    next ids show whether it begins a character or is no text at all.

    Each id is decoded with the whole group of characters before it, since decoders treat an id by
    its neighbours: at the start of a text some drop a space, and some give up a run of bytes of
    which the first is missing.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """Go on behind `context`, whose text is known; `decode` gives the text of ids."""
        self._decode = decode
        self._begin(list(context))

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be none."""
        self._new.append(token)
        text = self._decode(self._before + self._new)
        held = 0
        if text.endswith("\ufffd"):
            if len(self._new) < _LONGEST:
                return ""
            held = min(len(text) - len(text.rstrip("\ufffd")), _LONGEST - 1)
        piece = text[self._shown : len(text) - held]
        self._shown += len(piece)
        if piece and not held:
            self._begin(self._new)
        return piece

    def close(self) -> str:
        """What is still held back."""
        return self._decode(self._before + self._new)[self._shown :]

    def _begin(self, before: list[int]) -> None:
        self._before, self._new = before, list[int]()
        self._shown = len(self._decode(before))
