"""Ways to serve a model's decode steps, by name: Louver's policies and everything they are compared with.

``dense``, any policy (``exact:0.01``, ``budget:0.1`` ...), caches in fewer bits (``fp8``, ``kivi4``), and the baselines that pick keys
(``streaming:0.2``, ``quest:0.2`` ...). All of them are LayerAttentions, so one cache and one attention hook serve all.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

from louver.attention import DenseAttention, LouverAttention
from louver.errors import PolicyError
from louver.experiments.baselines import NAMES as BASELINES
from louver.experiments.baselines import served
from louver.experiments.baselines.coded import CODES, CodedAttention
from louver.experiments.baselines.ivf import TorchIvf
from louver.policies import parse
from louver.policies.spec import known_policies
from louver.protocols import Guarantee, LayerAttention

_POLICIES = re.findall(r"^[\w-]+", "\n".join(known_policies()), re.MULTILINE)
NAMES = (*_POLICIES, *CODES, *BASELINES, "torch-ivf")  # what a specification can begin with
_SETTINGS = ("policy", "budget", "p")  # of a LayerAttention: what a step keeps, not what it knows


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to serve decode steps."""

    spec: str  # canonical
    family: str  # methods of one family differ in what a step keeps, and can share what was prepared
    guarantee: Guarantee
    make: Callable[[int], LayerAttention]  # layer_idx -> a new layer

    def like(self, layer_idx: int, prepared: LayerAttention) -> LayerAttention:
        """A layer of this method that shares the tokens, and what was made of them, with one of the same family."""
        twin, mine = copy.copy(prepared), self.make(layer_idx)
        for name in _SETTINGS:
            if hasattr(mine, name):
                setattr(twin, name, getattr(mine, name))
        return twin


def method(spec: str, backend: str = "auto") -> Method:
    """The method a specification names.

    Raises:
        PolicyError: there is none.
    """
    family = re.split(r"[^\w-]", spec, maxsplit=1)[0]
    if family not in NAMES:
        raise PolicyError(f"no method {family!r}; there are {', '.join(NAMES)}")
    if spec == "dense":
        return Method(spec=spec, family="dense", guarantee="exact", make=lambda _: DenseAttention())
    if spec in CODES:
        return Method(spec=spec, family=spec, guarantee="none", make=lambda _: CodedAttention(CODES[spec]()))
    if family == "torch-ivf":
        return Method(spec=spec, family=family, guarantee="none", make=TorchIvf.factory(spec))
    if family in BASELINES:
        return Method(spec=spec, family=family, guarantee="none", make=served(spec))
    policy = parse(spec)
    return Method(
        spec=policy.spec,
        family="louver-retrieval" if policy.drops else "louver",  # a sketch without values serves retrieval alone
        guarantee=policy.guarantee,
        make=lambda _: LouverAttention(policy, backend=backend),
    )
