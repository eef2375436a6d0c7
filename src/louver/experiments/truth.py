"""What a measured step of a capture is compared with: the output in float64; and the index that serves it."""

from torch import Tensor

from louver.experiments.capture import Capture, Layer
from louver.index.sketch import SketchIndex


def attention(q: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Scores [num_q_heads, n] and outputs [num_q_heads, head_dim] of q [num_q_heads, head_dim] in float64."""
    scores = q.double().unflatten(0, (keys.shape[0], -1)) @ keys.mT
    return scores.flatten(0, 1), ((scores * softmax_scale).softmax(-1) @ values).flatten(0, 1)


def sketch_of(capture: Capture, layer: Layer, backend: str) -> SketchIndex:
    """One index over all keys, its metric from the fitting queries."""
    keys, values = layer.keys[None].float(), layer.values[None].float()
    return SketchIndex.build(keys, values, layer.queries[None, :, capture.fitting()].float(), backend=backend)
