"""The learning rate as a pure function of the step, so that no resume can disagree with it."""

import math

from training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up to the peak, then the schedule.

    The first step has peak / warmup_steps, step warmup_steps - 1 the peak. After the warm-up, with
    p the fraction of the decaying steps that is behind (0 at the first, just under 1 at the last):
      cosine    min + (peak - min) (1 + cos πp) / 2     (Loshchilov and Hutter 2017, eq. 5)
      linear    peak + (min - peak) p
      wsd       peak until decay_steps before the end, then as linear (Hu et al. 2024, section 4)
      constant  peak
    """
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.max_steps - config.decay_steps)
        if step < start:
            return peak
    progress = min(1.0, (step - start) / max(1, config.max_steps - start))
    if config.schedule == "cosine":
        return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2
    return peak + (low - peak) * progress
