"""The operations of the model: their definitions, fused operators and Triton kernels."""
