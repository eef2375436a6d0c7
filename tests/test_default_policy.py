"""Where no policy is named, every door takes the same one."""

import inspect
from pathlib import Path

import pytest
import torch

import louver
from louver.cli.defaults import POLICY_HELP, default_policy
from louver.cli.evaluate import evaluate
from louver.experiments import demo, evaluation, generation
from louver.integrations.transformers import LouverCache, attach
from louver.integrations.vllm.settings import Settings, settings_of
from louver.policies import DEFAULT_POLICY, parse

DOORS = {
    "attend": inspect.signature(louver.attend).parameters["policy"].default,
    "LouverAttention": inspect.signature(louver.LouverAttention).parameters["policy"].default,
    "attach": inspect.signature(attach).parameters["policy"].default,
    "LouverCache": inspect.signature(LouverCache).parameters["policy"].default,
    "vLLM's settings": Settings().policy,
    "vLLM's additional config": getattr(settings_of({"louver": True}, {}), "policy", None),
    "louver generate, louver demo": default_policy("sketch"),
    "generation": generation.Config(model="demo", prompt_file=Path("text.txt")).policy,
    "demo": demo.Config().policy,
    "louver eval": inspect.signature(evaluate).parameters["policy"].default.removeprefix("dense,"),
    "evaluation": evaluation.Config(model="demo", tasks=()).policies[-1],
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_the_same_default(door):
    assert DOORS[door] == DEFAULT_POLICY


def test_the_default_is_canonical_drops_nothing_and_is_what_a_step_takes():
    policy = parse(DEFAULT_POLICY)
    assert policy.spec == DEFAULT_POLICY and DEFAULT_POLICY in POLICY_HELP
    assert not policy.drops and policy.guarantee == "certified"
    assert policy.rule() is not None, "every backend's fused step takes a rule; a default without one would leave it"
    torch.manual_seed(0)
    keys, values, q = torch.randn(1, 2, 700, 64), torch.randn(1, 2, 700, 64), torch.randn(1, 4, 64)
    index = louver.SketchIndex.build(keys, values, backend="reference")
    step, named = louver.attend(q, index), louver.attend(q, index, policy=DEFAULT_POLICY)
    assert torch.equal(step.out, named.out) and torch.equal(step.certificate, named.certificate)
    assert not torch.equal(step.out, louver.attend(q, index, policy="exact:0.2").out)
