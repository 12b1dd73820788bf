"""LPA models in transformers. Its two files import only torch and transformers, and are copied into
every export in the format hf.
"""
