"""What Louver registers with vLLM, and who gets it. No model is loaded."""

import importlib

import pytest
import torch

from louver.errors import UnsupportedModelError

pytestmark = pytest.mark.vllm


@pytest.fixture
def asking(monkeypatch):
    """A vLLM config that asks for Louver or does not, in force."""
    from vllm.config import VllmConfig, set_current_vllm_config

    def enter(asked: bool, **changes):
        config = VllmConfig(additional_config={"louver": {"policy": "exact:0.01"}} if asked else {})
        for name, value in changes.items():
            section, _, field = name.partition("__")
            monkeypatch.setattr(getattr(config, section), field, value)
        return set_current_vllm_config(config)

    return enter


def test_registering_twice_names_every_backend_once():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from louver.integrations.vllm import register
    from louver.integrations.vllm.plugin import BACKENDS

    register()
    register()
    for name, path in BACKENDS.items():
        assert AttentionBackendEnum[name].get_path() == path


def test_an_engine_gets_louver_only_if_it_asks(asking):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from louver.integrations.vllm.cpu import LouverCPUBackend, LouverCPUImpl

    assert LouverCPUBackend.get_name() == "CPU_ATTN"
    assert LouverCPUBackend.get_impl_cls() is CPUAttentionBackendImpl
    with asking(False):
        assert LouverCPUBackend.get_impl_cls() is CPUAttentionBackendImpl
    with asking(True):
        assert LouverCPUBackend.get_impl_cls() is LouverCPUImpl


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
    ],
)
def test_what_an_engine_cannot_have_with_louver_stops_it(asking, change, message):
    from louver.integrations.vllm.cpu import LouverCPUBackend

    with asking(True, **change), pytest.raises(UnsupportedModelError, match=message):
        LouverCPUBackend.get_impl_cls()


@pytest.mark.parametrize("name", ["RefusedCPUMLABackend", "RefusedAMXMLABackend"])
def test_latent_attention_is_vllms_own_and_refused_with_louver(asking, name):
    backend = getattr(importlib.import_module("louver.integrations.vllm.cpu"), name)
    with asking(False):
        assert backend.get_impl_cls() is backend.__mro__[1].get_impl_cls()
    with asking(True), pytest.raises(UnsupportedModelError, match="MLA"):
        backend.get_impl_cls()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_pages_are_read_as_vllm_writes_them(dtype, head_dim):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from louver.integrations.vllm.cpu import check_layout

    isa = _get_attn_isa(dtype, 128, head_dim)
    if isa == "amx":
        with pytest.raises(UnsupportedModelError, match="pack keys"):
            check_layout(isa, dtype, 128, 2 * head_dim)
    else:
        check_layout(isa, dtype, 128, 2 * head_dim)


def test_a_layout_that_is_another_is_noticed(monkeypatch):
    from louver.integrations.vllm import cpu

    monkeypatch.setattr(cpu, "planes", lambda pages: (pages[..., :64], pages[..., 64:]))
    with pytest.raises(UnsupportedModelError, match=r"pack keys of torch\.float32 in a way Louver doesn't read"):
        cpu.check_layout.__wrapped__("vec", torch.float32, 128, 128)
