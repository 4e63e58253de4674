"""Corpora: the documents of files and folders in one array of token ids, split by document.

A file is a document. The end-of-text token that follows every document is not stored:
`Corpus.window` adds it, so that a corpus of bytes takes one byte a token.
"""

import hashlib
import math
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attnlab.training.tokenizer import Tokenizer

HASH_RANGE = 2**64
# Bytes in which a zero marks a file of a folder as binary, as git does it; such a file is left out.
BINARY_PROBE = 8000


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that lie in one array of ids.

    tokens: ids in the tokenizer's dtype, possibly on disk; selections of documents share it.
    starts, stops: `[documents]` int64; document i is tokens[starts[i]:stops[i]], never empty.
    sizes: `[documents]` int64, bytes of text that each document was.
    eos_token_id: the token that follows the last one of each document.
    """

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    sizes: np.ndarray
    eos_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Targets of each document, int64: every token but the first, and the end of text."""
        return self.stops - self.starts

    @property
    def num_targets(self) -> int:
        """Targets of all documents."""
        return int(self.lengths.sum())

    @property
    def bits_per_byte_of_a_nat(self) -> float:
        """What turns a mean loss in nats a target into bits per byte of text."""
        return self.num_targets / int(self.sizes.sum()) / math.log(2)

    def window(self, document: int, start: int, num_inputs: int) -> np.ndarray:
        """`num_inputs` tokens of a document and the one that follows them, int64."""
        first, stop = int(self.starts[document]) + start, int(self.stops[document])
        ids = self.tokens[first : min(first + num_inputs + 1, stop)].astype(np.int64)
        return ids if len(ids) > num_inputs else np.append(ids, self.eos_token_id)

    def select(self, documents: np.ndarray) -> "Corpus":
        """The corpus of some documents: indices, or a mask."""
        return replace(
            self,
            starts=self.starts[documents],
            stops=self.stops[documents],
            sizes=self.sizes[documents],
        )

    def fingerprint(self) -> str:
        """Hash of the documents' ids, by which a resumed run knows its corpus."""
        digest = hashlib.sha256()
        for start, stop in zip(self.starts, self.stops, strict=True):
            digest.update(int(stop - start).to_bytes(8, "little"))
            digest.update(self.tokens[start:stop].tobytes())
        return digest.hexdigest()[:16]


def read_corpus(
    sources: Sequence[str], tokenizer: Tokenizer, *, validation_share: float
) -> tuple[Corpus, Corpus]:
    """Training and validation documents of files and folders, or else of Python's own library.

    The hash of its content puts a document on one side or the other: copies of a document stay
    together, and files that come or go move no other. Each side gets at least one document; of a
    corpus that is a single document the last part is for validation. Binary files in a folder are
    left out.

    Raises:
        ValueError: for a path that can't be read, or a corpus without text.
    """
    # The ids go to a file that has no name, so that a large corpus is never whole in memory.
    with tempfile.TemporaryFile() as file:
        lengths, sizes, hashes = [], [], []
        for text in _texts(sources):
            ids = tokenizer.encode_array(text)
            if len(ids):
                file.write(ids.data)
                lengths.append(len(ids))
                sizes.append(len(text))
                hashes.append(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
        if not lengths:
            raise ValueError(f"expected a corpus with text in it, got {', '.join(sources)}")
        file.flush()
        tokens = np.memmap(file, dtype=tokenizer.dtype, mode="r")
    stops = np.cumsum(lengths, dtype=np.int64)
    corpus = Corpus(
        tokens=tokens,
        starts=stops - np.array(lengths),
        stops=stops,
        sizes=np.array(sizes, dtype=np.int64),
        eos_token_id=tokenizer.eos_token_id,
    )
    if len(lengths) == 1:
        return _split_one(corpus, validation_share)
    held_out = _held_out(hashes, validation_share)
    return corpus.select(~held_out), corpus.select(held_out)


def _texts(sources: Sequence[str]) -> Iterator[bytes]:
    """Contents of all files, those of a folder in the order of their names."""
    for path, named in _paths(sources):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ValueError(f"expected a readable corpus, got {path}: {error.strerror}") from None
        if named or b"\0" not in text[:BINARY_PROBE]:
            yield text


def _paths(sources: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Files, and whether each was named itself and not its folder."""
    if not sources:
        library = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(library.rglob("*.py")):
            if "site-packages" not in path.parts:
                yield path, False
    for source in sources:
        root = Path(source)
        if root.is_dir():
            yield from ((path, False) for path in sorted(root.rglob("*")) if path.is_file())
        else:
            yield root, True


def _held_out(hashes: list[int], share: float) -> np.ndarray:
    """Mask of the documents for validation: hashes below the share, at least one, never all."""
    order = sorted(range(len(hashes)), key=lambda i: hashes[i])
    below = sum(h < share * HASH_RANGE for h in hashes)
    mask = np.zeros(len(hashes), dtype=bool)
    mask[order[: min(max(below, 1), len(hashes) - 1)]] = True
    return mask


def _split_one(corpus: Corpus, share: float) -> tuple[Corpus, Corpus]:
    """The two parts of a corpus of one document; each ends as a document does."""
    length, size = int(corpus.stops[0]), int(corpus.sizes[0])
    cut = min(max(round(length * (1 - share)), 1), length - 1)
    if cut < 1:
        raise ValueError(f"expected a corpus of two tokens or more, got {length}")
    size_cut = round(size * cut / length)
    head = replace(corpus, stops=np.array([cut]), sizes=np.array([size_cut]))
    return head, replace(corpus, starts=np.array([cut]), sizes=np.array([size - size_cut]))
