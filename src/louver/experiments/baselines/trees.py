"""KD-tree and ball tree of scikit-learn, asked for the largest inner products.

Sources: Bentley 1975; Omohundro 1989; inner products become distances by one more channel that gives every key the same norm (Bachrach
et al., RecSys 2014). The search is exact in real arithmetic, with nothing proven about rounding, hence guarantee "none"; what it shows is
how much of such a tree a query of a language model visits. Cost: a bound per node visited, a key per distance computed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting, check_budget, num_kept
from louver.shapes import Query

KINDS = ("kdtree", "balltree")
LEAF_KEYS = 40  # scikit-learn's default


class Tree(Selecting):
    """Attends the ``budget`` (a share of the tokens, or a number of them) keys with the largest scores. One row, no growth."""

    def __init__(self, kind: str, budget: float | int, *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        if kind not in KINDS:
            raise PolicyError(f"kind={kind!r} is unknown; wanted one of {', '.join(KINDS)}")
        self.kind, self.budget = kind, check_budget(budget)
        self._trees: list[Any] = []  # by row and KV head
        self._built_for = 0
        self._visited: list[tuple[int, int]] = []  # keys compared and bytes of nodes, by row and KV head

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """The trees' own answer; they are built anew whenever the tokens changed."""
        keys = self.store.keys
        batch, num_kv_heads, length, head_dim = keys.shape
        if not valid.all():
            raise PolicyError("a tree takes rows without padding")
        if self._built_for != length:
            self._trees = [self._build(keys[row, head]) for row in range(batch) for head in range(num_kv_heads)]
            self._built_for = length
        k = int(num_kept(self.budget, torch.tensor(length)))
        mask, self._visited = (
            torch.zeros(batch * num_kv_heads, q.shape[1] // num_kv_heads, length, dtype=torch.bool),
            [],
        )
        node_bytes = 2 * head_dim * (2 if self.kind == "kdtree" else 1)
        for i, tree in enumerate(self._trees):
            asked = q.reshape(len(self._trees), -1, head_dim)[i]
            before = _visits(tree)
            found = tree.query(np.pad(asked.double().numpy(), ((0, 0), (0, 1))), k=k, return_distance=False)
            distances, nodes = (after - was for after, was in zip(_visits(tree), before, strict=True))
            mask[i].scatter_(1, torch.from_numpy(found.astype(np.int64)), True)
            self._visited.append((distances, nodes * node_bytes))
        return mask.view(batch, -1, length)

    def index_bytes(self, valid: RowMask) -> Tensor:
        """Nodes that the searches of a group visited."""
        return torch.tensor(self._visited)[:, 1].view(valid.shape[0], -1)

    def compared(self, valid: RowMask) -> Tensor:
        """Keys that the searches of a group compared, as if no two compared the same."""
        return torch.tensor(self._visited)[:, 0].view(valid.shape[0], -1)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        super().truncate(kv_len)
        self._built_for = 0

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        super().select_batch(ids)
        self._built_for = 0

    def _build(self, keys: Tensor) -> Any:
        from sklearn.neighbors import BallTree, KDTree

        points = keys.double()
        square = points.square().sum(-1, keepdim=True)
        even = torch.cat([points, (square.max() - square).clamp_min(0).sqrt()], 1)
        return (KDTree if self.kind == "kdtree" else BallTree)(even.numpy(), leaf_size=LEAF_KEYS)


def _visits(tree: Any) -> tuple[int, int]:
    """Distances computed and nodes looked at since the tree was built."""
    trims, leaves, splits = tree.get_tree_stats()
    return tree.get_n_calls(), trims + leaves + splits
