"""What Louver refuses to serve, each with one sentence: the exactness it promises is that of plain softmax attention."""

import warnings
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from louver.errors import LouverWarning, UnsupportedModelError

# Keyword arguments that change the attention itself, as models pass them to their attention function.
_CHANGES_ATTENTION = {
    "softcap": "soft-caps its attention logits",
    "s_aux": "adds learned sinks to its softmax (s_aux)",
    "position_bias": "adds a position bias to its attention logits",
    "alibi": "adds a position bias (ALiBi) to its attention logits",
}


def check_config(config: PreTrainedConfig) -> None:
    """Raise an UnsupportedModelError if the model that config describes does not do plain softmax attention."""
    text = config.get_text_config(decoder=True)
    name = _name(config)
    if config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} has cross-attention; Louver serves decoder-only models")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(f"{name} uses multi-head latent attention (MLA), which Louver does not support")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{name} {_CHANGES_ATTENTION['softcap']}, which Louver does not support")
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(f"{name} {_CHANGES_ATTENTION['alibi']}, which Louver does not support")


def check_model(model: PreTrainedModel) -> None:
    """Raise an UnsupportedModelError if Louver cannot serve model; warn if it would have nothing to do."""
    check_config(model.config)
    name = _name(model.config)
    if any("sinks" in module._parameters for module in model.modules()):
        raise UnsupportedModelError(f"{name} {_CHANGES_ATTENTION['s_aux']}, which Louver does not support")
    if getattr(model.config, "output_attentions", False):
        raise UnsupportedModelError(
            "config.output_attentions is set, but Louver never forms the attention weights; set it to False"
        )
    implementation = getattr(model.generation_config, "cache_implementation", None)
    if implementation is not None:
        raise UnsupportedModelError(
            f"the model's generation_config asks for a cache of its own (cache_implementation={implementation!r}); "
            "set it to None, because Louver replaces static and quantized caches"
        )
    if not any(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
        warnings.warn(
            f"{name} has no layer with full attention, so Louver has nothing to serve", LouverWarning, stacklevel=3
        )


def check_call(module: nn.Module, key: Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise an UnsupportedModelError if this call of the attention function asks for more than plain softmax attention."""
    for argument, what in _CHANGES_ATTENTION.items():
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} {what}, which Louver does not support")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True was asked for, but Louver never forms the attention weights"
        )
    if key.requires_grad or dropout:
        raise UnsupportedModelError(
            "Louver does not take part in training; call model.eval() and decode under torch.no_grad()"
        )


def check_states(keys: Tensor, values: Tensor) -> None:
    """Raise an UnsupportedModelError unless keys and values [batch, num_kv_heads, new_len, head_dim] can be served."""
    if keys.shape[-1] != values.shape[-1]:
        raise UnsupportedModelError(
            f"keys have head_dim={keys.shape[-1]} and values {values.shape[-1]}; "
            "different widths (as in multi-head latent attention) are not supported"
        )
    if keys.requires_grad:
        raise UnsupportedModelError(
            "Louver does not take part in training; call model.eval() and decode under torch.no_grad()"
        )


def _name(config: PreTrainedConfig) -> str:
    architectures = getattr(config, "architectures", None)
    return architectures[0] if architectures else f"a model of type {config.model_type!r}"
