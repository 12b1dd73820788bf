"""Batches of the loader from the page cache: how many tokens a second, beside any computation."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from data.loader import WindowLoader
from data.shards import TokenStream
from training.bench.measure import WARM_UP, Row, Step, in_turn, measurement, ratio

GOAL = 20e6  # tokens a second
SEED = 0
SHARDS = 2


def _map(folder: Path, index: int) -> np.ndarray:
    return np.memmap(folder / f"{index}.bin", dtype="<u2", mode="r")


def write_shards(folder: Path, tokens: int) -> TokenStream:
    """SHARDS files of random tokens, uint16, mapped as a prepared folder's are."""
    generator = np.random.RandomState(SEED)
    for index in range(SHARDS):
        generator.randint(0, 32000, tokens).astype("<u2").tofile(folder / f"{index}.bin")
        _map(folder, index).max()  # into the page cache
    no_documents = np.zeros((0, 3), dtype=np.int64)
    return TokenStream([tokens] * SHARDS, partial(_map, folder), lambda _: no_documents, (0, 0, 0))


def reading(loader: WindowLoader, count: int) -> Step:
    """Reads the next batch at each call."""
    position = 0

    def step() -> float:
        nonlocal position
        loader.batch(position, count)
        position += count
        return 0.0

    return step


def measure(quick: bool = False) -> Row:
    """All lengths and batch sizes in turn; a batch is read where no other one has been."""
    tokens, rounds = (200_000, 3) if quick else (25_000_000, 40)
    lengths, counts = ((16,), (2, 4)) if quick else ((256, 1024, 2048), (16, 64, 512))
    with tempfile.TemporaryDirectory() as folder:
        stream = write_shards(Path(folder), tokens)
        shapes = {f"{count}×{length}": (length, count) for length in lengths for count in counts}
        sides = {
            name: reading(WindowLoader(stream, length, SEED), count)
            for name, (length, count) in shapes.items()
        }
        in_turn(sides, WARM_UP)
        seconds = in_turn(sides, rounds)
    sizes = {name: count * length for name, (length, count) in shapes.items()}
    rows = [measurement(n, "WindowLoader.batch", v) for n, v in seconds.items()]
    return {
        "measurements": [
            row | {"tokens_per_second": sizes[row["case"]] / row["seconds_median"]} for row in rows
        ],
        "ratios": [
            ratio(name, "tokens/s against 20 million", [size / GOAL] * rounds, seconds[name], 1.0)
            for name, size in sizes.items()
        ],
        "seed": SEED,
    }
