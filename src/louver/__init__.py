"""Louver: long-context LLM decoding that reads a fraction of the KV cache and certifies what it did not read."""
