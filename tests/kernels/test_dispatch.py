"""Which steps the GPU backend attends densely: by the rows that its costs are fitted to."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "scripts"))

import crossover as fit

from louver.kernels.triton.crossover import DENSE, STEPS, is_short

MEASURED = fit.times()


@pytest.mark.parametrize("kind", ["dense", *STEPS])
def test_costs_are_those_fitted_to_the_rows(kind):
    assert fit.fitted(kind, MEASURED) == (DENSE if kind == "dense" else STEPS[kind])


@pytest.mark.parametrize("kind", STEPS)
def test_no_measured_shape_is_slower_than_the_best_dense_kernel(kind):
    gains = {shape: by["best"] / by[kind] for shape, by in MEASURED.items() if kind in by}
    taken = [gain for shape, gain in gains.items() if not is_short(kind, *shape)]
    left = [gain for shape, gain in gains.items() if is_short(kind, *shape)]
    assert len(taken) >= (5 if kind == "looks" else 30)
    assert min(taken) > 0.99
    assert max(left) < 1.4  # what is left of the gain just below, and of rows too short
    assert min(left) < 0.9  # a control: there is something to leave


@pytest.mark.parametrize("kind", STEPS)
def test_what_counts_is_the_whole_batch(kind):
    assert is_short(kind, 8, 8192, 4, 128)
    assert not is_short(kind, 8, 40000, 4, 128)
    assert not is_short(kind, 32 * 8, 8192, 4, 128)
    assert is_short(kind, 64 * 8, 256, 4, 128)


def test_how_long_a_single_row_is_dense_is_what_the_readme_says():
    longest = {
        kind: max(n for n in range(1024, 65536, 1024) if is_short(kind, 8, n, 4, 128)) for kind in ("drop", "keep")
    }
    said = "Up to {drop:,} such tokens a step runs dense ({keep:,} with `exact`)".format(**longest)
    assert said in (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
