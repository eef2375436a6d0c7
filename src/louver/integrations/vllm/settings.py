"""What a user can set, and where: an environment variable to turn Louver on, vLLM's --additional-config for everything."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from louver.attention.paged import check_policy
from louver.errors import PolicyError
from louver.policies import DEFAULT_POLICY

VARIABLE = "LOUVER_VLLM_POLICY"
KEY = "louver"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The plug-in's settings, checked."""

    policy: str = DEFAULT_POLICY  # what a decode step keeps (results)
    min_tokens: int = (
        0  # decode batches whose longest request is shorter are vLLM's own (results within the certificate)
    )
    frame_len: int | None = (
        None  # tokens per sketched block; None: 128, or 64 where the engine's pages ask for it (speed)
    )
    backend: str = "auto"  # which kernels (speed)
    log_interval_s: float = 10.0  # seconds between two lines in the log (nothing else)
    audit: bool = False  # repeat every step by brute force in float64 and count what was missed (very slow)

    def __post_init__(self) -> None:
        check_policy(self.policy)


def settings_of(additional_config: Any, environment: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings a user asked for, or None.

    Args:
        additional_config: vLLM's; its entry "louver" is a policy, or a mapping of settings, or true or false.
        environment: LOUVER_VLLM_POLICY gives the policy where additional_config has none.

    Raises:
        PolicyError: a setting is unknown, or makes no sense.
    """
    asked = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    policy = environment.get(VARIABLE, "").strip()
    if asked is False or (asked is None and not policy):
        return None
    given: dict[str, Any] = {"policy": policy} if policy else {}
    if isinstance(asked, str):
        given["policy"] = asked
    elif isinstance(asked, Mapping):
        given |= asked
    elif asked is not None and asked is not True:
        raise PolicyError(
            f'--additional-config: "louver" is {json.dumps(asked)}; wanted a policy or an object of settings'
        )
    known = [f.name for f in fields(Settings)]
    if unknown := sorted(set(given) - set(known)):
        raise PolicyError(
            f"--additional-config: unknown setting of louver: {', '.join(unknown)}; known: {', '.join(known)}"
        )
    return Settings(**given)
