"""``attach``: the one call that makes a transformers model decode through Louver."""

from typing import Any

from transformers import PreTrainedModel

from louver.integrations.transformers import hook
from louver.integrations.transformers.cache import LouverCache
from louver.integrations.transformers.support import check_model, name_of
from louver.protocols import Policy


def attach(model: PreTrainedModel, policy: str | Policy = "exact:0.01", **options: Any) -> LouverCache:
    """Make model attend through Louver and return a cache for it.

    The model's weights and code stay as they are; only its attention implementation is set to "louver" (undo with
    ``model.set_attn_implementation("sdpa")``). Without a LouverCache the model attends densely, as with "sdpa".

    Args:
        model: a decoder-only model.
        policy: what a decode step keeps, such as ``exact:0.01`` (results).
        **options: passed on to LouverCache.

    Raises:
        UnsupportedModelError: the model does not do plain softmax attention.
        PolicyError: the policy cannot be read.
    """
    check_model(model)
    cache = LouverCache(model.config, policy, **options)
    hook.register()
    model.set_attn_implementation(_for_text(model))
    if model.config.get_text_config(decoder=True)._attn_implementation != hook.NAME:
        cache.warn_unreached(f"{name_of(model.config)} does not use transformers' attention interface")
    return cache


def _for_text(model: PreTrainedModel) -> str | dict[str, str]:
    """The setting for the text decoder; the image and audio towers of a multimodal model keep theirs."""
    text = model.config.get_text_config(decoder=True)
    for name in model.config.sub_configs:
        if getattr(model.config, name, None) is text and text is not model.config:
            return {name: hook.NAME}
    return hook.NAME
