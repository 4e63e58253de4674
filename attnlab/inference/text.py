"""Text from token ids that come one by one."""

from collections.abc import Callable, Sequence

_KEPT = 8  # ids decoded again with each new one: decoders join neighbours
_LONGEST_PART = 3  # bytes of a character in UTF-8 that may be there before its last one


class TextStream:
    """Pieces of text that, put together, are the text of all ids after `context`.

    A token may end within a character. What decodes to U+FFFD at the end is held back until the
    next ids show whether it is the beginning of a character or no text at all.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """Go on behind `context`, whose text is known; `decode` gives the text of ids."""
        self._decode = decode
        self._begin(context)

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        held = min(len(text) - len(text.rstrip("\ufffd")), _LONGEST_PART)
        piece = text[self._shown : len(text) - held]
        self._shown += len(piece)
        if len(self._ids) > 2 * _KEPT:
            self._begin(self._ids, held)
        return piece

    def close(self) -> str:
        """What is still held back."""
        return self._decode(self._ids)[self._shown :]

    def _begin(self, ids: Sequence[int], held: int = 0) -> None:
        self._ids = list(ids[-_KEPT:])
        self._shown = len(self._decode(self._ids)) - held
