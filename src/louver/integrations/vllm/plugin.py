"""``register``: what vLLM calls in every one of its processes, more than once."""

BACKENDS = {
    "CPU_ATTN": "louver.integrations.vllm.cpu.LouverCPUBackend",
    "CPU_MLA": "louver.integrations.vllm.cpu.RefusedCPUMLABackend",
    "AMX_MLA": "louver.integrations.vllm.cpu.RefusedAMXMLABackend",
    "CUSTOM": "louver.integrations.vllm.cuda.LouverCUDABackend",
}


def register() -> None:
    """Name Louver's backends to vLLM. They are imported when the engine chooses one, and stand aside unless asked for.

    On a CPU vLLM has one backend for plain attention, and Louver's is an extension of it under the same name. On CUDA
    Louver's is ``CUSTOM``, which the user chooses for full attention (docs/serving.md).
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, path in BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)
