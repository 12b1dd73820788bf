"""Switches a model to what the configuration asks for."""

import torch

from data.errors import InputError
from model import Transformer
from model.configure import configure
from model.execution import Execution, Plan


def apply_execution(
    model: Transformer,
    execution: Execution,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> Plan:
    """model.configure.configure; InputError where the execution cannot be had on this device."""
    try:
        return configure(model, execution, device, dtype, training)
    except ValueError as error:
        raise InputError(str(error)) from None
