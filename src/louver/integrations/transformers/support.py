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
    name = name_of(config)
    if config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} has cross-attention; Louver serves decoder-only models")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(f"{name} uses multi-head latent attention (MLA), which Louver does not support")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{name} {_CHANGES_ATTENTION['softcap']}, which Louver does not support")
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(f"{name} {_CHANGES_ATTENTION['alibi']}, which Louver does not support")


def check_model(module: nn.Module) -> Any:
    """Raise an UnsupportedModelError if Louver cannot serve module; warn if it would have nothing to do; return it."""
    if not hasattr(module, "set_attn_implementation"):
        raise UnsupportedModelError(f"attach takes a transformers model, got {type(module).__name__}")
    model: Any = module  # a PreTrainedModel, or what wraps one
    check_config(model.config)
    name = name_of(model.config)
    if any("sinks" in part._parameters for part in module.modules()):
        raise UnsupportedModelError(f"{name} {_CHANGES_ATTENTION['s_aux']}, which Louver does not support")
    if getattr(model.config, "output_attentions", False):
        raise UnsupportedModelError(
            "config.output_attentions is set, but Louver never forms the attention weights; set it to False"
        )
    generation_config = getattr(model, "generation_config", None)
    implementation = getattr(generation_config, "cache_implementation", None)
    if implementation is not None:
        raise UnsupportedModelError(
            f"the model asks for a {implementation!r} cache, which Louver would replace; "
            "set model.generation_config.cache_implementation = None"
        )
    if not any(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
        warnings.warn(
            f"{name} has no layer with full attention, so Louver has nothing to serve", LouverWarning, stacklevel=3
        )
    return model


def takes_sdpa(model: nn.Module) -> bool:
    """Whether the text decoder says that it can attend through SDPA, or any function of that form: that is what Louver's is.

    One that says neither builds its own masks and weights, whatever else of the model asks transformers' interface.
    """
    text: Any = model.config.get_text_config(decoder=True)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text]
    return not parts or any(part._supports_sdpa or part._supports_attention_backend for part in parts)


def check_call(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise an UnsupportedModelError if this call of the attention function asks for more than plain softmax attention."""
    for argument, what in _CHANGES_ATTENTION.items():
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} {what}, which Louver does not support")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True was asked for, but Louver never forms the attention weights"
        )


def check_states(keys: Tensor, values: Tensor) -> None:
    """Raise an UnsupportedModelError unless keys and values [batch, num_kv_heads, new_len, head_dim] can be served."""
    if keys.shape[-1] != values.shape[-1]:
        raise UnsupportedModelError(
            f"keys have head_dim={keys.shape[-1]} and values {values.shape[-1]}; "
            "different widths (as in multi-head latent attention) are not supported"
        )
    check_no_training(keys, 0.0)


def check_no_training(keys: Tensor, dropout: float) -> None:
    """Raise an UnsupportedModelError if somebody wants gradients, or dropout, through a LouverCache."""
    if keys.requires_grad or dropout:
        raise UnsupportedModelError(
            "a LouverCache does not take part in training; call model.eval() and decode under torch.no_grad()"
        )


def name_of(config: PreTrainedConfig) -> str:
    """What to call the model in a message."""
    architectures = getattr(config, "architectures", None)
    return architectures[0] if architectures else f"a model of type {config.model_type!r}"
