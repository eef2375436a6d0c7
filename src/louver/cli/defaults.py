"""What commands that decode have in common: which policy goes with which index where none is named."""

from louver.policies import DEFAULT_POLICY

_RETRIEVAL = "budget:0.1"
POLICY_HELP = (
    f"What a decode step keeps. Default: {DEFAULT_POLICY}, which drops nothing; {_RETRIEVAL} without a sketch."
)
INDEX_HELP = (
    "What finds keys: sketch; ball (the paper's, in 16 subspaces) or flat (no index) for policies that drop keys."
)


def default_policy(index: str) -> str:
    """Only a sketch can keep what it does not read exactly; other indexes retrieve."""
    return DEFAULT_POLICY if index == "sketch" else _RETRIEVAL
