"""From text to batches: tokenizer, token shards on disk, and the loader that training reads."""
