"""The tuning methods, a file each."""

from model.delta.methods.bitfit import BitFitConfig
from model.delta.methods.bottleneck import AdapterConfig, ParallelAdapterConfig
from model.delta.methods.compacter import CompacterConfig
from model.delta.methods.lora import LoraConfig
from model.delta.methods.low_rank_adapter import LowRankAdapterConfig
from model.delta.methods.prefix import PrefixConfig
from model.delta.methods.soft_prompt import SoftPromptConfig
from model.delta.methods.sora import SoraConfig
from model.delta.methods.tied_lora import TiedLoraConfig

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "CompacterConfig",
    "LoraConfig",
    "LowRankAdapterConfig",
    "ParallelAdapterConfig",
    "PrefixConfig",
    "SoftPromptConfig",
    "SoraConfig",
    "TiedLoraConfig",
]
