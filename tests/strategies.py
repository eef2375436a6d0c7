"""Hypothesis strategies that every room draws its hard cases from."""

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from helpers import TRAITS, Case, build_case
from louver.shapes import DTYPES
from louver.sketch import SketchConfig

settings.register_profile(
    "louver",
    max_examples=int(os.environ.get("LOUVER_EXAMPLES", "10")),
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("louver")

HEAD_DIMS = (64, 33, 60, 80, 96, 128, 256)
FRAME_LENS = (8, 16, 21, 32, 128)


def traits(allowed: tuple[str, ...] = TRAITS) -> st.SearchStrategy[frozenset[str]]:
    """A few traits at once."""
    return st.sets(st.sampled_from(allowed), max_size=4).map(frozenset)


@st.composite
def configs(draw) -> SketchConfig:
    return SketchConfig(
        frame_len=draw(st.sampled_from(FRAME_LENS)),
        slice_dims=draw(st.sampled_from((64, 32, 7, 1, 256))),
        metric=draw(st.sampled_from(("frame", "diagonal", "identity"))),
        clip=draw(st.booleans()),
    )


@st.composite
def cases(draw, allowed: tuple[str, ...] = TRAITS, ragged: bool | None = None, max_blocks: int = 5) -> Case:
    """Lengths lie at block ends and one off them; everything else is drawn freely."""
    config = draw(configs())
    blocks = draw(st.integers(0, max_blocks if config.frame_len < 128 else 2))
    kv_len = max(0, blocks * config.frame_len + draw(st.sampled_from((0, 1, -1, 5))))
    return build_case(
        draw(st.integers(0, 2**16)),
        kv_len=kv_len,
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        group_size=draw(st.integers(1, 8)),
        num_kv_heads=draw(st.integers(1, 2)),
        batch=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(DTYPES)),
        traits=draw(traits(allowed)),
        ragged=draw(st.booleans()) if ragged is None else ragged,
        config=config,
    )


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
