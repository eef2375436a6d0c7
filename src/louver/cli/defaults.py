"""What commands that decode have in common: which policy goes with which index where none is named."""

POLICY_HELP = "What a decode step keeps. Default: exact:0.01, which drops nothing; budget:0.1 without a sketch."
INDEX_HELP = (
    "What finds keys: sketch; ball (the paper's, in 16 subspaces) or flat (no index) for policies that drop keys."
)


def default_policy(index: str) -> str:
    """Only a sketch can keep what it does not read exactly; other indexes retrieve."""
    return "exact:0.01" if index == "sketch" else "budget:0.1"
