"""Policies: what a decode step keeps, chosen from this step's bounds. One idea, one file; ``parse`` reads specifications."""

from louver.policies.base import BasePolicy, Dense
from louver.policies.budget import Budget
from louver.policies.exact_fraction import ExactFraction
from louver.policies.fixed import Fixed
from louver.policies.spec import parse
from louver.policies.topk import TopK

__all__ = ["BasePolicy", "Budget", "Dense", "ExactFraction", "Fixed", "TopK", "parse"]
