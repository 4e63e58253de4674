"""Text to token ids and back: bytes as they are, or any `tokenizer.json` of Hugging Face.

A tokenizer travels with the model that was trained on it: `save` writes it into the model's folder,
`load_tokenizer` finds it there.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# How an end of text is called in the vocabularies in use, where tokenizer_config.json doesn't say.
END_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<end_of_sentence>",
    "[SEP]",
)
CONFIG_NAME = "tokenizer_config.json"
BYTE_CLASS = "attnlab.ByteTokenizer"


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    name: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds every id of encoded text."""

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, without any special token around them."""

    def encode_array(self, text: bytes) -> np.ndarray:
        """The same as an array of `dtype`: a corpus is long."""

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; what is no valid text becomes U+FFFD, special tokens vanish."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; then begin (256), end (257) and padding (258)."""

    name = "bytes"
    vocab_size = 259
    bos_token_id: int | None = 256
    eos_token_id = 257
    pad_token_id: int | None = 258

    @property
    def dtype(self) -> np.dtype:
        """One byte an id: a text holds none of the special ids."""
        return np.dtype(np.uint8)

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of the text."""
        return list(text.encode() if isinstance(text, str) else text)

    def encode_array(self, text: bytes) -> np.ndarray:
        """The bytes themselves, not copied."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special ids vanish, bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write a tokenizer_config.json that names this class."""
        record = {
            "tokenizer_class": BYTE_CLASS,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n")


class FileTokenizer:
    """A `tokenizer.json`, run by the tokenizers library."""

    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __init__(self, path: Path) -> None:
        """Read the file and find its end-of-text token.

        Raises:
            ValueError: if tokenizers is missing, the file is none, or no end of text is known.
        """
        try:
            from tokenizers import Tokenizer as Engine
        except ImportError:
            raise ValueError(f"{path} needs tokenizers: pip install 'attnlab[train]'") from None
        self.name = str(path)
        try:
            self.text = path.read_text(encoding="utf-8")
            self.engine = Engine.from_str(self.text)
        except Exception as error:  # the library raises bare exceptions for a wrong file
            raise ValueError(f"expected a tokenizer.json, got {path}: {error}") from None
        self.vocab_size = 1 + max(
            self.engine.get_vocab(with_added_tokens=True).values(), default=-1
        )
        self.end_token, self.eos_token_id = self._find_end(path)

    def _find_end(self, path: Path) -> tuple[str, int]:
        declared = _read_config(path.parent).get("eos_token")
        if isinstance(declared, dict):
            declared = declared.get("content")
        for token in (declared,) if declared else END_NAMES:
            found = self.engine.token_to_id(token)
            if found is not None:
                return token, found
        names = declared or ", ".join(END_NAMES)
        raise ValueError(f"expected an end-of-text token in {path}, got none of {names}")

    @property
    def dtype(self) -> np.dtype:
        """uint8, uint16 or uint32 by the vocabulary."""
        return np.min_scalar_type(max(self.vocab_size - 1, 0))

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the text; bytes that are not UTF-8 are read as U+FFFD."""
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: bytes) -> np.ndarray:
        """Ids of the text as an array of `dtype`."""
        return np.array(self.encode(text), dtype=self.dtype)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens."""
        return self.engine.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer.json and name its end-of-text token beside it."""
        (folder / "tokenizer.json").write_text(self.text, encoding="utf-8")
        record = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_token}
        (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of "bytes", of a `tokenizer.json`, or of a folder that `save` wrote to.

    Raises:
        ValueError: if there is none.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return FileTokenizer(path / "tokenizer.json")
        if _read_config(path).get("tokenizer_class") == BYTE_CLASS:
            return ByteTokenizer()
        raise ValueError(f"expected a folder with tokenizer.json or {CONFIG_NAME}, got {path}")
    if not path.is_file():
        raise ValueError(f'expected "bytes" or the path of a tokenizer.json, got {source}')
    return FileTokenizer(path)


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json; empty where there is none."""
    path = folder / CONFIG_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a readable {path}, got {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object in {path}, got {type(record).__name__}")
    return record
