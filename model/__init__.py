"""The decoder-only Transformer, vanilla and low-dimensional (LPA)."""

from model.config import ModelConfig, Ranks
from model.transformer import Transformer, init_weights, initial_value

__all__ = ["ModelConfig", "Ranks", "Transformer", "init_weights", "initial_value"]
