"""Samples text from a checkpoint."""

from eval.generate.config import GenerateConfig
from eval.generate.decoding import Decoder, generate

__all__ = ["Decoder", "GenerateConfig", "generate"]
