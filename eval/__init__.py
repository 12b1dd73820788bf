"""Judging models: perplexity and generation."""
