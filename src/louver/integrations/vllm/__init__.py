"""Louver inside vLLM: a plug-in that serves decode steps from the engine's own paged cache. No fork, no patch.

    LOUVER_VLLM_POLICY=exact:0.01 vllm serve MODEL
    vllm serve MODEL --additional-config '{"louver": {"policy": "exact:0.01"}}'

Installed, it is found through the entry point ``vllm.general_plugins``; not asked for, it changes nothing. docs/serving.md.
"""

from louver.integrations.vllm.plugin import register

__all__ = ["register"]
