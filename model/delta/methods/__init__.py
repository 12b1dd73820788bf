"""The tuning methods, a file each."""

from model.delta.methods.lora import LoraConfig
from model.delta.methods.sora import SoraConfig
from model.delta.methods.tied_lora import TiedLoraConfig

__all__ = ["LoraConfig", "SoraConfig", "TiedLoraConfig"]
