"""The hybrid model of MiniMax-01: its configuration, modules and checkpoints."""

from attnlab.model.config import SIZES, HybridConfig
from attnlab.model.hybrid import HybridLM, HybridOutput

__all__ = ["SIZES", "HybridConfig", "HybridLM", "HybridOutput"]
