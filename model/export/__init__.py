"""Checkpoints as other programs read them: python -m model.export, docs/export.md."""


def register() -> None:
    """Makes transformers' AutoConfig and AutoModelForCausalLM know LPA models in this process.

    A model saved afterwards (save_pretrained) has its code beside it. ImportError where the package
    transformers is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from model.export.hugging_face.configuration_lpa import LpaConfig
    from model.export.hugging_face.modeling_lpa import LpaForCausalLM

    AutoConfig.register(LpaConfig.model_type, LpaConfig, exist_ok=True)
    AutoModelForCausalLM.register(LpaConfig, LpaForCausalLM, exist_ok=True)
    LpaConfig.register_for_auto_class()
    LpaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
