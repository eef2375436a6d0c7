"""The data behind attention.png: where in the text each layer spent exact attention, small enough to keep in a JSON file."""

from typing import Any

import torch
from torch import Tensor

from louver.experiments.audit import Audit
from louver.experiments.document import Prompt

_MAX_BINS = 240
_PASSAGE_TOKENS = 96
_SINK_TOKENS = 16  # every model looks at the first tokens, whatever they say
_RECENT_TOKENS = 256  # the newest are exact in any case


def picture(tokenizer: Any, audit: Audit, prompt: Prompt, num_steps: int, num_q_heads: int) -> dict[str, Any]:
    """Counts of exact tokens per layer and step, their density over positions, and one passage token by token.

    A density is the share of (query head, step) pairs that took a token exactly.
    """
    layers = sorted(audit.exact_positions)
    taken = torch.stack([_fit(audit.exact_positions[i], prompt.num_tokens) for i in layers])
    density = taken.double() / (num_steps * num_q_heads)
    bin_tokens = -(-prompt.num_tokens // _MAX_BINS)
    return {
        "layers": layers,
        "exact_tokens": [[s.num_layer_exact for s in audit.steps if s.layer == i] for i in layers],
        "num_tokens": prompt.num_tokens,
        "bin_tokens": bin_tokens,
        "density": [[round(float(part.mean()), 5) for part in row.split(bin_tokens)] for row in density],
        "document": prompt.document,
        "sections": prompt.sections,
        "answer": prompt.answer,
        "passage": _passage(tokenizer, density.mean(0), prompt),
    }


def _passage(tokenizer: Any, density: Tensor, prompt: Prompt) -> dict[str, Any]:
    """The text around the answer or, where that is not known, the stretch of the document that was read exactly most."""
    first = prompt.document[0] + _SINK_TOKENS
    last = max(first + 1, min(prompt.document[1], prompt.num_tokens - _RECENT_TOKENS))
    if prompt.answer is not None:
        middle = sum(prompt.answer) // 2
    else:
        width = min(_PASSAGE_TOKENS, last - first)
        middle = first + int(density[first:last].unfold(0, width, 1).mean(1).argmax()) + width // 2
    start = max(prompt.document[0], middle - _PASSAGE_TOKENS // 2)
    end = min(prompt.document[1], start + _PASSAGE_TOKENS)
    ids = prompt.ids[0, start:end].tolist()
    return {
        "start": start,
        "tokens": [tokenizer.decode([token]) for token in ids],
        "density": [round(float(x), 5) for x in density[start:end]],
    }


def _fit(counts: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens: what was decoded later is not part of the text."""
    out = torch.zeros(length, dtype=torch.int64)
    out[: min(length, len(counts))] = counts[:length]
    return out
