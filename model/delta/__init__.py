"""Delta tuning of any nn.Module: LoRA, SoRA and their relatives, attached by forward hooks."""

from model.delta.base import METHODS, Delta, DeltaConfig, DeltaLayer, config_from_dict
from model.delta.deltas import Deltas, Tuned
from model.delta.methods import LoraConfig, SoraConfig, TiedLoraConfig

__all__ = [
    "METHODS",
    "Delta",
    "DeltaConfig",
    "DeltaLayer",
    "Deltas",
    "LoraConfig",
    "SoraConfig",
    "TiedLoraConfig",
    "Tuned",
    "config_from_dict",
]
