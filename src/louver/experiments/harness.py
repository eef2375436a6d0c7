"""lm-evaluation-harness asks, and every token after a prompt is a decode step of a LouverCache.

Generation: the harness's own batches, left-padded, with a LouverCache handed to ``model.generate``. Loglikelihood: a dense pass over context
and continuation, as the harness does it by default, would never meet a decode step. So the context is read as any prompt, densely, and the
continuation's tokens are decoded one by one, each fed the one before it; what is scored is the model as it would have written them.
Continuations of one context share its reading. A rolling loglikelihood has a context of one token: its whole text is decoded.

Needs the extra ``eval``.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models import huggingface
from torch import Tensor
from tqdm import tqdm

from louver.experiments.decoding import prefill
from louver.integrations.transformers import LouverCache

HFLM: Any = huggingface.HFLM  # the harness's decorator hides its type


@dataclass(kw_only=True)
class Tally:
    """What all decode steps read together."""

    num_steps: int = 0  # attended layers x steps
    num_exact: int = 0
    num_keys: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0

    def add(self, cache: LouverCache) -> None:
        """Count a cache's steps, once it is done with."""
        summary = cache.summary()
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(summary, name))


class LouverLM(HFLM):
    """A causal model of transformers', decoding through caches of one kind.

    Args:
        model: attached to Louver.
        tokenizer: the model's.
        make_cache: a new LouverCache for each batch or context.
        **options: passed on to HFLM, such as ``max_length`` and ``batch_size``.
    """

    def __init__(self, model: Any, tokenizer: Any, make_cache: Callable[[], LouverCache], **options: Any) -> None:
        logger = logging.getLogger(huggingface.__name__)
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns that the model is there already
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
        logger.setLevel(level)
        self.make_cache = make_cache
        self.tally = Tally()

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        cache = self.make_cache()
        written = super()._model_generate(context, max_length, stop, **generation_kwargs, **cache.kwargs())
        self.tally.add(cache)
        return written

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each (text, context, continuation) the log-probability of the continuation, and whether it is the greedy one."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            kept = (context + continuation)[-(self.max_length + 1) :]  # as HFLM cuts what does not fit
            by_context[tuple(kept[: len(kept) - len(continuation)])].append(place)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Decoding continuations")
        for context, places in by_context.items():
            cache = self.make_cache()
            *before, last = context
            if before:
                prefill(self.model, cache, torch.tensor([before]))
            for place in places:
                text, _, continuation = requests[place]
                answers[place] = self._decoded(cache, last, continuation)
                if text is not None:  # of a rolling window
                    self.cache_hook.add_partial("loglikelihood", text, answers[place])
                cache.crop(-len(continuation))
                bar.update()
            self.tally.add(cache)
        bar.close()
        return answers

    def _decoded(self, cache: LouverCache, feed: int, continuation: list[int]) -> tuple[float, bool]:
        """Decode the continuation after the token feed, forced; float64 sum of its log-probabilities."""
        total, greedy = 0.0, True
        with torch.no_grad():
            for token in continuation:
                ids = torch.tensor([[feed]], device=self.device)
                logits = self.model(input_ids=ids, use_cache=True, **cache.kwargs()).logits[0, -1]
                total += float(logits.double().log_softmax(-1)[token])
                greedy = greedy and int(logits.argmax()) == token
                feed = token
        return total, greedy
