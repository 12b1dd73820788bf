"""Conversion of a dense Llama-like checkpoint into an LPA model."""
