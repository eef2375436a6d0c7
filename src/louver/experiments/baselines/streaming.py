"""StreamingLLM: the first tokens (sinks) and a window of the last ones.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453; four sinks, as there. Kept tokens hold
their positions in the text (the paper renumbers them, which matters beyond the model's context only). Guarantee: none. Cost:
nothing but the tokens kept; the choice does not look at a key.
"""

import torch

from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting, check_budget, num_kept
from louver.shapes import Query

SINKS = 4


class StreamingLLM(Selecting):
    """Attends the sinks and the window, together ``budget`` (a share of the tokens, or a number of them)."""

    def __init__(self, budget: float | int, *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.budget = check_budget(budget)

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """The same tokens for every head."""
        place, length = valid.cumsum(-1) - 1, valid.sum(-1, keepdim=True)
        count = num_kept(self.budget, length)
        sinks = count.clamp(max=SINKS)
        kept = (place < sinks) | (place >= length - (count - sinks))
        return torch.as_tensor(kept & valid)[:, None].expand(-1, q.shape[1], -1)
