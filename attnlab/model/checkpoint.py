"""Checkpoints of the hybrid model: config.json and safetensors files, streamed shard by shard.

`layouts.py` says which tensors there are and what they are called. Decays are not among them: they
are computed, and those that transformers saves, rounded to the model's dtype, are passed over.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from attnlab.model.config import HybridConfig
from attnlab.model.layouts import (
    LAYOUTS,
    MAX_SHARD_BYTES,
    WHOLE,
    Piece,
    pieces,
    plan_shards,
    released_names,
)
from attnlab.model.transaction import current_files, replace_files

if TYPE_CHECKING:
    from safetensors import safe_open

    from attnlab.model.hybrid import HybridLM

__all__ = ["load", "plan_shards", "read_config", "released_names", "save", "stored_dtype"]

CONFIG, INDEX = "config.json", "model.safetensors.index.json"

_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_COMPUTED = re.compile(r"\.(slope_rate|query_decay|key_decay|diagonal_decay|inv_freq)$")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LISTED = 20  # tensors an error names of each kind


class Header(NamedTuple):
    """What a file says of a tensor before it is read; `dtype` in safetensors' spelling."""

    shape: tuple[int, ...]
    dtype: str
    shard: str


def save(
    model: HybridLM,
    path: str | Path,
    *,
    layout: str = "released",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, the weights in their dtype, and an index if there are several shards.

    The files replace the checkpoint in the folder `path` at once, when all of them are on the disk;
    if that fails, or the process dies, the checkpoint before stays valid. Other files stay. Beyond
    the model at most one shard is held in memory.

    Args:
        model: on any device but meta.
        path: a folder, made if it isn't there.
        layout: "released" or "transformers".
        max_shard_bytes: what a file may hold, unless a single tensor is larger.

    Raises:
        ValueError: for an unknown layout, a path to a file, or weights without values.
        OSError: if something can't be written, such as on a full disk.
    """
    path = Path(path)
    shards = plan_shards(model, layout=layout, max_shard_bytes=max_shard_bytes)
    empty = [name for name, values in model.named_parameters() if values.is_meta]
    if empty:
        raise ValueError(f"expected weights with values, got {empty[0]} on the meta device")
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder to save into, got the file {path}")
    try:
        with replace_files(path, obsolete=lambda name: bool(_SHARD.fullmatch(name))) as folder:
            _write_json(folder / CONFIG, _config(model, layout))
            for name, shard in shards.items():
                _write_shard(model, shard, folder / name)
            if len(shards) > 1:
                _write_json(folder / INDEX, _index(shards))
    except OSError as error:
        message = f"{path} could not be written, its last complete checkpoint stays valid: {error}"
        raise OSError(error.errno, message) from error


def load(model: HybridLM, path: str | Path, *, device: torch.device | str | None = None) -> None:
    """Fill the model with the weights in the folder `path`, in either layout, in its own dtype.

    All headers are read and compared with the model before anything is changed. The shards are
    then read one after the other; beyond the model at most one of them is held in memory.

    Args:
        model: of any dtype; one on the meta device is moved to `device`.
        path: the folder.
        device: where a model on the meta device goes, None for the CPU.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: for a damaged or missing file, and for tensors that are missing, unexpected, or
            of another shape, all of which it lists.
    """
    shards = _open_shards(Path(path))
    expected = _check(model, _headers(shards), Path(path))
    _materialise(model, device)
    for name in list(shards):
        with shards.pop(name) as shard, torch.no_grad():
            for piece in [expected[key] for key in shard.offset_keys() if key in expected]:
                weight = model.get_parameter(piece.parameter)
                weight[piece.part].copy_(shard.get_tensor(piece.name))


def read_config(path: str | Path) -> HybridConfig:
    """Config of the checkpoint in the folder `path`, of either spelling.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it isn't JSON, or `HybridConfig` refuses it.
    """
    return HybridConfig.from_dict(_read_json(_folder_files(Path(path)), CONFIG, Path(path)))


def stored_dtype(path: str | Path) -> torch.dtype:
    """Dtype of the first weight in the folder `path`; raises as `load` does."""
    first = next(iter(_headers(_open_shards(Path(path))).values()), None)
    if first is None or first.dtype not in _DTYPES:
        got = "no tensor" if first is None else first.dtype
        raise ValueError(f"expected weights in {', '.join(_DTYPES)} in {path}, got {got}")
    return _DTYPES[first.dtype]


def _write_shard(model: nn.Module, shard: list[Piece], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Nothing is copied where the model is on the CPU and its parameters contiguous.
    tensors = {
        piece.name: model.get_parameter(piece.parameter).detach()[piece.part].cpu().contiguous()
        for piece in shard
    }
    try:
        save_file(tensors, file, metadata={"format": "pt"})  # transformers wants the format named
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _config(model: HybridLM, layout: str) -> dict[str, Any]:
    key = "torch_dtype" if layout == "released" else "dtype"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {**model.config.to_dict(layout=layout), key: dtype}


def _index(shards: dict[str, list[Piece]]) -> dict[str, Any]:
    total = sum(piece.num_bytes for shard in shards.values() for piece in shard)
    places = {piece.name: name for name, shard in shards.items() for piece in shard}
    return {"metadata": {"total_size": total}, "weight_map": places}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _read_json(files: dict[str, Path], name: str, path: Path) -> dict[str, Any]:
    if name not in files:
        raise FileNotFoundError(f"expected {name} in {path}, got {', '.join(sorted(files)) or '-'}")
    try:
        content = json.loads(files[name].read_text())
    except ValueError as error:  # of the text's encoding, or of JSON
        raise ValueError(f"expected JSON in {path / name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path / name}, got {type(content).__name__}")
    return content


def _folder_files(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        raise FileNotFoundError(f"expected a folder with a checkpoint, got {path}")
    return current_files(path)


def _open_shards(path: Path) -> dict[str, safe_open]:
    """All shards, open: a checkpoint that replaces this one meanwhile can't mix with it."""
    from safetensors import SafetensorError, safe_open

    files = _folder_files(path)
    names = [WHOLE]
    if WHOLE not in files:
        index = _read_json(files, INDEX, path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"expected a weight_map in {path / INDEX}, got {index!r}")
        names = sorted({str(name) for name in index.values()})
    absent = [name for name in names if name not in files]
    if absent:
        raise ValueError(f"{path} lacks {len(absent)} of {len(names)} shards: {_some(absent)}")
    shards = {}
    for name in names:
        try:
            shards[name] = safe_open(files[name], framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path / name} is truncated or corrupt: {error}") from error
    return shards


def _headers(shards: dict[str, safe_open]) -> dict[str, Header]:
    """Header of each tensor, by name; decays are passed over."""
    headers: dict[str, Header] = {}
    for shard, file in shards.items():
        for name in file.offset_keys():
            if name in headers:
                raise ValueError(f"{name} is in two shards: {headers[name].shard} and {shard}")
            if not _COMPUTED.search(name):
                values = file.get_slice(name)
                headers[name] = Header(tuple(values.get_shape()), values.get_dtype(), shard)
    return headers


def _check(model: nn.Module, found: dict[str, Header], path: Path) -> dict[str, Piece]:
    """The pieces by name, in the layout that the file has; raises unless all of them are there."""
    layouts = [{piece.name: piece for piece in pieces(model, layout)} for layout in LAYOUTS]
    expected = max(layouts, key=lambda layout: len(layout.keys() & found.keys()))
    missing = [f"{name} {[*piece.shape]}" for name, piece in expected.items() if name not in found]
    extra = [f"{name} {[*header.shape]}" for name, header in found.items() if name not in expected]
    wrong = [
        f"{name} {header.dtype} {[*header.shape]} instead of {[*expected[name].shape]}"
        for name, header in found.items()
        if name in expected
        and (header.shape != expected[name].shape or header.dtype not in _DTYPES)
    ]
    kinds = {"missing": missing, "unexpected": extra, "of another shape or type": wrong}
    lines = [f"\n  {len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise ValueError(
            f"expected the model's {len(expected)} tensors in {path}:" + "".join(lines)
        )
    return expected


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _materialise(model: nn.Module, device: torch.device | str | None) -> None:
    """Move a model on the meta device to `device`; the values of its weights are undefined then."""
    if any(weight.is_meta for weight in model.parameters()):
        model.to_empty(device=device or "cpu")
