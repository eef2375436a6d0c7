"""Whatever a caller can get wrong is one clear sentence, of an error that is a ValueError."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHAPE, FINITE, POLICY, BACKEND = "ShapeError", "NonFiniteError", "PolicyError", "BackendError"
EXPECTED = {
    "query of rank 4": (SHAPE, "(1, 4, 1, 64); wanted [batch, num_q_heads, head_dim]"),
    "query of another head_dim": (SHAPE, "head_dim=32 but the keys have head_dim=64"),
    "query of another batch": (SHAPE, "batch=2 but the keys have batch=1"),
    "query with its axes swapped": (SHAPE, "num_q_heads=3 is not a multiple of num_kv_heads=2; did you"),
    "query in float64": (SHAPE, "torch.float64; wanted float32, float16 or bfloat16"),
    "query on another device": (SHAPE, "different devices: q on meta, keys on cpu"),
    "tau on another device": (SHAPE, "different devices: tau on meta, q on cpu"),
    "query without heads": (SHAPE, "wanted at least one head and channel"),
    "query without channels": (SHAPE, "wanted at least one head and channel"),
    "an index of nothing": (SHAPE, "q has batch=1 but the keys have batch=0"),
    "a search of nothing": (SHAPE, "q has batch=1 but the keys have batch=0"),
    "a layer of nothing": (SHAPE, "q has batch=1 but the keys have batch=0"),
    "metric queries for nothing": (SHAPE, "metric_queries have shape (1, 4, 3, 64); wanted"),
    "tau per KV head": (SHAPE, "tau has shape (1, 2); wanted [batch, num_q_heads] = (1, 4)"),
    "tau is NaN": (FINITE, "tau is NaN"),
    "query with NaN": (FINITE, "q holds NaN or infinity"),
    "query with infinity": (FINITE, "q holds NaN or infinity"),
    "query with NaN in a layer": (FINITE, "q holds NaN or infinity"),
    "query with NaN, a step ready": (FINITE, "q holds NaN or infinity"),
    "query of rank 2, a step ready": (SHAPE, "q has shape (4, 64); wanted [batch, num_q_heads, head_dim]"),
    "query in float64, a step ready": (SHAPE, "q has dtype torch.float64; wanted float32"),
    "query in int64, a step ready": (SHAPE, "q has dtype torch.int64; wanted float32"),
    "query on another device, a step ready": (SHAPE, "different devices: q on meta, keys on cpu"),
    "query with its axes swapped, a step ready": (SHAPE, "num_q_heads=3 is not a multiple of num_kv_heads=2"),
    "query with NaN, dense": (FINITE, "q holds NaN or infinity"),
    "keys of rank 3": (SHAPE, "keys has shape (2, 40, 64); wanted [batch, num_kv_heads, kv_len, head_dim]"),
    "keys in int8": (SHAPE, "keys has dtype torch.int8; wanted float32, float16 or bfloat16"),
    "values of another length": (SHAPE, "batch, heads and length must agree"),
    "values of another width": (SHAPE, "head_dim=64 and values 32"),
    "values on another device": (SHAPE, "different devices: keys on cpu, values on meta"),
    "other values on another device": (SHAPE, "different devices: keys on cpu, values on meta"),
    "metric queries of another shape": (SHAPE, "metric_queries have shape (1, 3, 9, 64); wanted"),
    "kv_start of another batch": (SHAPE, "has shape (3,); wanted [batch] = (1,)"),
    "kv_len past the keys": (SHAPE, "wanted 0 <= kv_start <= kv_len <= 40"),
    "kv_start past kv_len": (SHAPE, "wanted 0 <= kv_start <= kv_len <= 40"),
    "kv_start negative": (SHAPE, "wanted 0 <= kv_start <= kv_len <= 40"),
    "no values": (SHAPE, "attention needs values"),
    "precision without values": (POLICY, "'exact:0.1' drops nothing, so it needs sketched values"),
    "precision on a flat index": (POLICY, "FlatIndex has none: use SketchIndex"),
    "scale of zero": (SHAPE, "softmax_scale=0.0; wanted"),
    "scale of NaN": (SHAPE, "softmax_scale=nan; wanted"),
    "scale of infinity": (SHAPE, "softmax_scale=inf; wanted"),
    "scale below zero, dense": (SHAPE, "softmax_scale=-1.0; wanted"),
    "scale below zero, several tokens": (SHAPE, "softmax_scale=-1.0; wanted"),
    "several tokens of another batch": (
        SHAPE,
        "(2, 4, 3, 64); wanted [batch, num_q_heads, q_len, head_dim] with batch=1",
    ),
    "unknown policy": (POLICY, "unknown policy 'exactly' in 'exactly:0.1'; known: exact:F"),
    "policy of another type": (POLICY, "policy=0.01 is neither a specification"),
    "policy without its argument": (POLICY, "'topk' cannot be read; usage: topk:K"),
    "policy with an argument too many": (POLICY, "'dense:3' cannot be read; usage: dense"),
    "policy with a word for a number": (POLICY, "'many' in 'topk:many' is not a whole number"),
    "policy with half a key": (POLICY, "'1.5' in 'topk:1.5' is not a whole number"),
    "mass of everything": (POLICY, "mass:1.0 is not a share of the mass"),
    "error of nothing": (POLICY, "error:0.0 is not a relative error to ask for"),
    "distance below zero": (POLICY, "relative:-1.0 is not a distance in nats"),
    "rank beyond the sample": (POLICY, "sample-topk:9 is no rank in a sample of 4 keys"),
    "union of two kinds": (POLICY, "'topk:3|exact:0.1' joins a policy that drops keys with one that drops nothing"),
    "union with a check": (POLICY, "'error:0.1' can't be part of a union"),
    "policy that keeps more than can be counted": (POLICY, "k=99999999999999999999 is more keys than can be counted"),
    "policy with more sinks than can be counted": (POLICY, "sinks=9223372036854775808 is more keys than"),
    "policy that keeps nothing": (POLICY, "topk:0 keeps nothing; wanted at least 1"),
    "policy with a share above 1": (POLICY, "exact=1.01 is not a share of the keys"),
    "policy with a share of NaN": (POLICY, "budget=nan is not a share of the keys"),
    "policy with a threshold of NaN": (POLICY, "fixed:nan would lose every key"),
    "policy with an unknown option": (POLICY, "unknown option 'unread' in 'topk:3+unread:0.1'; topk takes +sinks:N"),
    "policy with negative sinks": (POLICY, "sinks=-1 and recent=0 must not be negative"),
    "policy with too much unread": (POLICY, "unread_mass=1.0 is not a share of the mass"),
    "unknown backend": (BACKEND, "backend='fpga' is not available for cpu; available here:"),
    "unknown index": (POLICY, "index='tree' is unknown; wanted one of sketch, flat"),
    "unknown metric": (POLICY, "metric='euclid' is unknown; wanted"),
    "frames of nothing": (POLICY, "frame_len=0"),
    "appending another shape": (SHAPE, "cannot append keys (1, 1, 40, 64)"),
    "appending another dtype": (SHAPE, "torch.float16"),
    "reserving less than nothing": (SHAPE, "reserve_tokens=-1; wanted 0 or more"),
}


@pytest.fixture(scope="module")
def outcomes():
    script = Path(__file__).with_name("bad_input.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_bad_call_is_expected(outcomes):
    assert set(outcomes) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_bad_call_fails_with_one_clear_sentence(outcomes, name):
    error, message, is_ours = outcomes[name]
    assert (error, is_ours) == (EXPECTED[name][0], "True"), message
    assert EXPECTED[name][1] in message
    assert "\n" not in message and len(message) < 420
