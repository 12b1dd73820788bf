"""LPA against the vanilla Transformer, side by side: how fast, with how much memory.

    python -m eval.throughput --config lpa_370m.yaml --baseline transformer_370m.yaml

docs/throughput.md has the method and defines every number.

options.py       the command line, the cells of a sweep, the two runs of a cell
conditions.py    what must be equal for a fair comparison, as it ran
workload.py      what the modes have in common: random tokens, the plain model
train.py         mode train: steps of the engine
inference.py     modes evaluate, prefill and decode
sides.py         both models in turn; what fits; the memory of each
alone.py         one side in a process of its own, for its peak resident memory on a CPU
comparison.py    from seconds to rates, ratios and the share of the saved FLOPs
cells.py         one cell from its settings to its results; out of memory; results already there
output.py        console, CSV, plot
"""
