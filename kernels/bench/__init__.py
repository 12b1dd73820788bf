"""The benchmark of the attention layer's operations, of its pieces and of the layer as a whole.

    python -m kernels.bench --output results.json

operations.py  what is measured: operations, providers, FLOPs and minimal bytes
forms.py       each operation in three forms: eager, stacked, fused
inputs.py      random inputs, and a provider's function bound to them
gate.py        the comparison with the definition that comes before any timing
timing.py      clocks, interleaved repeats, quantiles
case.py        one case: all providers of an operation at one size
report.py      device peaks, rows of results, verdict, JSON and CSV
table.py       what is printed, and the plot
options.py     the command line
"""
