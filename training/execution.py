"""Switches a model to what the configuration asks for."""

import sys

import torch

from data.errors import InputError
from model import Transformer
from model.configure import configure
from model.execution import Execution, Plan
from training import distributed


def apply_execution(
    model: Transformer,
    execution: Execution,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> Plan:
    """model.configure.configure; InputError where the execution cannot be had on this device.

    Evaluation has no log: there, warnings go to stderr, and on a GPU what runs where.
    """
    try:
        plan = configure(model, execution, device, dtype, training)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not training and distributed.rank() == 0:
        lines = [f"warning: {warning}" for warning in execution.warnings(training=False)]
        for line in lines + (plan.lines if device.type == "cuda" else []):
            print(line, file=sys.stderr)
    return plan
