"""Policies: what a decode step keeps, chosen from this step's bounds. One idea, one file; ``parse`` reads specifications."""

from louver.policies.base import BasePolicy, Dense
from louver.policies.budget import Budget
from louver.policies.exact_fraction import ExactFraction
from louver.policies.fixed import Fixed
from louver.policies.mass import Mass
from louver.policies.output_error import OutputError
from louver.policies.per_head import PerHead
from louver.policies.relative import Relative
from louver.policies.sampled import SampleBudget, Sampled, SampleGap, SampleMax, SampleMeanMax, SampleTopK
from louver.policies.spec import DEFAULT_POLICY, parse
from louver.policies.topk import TopK
from louver.policies.union import Union

__all__ = [
    "DEFAULT_POLICY",
    "BasePolicy",
    "Budget",
    "Dense",
    "ExactFraction",
    "Fixed",
    "Mass",
    "OutputError",
    "PerHead",
    "Relative",
    "SampleBudget",
    "SampleGap",
    "SampleMax",
    "SampleMeanMax",
    "SampleTopK",
    "Sampled",
    "TopK",
    "Union",
    "parse",
]
