"""Captures small enough for a test: a few heads of structured random data, or a tiny model reading a few words."""

import torch

from louver.experiments.capture import Capture, Layer


def tiny_capture(
    kv_len: int = 600, num_queries: int = 64, head_dim: int = 32, layers: tuple[int, ...] = (0, 3)
) -> Capture:
    """Two KV heads with three query heads each; keys with channel offsets, queries near some keys."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def layer() -> Layer:
        keys = normal(2, kv_len, head_dim) + 3 * normal(2, 1, head_dim)
        near = keys[:, torch.randint(kv_len, (3 * num_queries,), generator=generator)]
        queries = near.reshape(2, 3, num_queries, head_dim).flatten(0, 1) + normal(6, num_queries, head_dim)
        return Layer(queries=queries, keys=keys, values=normal(2, kv_len, head_dim))

    return Capture(
        model="random",
        softmax_scale=head_dim**-0.5,
        query_positions=torch.arange(kv_len - num_queries, kv_len),
        layers={i: layer() for i in layers},
    )
