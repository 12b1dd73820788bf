"""Delta tuning of any nn.Module: LoRA, SoRA and their relatives, attached by forward hooks."""

from model.delta.base import METHODS, Delta, DeltaConfig, DeltaLayer, config_from_dict
from model.delta.deltas import Deltas, Tuned
from model.delta.methods import (
    AdapterConfig,
    BitFitConfig,
    CompacterConfig,
    LoraConfig,
    LowRankAdapterConfig,
    ParallelAdapterConfig,
    PrefixConfig,
    SoftPromptConfig,
    SoraConfig,
    TiedLoraConfig,
)

__all__ = [
    "METHODS",
    "AdapterConfig",
    "BitFitConfig",
    "CompacterConfig",
    "Delta",
    "DeltaConfig",
    "DeltaLayer",
    "Deltas",
    "LoraConfig",
    "LowRankAdapterConfig",
    "ParallelAdapterConfig",
    "PrefixConfig",
    "SoftPromptConfig",
    "SoraConfig",
    "TiedLoraConfig",
    "Tuned",
    "config_from_dict",
]
