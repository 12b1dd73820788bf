"""Python's garbage collection at steps of our choice."""

import gc


class GarbageCollection:
    """Collects every `every` steps, on all ranks at once; None leaves it to Python.

    Left to itself each rank pauses at another moment, and in each step the others wait for the one
    that pauses. What exists when training begins is exempt: it stays until the end anyway.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        if every is not None:
            gc.collect()
            gc.freeze()
            gc.disable()

    def step(self, step: int) -> None:
        """Called after each step, counted from 1."""
        if self.every is not None and step % self.every == 0:
            gc.collect()

    def close(self) -> None:
        """Leaves it to Python again."""
        if self.every is not None:
            gc.enable()
            gc.unfreeze()
