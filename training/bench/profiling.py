"""Where the time of a step goes: torch's profiler, its operators in groups."""

from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile

# The first pattern that begins an operator's name counts.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "softmax and loss": ("aten::_log_softmax", "aten::nll_loss", "aten::exp", "aten::amax"),
    "norms": ("aten::_fused_rms_norm", "aten::rms_norm", "aten::_foreach_norm", "aten::linalg_v"),
    "optimizer": ("aten::_fused_adam", "Optimizer"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero"),
}


def group_of(name: str) -> str:
    """The group of an operator; what is in none is "other elementwise and overhead"."""
    for group, prefixes in GROUPS.items():
        if name.startswith(prefixes):
            return group
    return "other elementwise and overhead"


def seconds_by_group(step: Callable[[], object], repeats: int) -> Mapping[str, float]:
    """Seconds that a call spends in each group of operators, the mean of `repeats` calls.

    Time inside of an operator that it calls itself counts for the inner one. The profiler slows
    down short operators most.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(repeats):
            step()
    seconds: dict[str, float] = {}
    for event in recorded.key_averages():
        group = group_of(event.key)
        seconds[group] = seconds.get(group, 0.0) + event.self_cpu_time_total / 1e6 / repeats
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
