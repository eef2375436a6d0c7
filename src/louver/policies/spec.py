"""Policy specifications, the same in Python and on the command line: ``name[:argument][+option:value ...]``.

``A|B`` keeps what A or B keeps (quote it in a shell): ``topk:20|mass:0.01+sinks:4``. ``A/B`` is for the heads of a layer in order:
``exact:0.01/exact:0.05`` gives the first half of the KV heads one policy and the second half another.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from louver.errors import PolicyError
from louver.policies.base import BasePolicy, Dense
from louver.policies.budget import Budget
from louver.policies.exact_fraction import ExactFraction
from louver.policies.fixed import Fixed
from louver.policies.mass import Mass
from louver.policies.output_error import OutputError
from louver.policies.per_head import PerHead
from louver.policies.relative import Relative
from louver.policies.sampled import SampleBudget, SampleGap, SampleMax, SampleMeanMax, SampleTopK
from louver.policies.topk import TopK
from louver.policies.union import Union, most
from louver.protocols import Policy

DEFAULT_POLICY = "exact:0.01+unread:0.05"  # where none is named, at every door; docs/policies.md says why

# name -> (class, the field its argument sets, how the argument is read, what it means)
_POLICIES: dict[str, tuple[type[BasePolicy], str | None, Callable[[str], float | int], str]] = {
    "exact": (ExactFraction, "fraction", float, "exact:F  nothing dropped; the share F with the highest bounds exact"),
    "dense": (Dense, None, float, "dense  every key exact, no sketch read"),
    "topk": (TopK, "k", int, "topk:K  keep the K largest scores"),
    "budget": (Budget, "fraction", float, "budget:F  keep the share F with the largest scores"),
    "error": (
        OutputError,
        "error",
        float,
        "error:EPS  nothing dropped; exact enough to certify a relative error of EPS",
    ),
    "mass": (Mass, "dropped_mass", float, "mass:EPS  certified to drop at most EPS of the softmax mass"),
    "relative": (Relative, "nats", float, "relative:N  keep the keys within N nats of the best logit"),
    "fixed": (Fixed, "tau", float, "fixed:X  keep every key with q.k >= X"),
    "sample-max": (SampleMax, None, float, "sample-max  keep what reaches a sample's largest score (an estimate)"),
    "sample-topk": (SampleTopK, "k", int, "sample-topk:K  ... its K-th largest score (an estimate)"),
    "sample-mean-max": (SampleMeanMax, None, float, "sample-mean-max  ... halfway from its mean to that (an estimate)"),
    "sample-gap": (SampleGap, None, float, "sample-gap  ... the score above its widest gap (an estimate)"),
    "sample-budget": (
        SampleBudget,
        "fraction",
        float,
        "sample-budget:F  ... what a share F of it reaches (an estimate)",
    ),
}
_OPTIONS: dict[str, tuple[str, Callable[[str], float | int]]] = {
    "sinks": ("sinks", int),
    "recent": ("recent", int),
    "unread": ("unread_mass", float),
    "size": ("size", int),
    "seed": ("seed", int),
}


def parse(spec: str | Policy) -> Policy:
    """The policy a specification names; a policy is returned as it is.

    Raises:
        PolicyError: the specification cannot be read; the message lists what can.

    Example:
        >>> parse("exact:0.01+sinks:4")
        ExactFraction(sinks=4, recent=0, fraction=0.01, unread_mass=0.1)
    """
    if isinstance(spec, str):
        return _read(spec)
    if isinstance(spec, (BasePolicy, Policy)):  # asking the protocol alone takes microseconds
        return spec
    raise PolicyError(f"policy={spec!r} is neither a specification such as 'exact:0.01' nor a Policy")


@lru_cache(maxsize=256)  # every step parses its policy, and policies are frozen
def _read(spec: str) -> Policy:
    for sign, joined in (("/", PerHead), ("|", Union)):
        if sign in spec:
            members = tuple(parse(part) for part in spec.split(sign))
            return joined(members=members, **most(members))  # pyright: ignore[reportReturnType] - drops as they do
    # A plus sign inside a number (fixed:1e+5) is not a separator.
    head, *options = re.split(r"(?<![0-9.][eE])\+", spec.strip())
    name, _, argument = head.partition(":")
    if name not in _POLICIES:
        raise PolicyError(
            f"unknown policy {name!r} in {spec!r}; known: {', '.join(usage.split()[0] for usage in known_policies())}"
        )
    policy, field, read, usage = _POLICIES[name]
    if (field is None) != (argument == ""):
        raise PolicyError(f"{spec!r} cannot be read; usage: {usage}")
    arguments: dict[str, Any] = {} if field is None else {field: _number(argument, read, spec, usage)}
    allowed = {f.name for f in dataclasses.fields(policy)}
    for option in options:
        key, _, value = option.partition(":")
        target = _OPTIONS.get(key)
        if target is None or target[0] not in allowed:
            choices = ", ".join(f"+{k}:N" for k, (f, _) in _OPTIONS.items() if f in allowed)
            raise PolicyError(f"unknown option {key!r} in {spec!r}; {name} takes {choices}")
        arguments[target[0]] = _number(value, target[1], spec, f"+{key}:N")
    return policy(**arguments)


def known_policies() -> list[str]:
    """One line of usage per policy."""
    return [usage for *_, usage in _POLICIES.values()]


def _number(text: str, read: Callable[[str], float | int], spec: str, usage: str) -> float | int:
    try:
        return read(text)
    except ValueError:
        wanted = "a whole number" if read is int else "a number"
        raise PolicyError(f"{text!r} in {spec!r} is not {wanted}; usage: {usage}") from None
