"""Several methods after one prompt: what was prepared for one is shared with the others of its family."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from louver.experiments.branching import Decoded, Layers, Prompt
from louver.experiments.methods import Method


def in_families(methods: Sequence[Method]) -> list[Method]:
    """The methods, those of one family side by side, families in the order they first come up."""
    order = list(dict.fromkeys(method.family for method in methods))
    return sorted(methods, key=lambda method: order.index(method.family))


def compare(
    prompt: Prompt, methods: Sequence[Method], decode: Callable[[Layers], Decoded]
) -> Iterator[tuple[Method, Decoded]]:
    """decode(layers) for each method; dense decodes on the recorded layers themselves."""
    family, prepared = "", {}
    for method in in_families(methods):
        if method.family == "dense":
            yield method, decode(prompt.recorded)
            continue
        if method.family != family:
            prepared = {}  # give the memory back before more is taken
            family, prepared = method.family, prompt.served_by(method.make)
        yield method, decode({i: method.like(i, layer) for i, layer in prepared.items()})


def forced(prompt: Prompt, methods: Sequence[Method], tokens: Tensor) -> Iterator[tuple[Method, Decoded]]:
    """Every method, fed the same tokens [batch, steps]."""
    return compare(prompt, methods, lambda layers: prompt.forced(layers, tokens))
