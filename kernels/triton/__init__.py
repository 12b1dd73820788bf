"""The Triton kernels. Importing them needs triton (configs.py does not), running them a GPU."""
