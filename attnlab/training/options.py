"""The options of `attnlab train`: one for each field of `TrainConfig`, explained by its docstring."""

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from attnlab.training.config import TrainConfig

SPECIAL: dict[str, dict[str, Any]] = {
    "vocab_size": {"type": int},
    "corpus": {"nargs": "+", "metavar": "PATH"},
    "linear_ramp": {"nargs": 3, "type": float, "metavar": ("VALUE", "BEGIN", "END")},
    "lightning_backend": {},
    "softmax_backend": {},
    "out": {"metavar": "DIR"},
    "dp": {"type": int},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser an option a field, and `--resume`; what is not given stays away."""
    helps = field_helps()
    for field in fields(TrainConfig):
        kind = type(field.default)
        how = SPECIAL.get(field.name, {"type": kind})
        if kind is bool:
            how = {"action": "store_true"}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=helps[field.name], **how)
    text = "go on with the run in --out DIR, with its settings; a mesh and a device may be given"
    parser.add_argument("--resume", action="store_true", help=text)


def config_from(options: dict[str, Any]) -> TrainConfig:
    """The settings that were given, with defaults for the device and a new folder in runs/."""
    given: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in options.items()
    }
    # A run may be resumed from elsewhere.
    given["corpus"] = tuple(str(Path(source).absolute()) for source in given.get("corpus", ()))
    if given.get("tokenizer", "bytes") != "bytes":
        given["tokenizer"] = str(Path(given["tokenizer"]).absolute())
    device = given.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
    size, variant = (given.get(name, getattr(TrainConfig, name)) for name in ("size", "variant"))
    given.setdefault("out", time.strftime(f"runs/{size}-{variant}-%Y%m%d-%H%M%S"))
    return TrainConfig.for_device(device, **given)


def field_helps() -> dict[str, str]:
    """What the docstring of `TrainConfig` says of each field."""
    lines = (line.strip().partition(": ") for line in (TrainConfig.__doc__ or "").splitlines())
    names = {field.name for field in fields(TrainConfig)}
    return {name: text for name, _, text in lines if name in names}
