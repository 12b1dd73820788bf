"""Compiles the shipped kernels without a GPU and checks the result: `python -m kernels.aot`."""
