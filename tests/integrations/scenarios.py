"""Ways people use a cache, as functions (model, prompts, cache) -> tokens, so that two caches can be told to do the same."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, LlamaModel, PreTrainedModel


@dataclass(frozen=True)
class Prompts:
    """Three prompts of different lengths, and a follow-up for a second turn."""

    rows: list[Tensor]  # int64 [length]
    follow_up: Tensor  # int64 [1, length]
    pad: int

    @property
    def single(self) -> dict[str, Tensor]:
        ids = self.rows[0][None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @property
    def left_padded(self) -> dict[str, Tensor]:
        longest = max(len(row) for row in self.rows)
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=self.pad) for row in self.rows])
        lengths = torch.tensor([len(row) for row in self.rows])
        mask = (torch.arange(longest) >= (longest - lengths)[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}


def as_argument(cache: Cache) -> dict[str, Cache]:
    """Any cache as a keyword argument, under the name the installed transformers uses."""
    parameters = inspect.signature(LlamaModel.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Cache, new: int, **options) -> Tensor:
    """new more tokens, greedily unless options say otherwise."""
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new} | options
    return model.generate(**inputs, **as_argument(cache), **options)


def _continue(tokens: Tensor, more: Tensor | None = None) -> dict[str, Tensor]:
    ids = tokens if more is None else torch.cat([tokens, more], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(model, prompts: Prompts, cache: Cache) -> Tensor:
    return generate(model, prompts.single, cache, 20)


def sampling(model, prompts: Prompts, cache: Cache) -> Tensor:
    torch.manual_seed(3)
    return generate(model, prompts.single, cache, 20, do_sample=True, temperature=1.3, top_k=50)


def left_padded_batch(model, prompts: Prompts, cache: Cache) -> Tensor:
    return generate(model, prompts.left_padded, cache, 16)


def beams(model, prompts: Prompts, cache: Cache) -> Tensor:
    return generate(model, prompts.single, cache, 16, num_beams=3, num_return_sequences=3)


def padded_beams(model, prompts: Prompts, cache: Cache) -> Tensor:
    return generate(model, prompts.left_padded, cache, 8, num_beams=3)


def second_turn(model, prompts: Prompts, cache: Cache) -> Tensor:
    first = generate(model, prompts.single, cache, 10)
    return generate(model, _continue(first, prompts.follow_up), cache, 10)


def crop_and_regenerate(model, prompts: Prompts, cache: Cache) -> Tensor:
    """Go back into the prompt and on from there. (A sliding window has forgotten what it would need for that.)"""
    generate(model, prompts.single, cache, 10)
    keep = prompts.rows[0].shape[0] - 3
    cache.crop(keep - cache.get_seq_length())
    return generate(model, _continue(prompts.single["input_ids"][:, :keep], prompts.follow_up), cache, 10)


def roll_back(model, prompts: Prompts, cache: Cache) -> Tensor:
    """Take back some of the last call's tokens, as assisted decoding does after every call."""
    generate(model, prompts.single, cache, 10)
    cache.activate_past_recording()
    tokens, calls = [], [prompts.follow_up] + [None] * 10
    with torch.no_grad():
        for call in calls:
            logits = model(tokens[-1] if call is None else call, **as_argument(cache)).logits
            cache.crop(0 if call is None else -4)
            tokens.append(logits[:, -1 if call is None else -5].argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)


def deepcopy_and_continue(model, prompts: Prompts, cache: Cache) -> Tensor:
    first = generate(model, prompts.single, cache, 6)
    twin = copy.deepcopy(cache)
    one = generate(model, _continue(first, prompts.follow_up), twin, 8)
    other = generate(model, _continue(first, prompts.follow_up.flip(1)), cache, 8)
    return torch.cat([one, other])


def prompt_lookup(model, prompts: Prompts, cache: Cache) -> Tensor:
    return generate(model, prompts.single, cache, 24, prompt_lookup_num_tokens=4)


def repeated_rows(model, prompts: Prompts, cache: Cache) -> Tensor:
    """One prefill, many samples: repeat the rows, then keep two of them."""
    first = generate(model, prompts.single, cache, 4)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    two = torch.cat([prompts.follow_up, prompts.follow_up.flip(1)])
    return generate(model, _continue(first.repeat(2, 1), two), cache, 8)


SCENARIOS: list[Callable[[PreTrainedModel, Prompts, Cache], Tensor]] = [
    greedy,
    sampling,
    left_padded_batch,
    beams,
    padded_beams,
    second_turn,
    crop_and_regenerate,
    roll_back,
    deepcopy_and_continue,
    prompt_lookup,
    repeated_rows,
]
