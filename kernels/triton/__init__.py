"""The Triton kernels. Importing this package needs triton but no GPU; running them does."""
