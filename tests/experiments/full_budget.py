"""What each method is at 100% of its budget, by the name its specification begins with."""

EVERYTHING = {
    "dense": "dense",
    "exact": "exact:1.0",
    "error": "error:1e-5",
    "topk": "topk:10000",
    "budget": "budget:1.0",
    "mass": "mass:1e-9",
    "relative": "relative:1e9",
    "fixed": "fixed:-1e9",
    "sample-topk": "sample-topk:10000+size:10000",  # the sample is the whole row, and its last score is the smallest
    "sample-budget": "sample-budget:1.0+size:10000",
    "streaming": "streaming:1",
    "h2o": "h2o:1",
    "snapkv": "snapkv:1",
    "quest": "quest:1",
    "twilight": "twilight:1",
    "hnsw": "hnsw:1",
    "ivf": "ivf:1",
    "pq": "pq:1",
    "lsh": "lsh:1",
    "torch-ivf": "torch-ivf:1",
}

# A code reads every key, in fewer bits; these estimates of a threshold come from the sample alone.
NO_BUDGET = {"fp8", "kivi4", "sample-max", "sample-mean-max", "sample-gap"}
