"""``attach``: the one call that makes a transformers model decode through Louver."""

import os
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from louver.integrations.transformers import hook
from louver.integrations.transformers.cache import LouverCache
from louver.integrations.transformers.support import check_model, name_of, takes_sdpa
from louver.integrations.transformers.tuning import PolicyChoice, read_tuning
from louver.policies import DEFAULT_POLICY


def attach(
    model: nn.Module,
    policy: PolicyChoice = DEFAULT_POLICY,
    *,
    tuning: str | os.PathLike[str] | None = None,
    **options: Any,
) -> LouverCache:
    """Make model attend through Louver and return a cache for it.

    The model's weights and code stay as they are; only its attention implementation is set to "louver" (undo with
    ``model.set_attn_implementation("sdpa")``). Without a LouverCache the model attends densely, as with "sdpa".

    Args:
        model: a decoder-only model of transformers' (or something that wraps one and passes its attributes on).
        policy: what a decode step keeps, such as ``exact:0.01`` (results), or one per layer (see LouverCache).
        tuning: take the policies from this file, which ``louver tune`` wrote, instead.
        **options: passed on to LouverCache, such as ``index="ball"``.

    Raises:
        UnsupportedModelError: the model does not do plain softmax attention.
        PolicyError: the policy cannot be read, or needs a sketch and ``index`` is another.
        InputFileError: there is no such tuning, or it is another model's.
    """
    decoder = check_model(model)
    if tuning is not None:
        policy = read_tuning(tuning, decoder.config)
    cache = LouverCache(decoder.config, policy, **options)
    hook.register()
    if takes_sdpa(decoder):
        decoder.set_attn_implementation(_for_text(decoder.config))
    if decoder.config.get_text_config(decoder=True)._attn_implementation != hook.NAME:
        cache.warn_unreached(f"{name_of(decoder.config)} does not use transformers' attention interface")
    return cache


def _for_text(config: PreTrainedConfig) -> str | dict[str, str]:
    """The setting for the text decoder; the image and audio towers of a multimodal model keep theirs."""
    text = config.get_text_config(decoder=True)
    for name in config.sub_configs:
        if getattr(config, name, None) is text and text is not config:
            return {name: hook.NAME}
    return hook.NAME
