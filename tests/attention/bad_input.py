"""Calls that must fail, and how: run as a script it prints {name: [error, message]} as JSON.

A process of its own, because the runtime shape checks that the tests run under would refuse these calls first.
"""

import json

import torch

import louver
from louver.attention.packed import PackedResult
from louver.kernels.cpu import native
from louver.kv import DeviceStore

KEYS = torch.randn(1, 2, 40, 64)
Q = torch.randn(1, 4, 64)
TAU = torch.zeros(1, 4)
index = louver.SketchIndex.build(KEYS, KEYS)
flat = louver.FlatIndex.build(KEYS, KEYS)
keys_only = louver.SketchIndex.build(KEYS)
meta = torch.device("meta")


def a_layer(policy="exact:0.1"):
    layer = louver.LouverAttention(policy)
    layer.append(KEYS, KEYS)
    return layer


ready = louver.SketchIndex.build(torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64))
for _ in range(3):
    last = louver.attend(Q, ready)
assert isinstance(last, PackedResult) or not native.available(), "a step is ready (attention/prepared.py)"


nan_query, inf_query = Q.clone(), Q.clone()
nan_query[0, 0, 0], inf_query[0, 3, 1] = torch.nan, torch.inf

CALLS = {
    "query of rank 4": lambda: index.search(Q[:, :, None], TAU),
    "query of another head_dim": lambda: index.search(torch.randn(1, 4, 32), TAU),
    "query of another batch": lambda: flat.search(Q.repeat(2, 1, 1), TAU.repeat(2, 1)),
    "query with its axes swapped": lambda: louver.attend(torch.randn(1, 3, 64), index),
    "query in float64": lambda: louver.attend(Q.double(), index),
    "query on another device": lambda: index.search(Q.to(meta), TAU),
    "tau on another device": lambda: index.search(Q, TAU.to(meta)),
    "query without heads": lambda: louver.attend(Q[:, :0], index),
    "query without channels": lambda: louver.attend(Q[..., :0], louver.SketchIndex.build(KEYS[..., :0], KEYS[..., :0])),
    "an index of nothing": lambda: louver.attend(Q, louver.SketchIndex(DeviceStore())),
    "a search of nothing": lambda: louver.SketchIndex(DeviceStore()).search(Q, TAU),
    "a layer of nothing": lambda: louver.LouverAttention("exact:0.1").attend(Q, 0.1),
    "metric queries for nothing": lambda: louver.SketchIndex(DeviceStore()).fix_metric(torch.randn(1, 4, 3, 64)),
    "tau per KV head": lambda: index.search(Q, torch.zeros(1, 2)),
    "tau is NaN": lambda: flat.search(Q, torch.full((1, 4), torch.nan)),
    "query with NaN": lambda: louver.attend(nan_query, index),
    "query with infinity": lambda: index.search(inf_query, TAU),
    "query with NaN in a layer": lambda: a_layer().attend(nan_query, 0.125),
    "query with NaN, a step ready": lambda: louver.attend(nan_query, ready),
    "query of rank 2, a step ready": lambda: louver.attend(Q[0], ready),
    "query in float64, a step ready": lambda: louver.attend(Q.double(), ready),
    "query in int64, a step ready": lambda: louver.attend(Q.long(), ready),
    "query on another device, a step ready": lambda: louver.attend(Q.to(meta), ready),
    "query with its axes swapped, a step ready": lambda: louver.attend(torch.randn(1, 3, 64), ready),
    "query with NaN, dense": lambda: louver.attend(nan_query, index, policy="dense"),
    "keys of rank 3": lambda: louver.SketchIndex.build(KEYS[0]),
    "keys in int8": lambda: louver.FlatIndex.build(KEYS.to(torch.int8)),
    "values of another length": lambda: louver.SketchIndex.build(KEYS, KEYS[:, :, :39]),
    "values of another width": lambda: louver.SketchIndex.build(KEYS, KEYS[..., :32]),
    "values on another device": lambda: louver.SketchIndex.build(KEYS, KEYS.to(meta)),
    "other values on another device": lambda: louver.attend(Q, index, KEYS.to(meta), policy="topk:3"),
    "metric queries of another shape": lambda: louver.SketchIndex.build(KEYS, metric_queries=torch.randn(1, 3, 9, 64)),
    "kv_start of another batch": lambda: louver.SketchIndex.build(KEYS, kv_start=torch.zeros(3, dtype=torch.int32)),
    "kv_len past the keys": lambda: louver.SketchIndex.build(KEYS, kv_len=torch.tensor([41])),
    "kv_start past kv_len": lambda: louver.FlatIndex.build(KEYS, kv_start=torch.tensor([9]), kv_len=torch.tensor([8])),
    "kv_start negative": lambda: louver.SketchIndex.build(KEYS, kv_start=torch.tensor([-1])),
    "no values": lambda: louver.attend(Q, keys_only, policy="topk:3"),
    "precision without values": lambda: louver.attend(Q, keys_only, KEYS, policy="exact:0.1"),
    "precision on a flat index": lambda: louver.attend(Q, flat, policy="exact:0.1"),
    "scale of zero": lambda: louver.attend(Q, index, softmax_scale=0.0),
    "scale of NaN": lambda: louver.attend(Q, index, softmax_scale=float("nan")),
    "scale of infinity": lambda: louver.attend(Q, index, softmax_scale=float("inf")),
    "scale below zero, dense": lambda: a_layer("dense").attend(Q, -1.0),
    "scale below zero, several tokens": lambda: a_layer().attend_many(torch.randn(1, 4, 3, 64), -1.0),
    "several tokens of another batch": lambda: a_layer().attend_many(torch.randn(2, 4, 3, 64), 1.0),
    "unknown policy": lambda: louver.attend(Q, index, policy="exactly:0.1"),
    "policy of another type": lambda: louver.attend(Q, index, policy=0.01),
    "policy without its argument": lambda: louver.parse_policy("topk"),
    "policy with an argument too many": lambda: louver.parse_policy("dense:3"),
    "policy with a word for a number": lambda: louver.parse_policy("topk:many"),
    "policy with half a key": lambda: louver.parse_policy("topk:1.5"),
    "mass of everything": lambda: louver.parse_policy("mass:1"),
    "error of nothing": lambda: louver.parse_policy("error:0"),
    "distance below zero": lambda: louver.parse_policy("relative:-1"),
    "rank beyond the sample": lambda: louver.parse_policy("sample-topk:9+size:4"),
    "union of two kinds": lambda: louver.parse_policy("topk:3|exact:0.1"),
    "union with a check": lambda: louver.parse_policy("exact:0.1|error:0.1"),
    "policy that keeps more than can be counted": lambda: louver.parse_policy("topk:99999999999999999999"),
    "policy with more sinks than can be counted": lambda: louver.parse_policy("exact:0.1+sinks:9223372036854775808"),
    "policy that keeps nothing": lambda: louver.parse_policy("topk:0"),
    "policy with a share above 1": lambda: louver.parse_policy("exact:1.01"),
    "policy with a share of NaN": lambda: louver.parse_policy("budget:nan"),
    "policy with a threshold of NaN": lambda: louver.parse_policy("fixed:nan"),
    "policy with an unknown option": lambda: louver.parse_policy("topk:3+unread:0.1"),
    "policy with negative sinks": lambda: louver.parse_policy("exact:0.1+sinks:-1"),
    "policy with too much unread": lambda: louver.parse_policy("exact:0.1+unread:1"),
    "unknown backend": lambda: louver.SketchIndex.build(KEYS, backend="fpga"),
    "unknown index": lambda: louver.LouverAttention("topk:3", index="tree"),
    "unknown metric": lambda: louver.SketchConfig(metric="euclid"),
    "frames of nothing": lambda: louver.SketchConfig(frame_len=0),
    "appending another shape": lambda: a_layer().append(KEYS[:, :1], KEYS[:, :1]),
    "appending another dtype": lambda: a_layer().append(KEYS.half(), KEYS.half()),
    "reserving less than nothing": lambda: DeviceStore(reserve_tokens=-1),
}


def outcome(call) -> list[str]:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), str(isinstance(error, louver.LouverError | ValueError))]
    return ["nothing", "", ""]


if __name__ == "__main__":
    print(json.dumps({name: outcome(call) for name, call in CALLS.items()}))
