"""Louver inside Hugging Face transformers: a cache that serves the decode steps, and the attention function that asks it.

    cache = attach(model)
    model.generate(**inputs, **cache.kwargs())

Nothing is patched. The attention function is registered by name through transformers' own interfaces; the cache marks the keys
it hands out, and the function recognises its own mark. Any other cache on an attached model is attended densely.
"""

from louver.integrations.transformers.attach import attach
from louver.integrations.transformers.cache import LouverCache
from louver.integrations.transformers.captured import CapturedDecoding
from louver.integrations.transformers.layer import LouverLayer
from louver.integrations.transformers.stats import DecodeStats, LayerSummary, Summary

__all__ = ["CapturedDecoding", "DecodeStats", "LayerSummary", "LouverCache", "LouverLayer", "Summary", "attach"]
