#!/bin/sh
# The gpu tests and the GPU benchmark on one card, rows to the folder given. Needs torch >= 2.11, triton >= 3.6, pytest; no network,
# no C++ extension.   scripts/gpu_check.sh [OUT_FOLDER] [KV_LENS]
set -eu
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
lengths=${2:-8192,40000,131072,524288}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
spread=""
if $python -c 'import xdist' 2>/dev/null; then spread="-n 12 -p no:benchmark"; fi
if [ "${TESTS:-1}" = 1 ]; then
    $python -m pytest tests/gpu -m "gpu and not model" -o addopts="--import-mode=importlib --strict-markers" -q $spread -p no:cacheprovider
fi
$python -m louver.experiments.bench_gpu --kv-lens "$lengths" --json "$out/speed_gpu.json"
