#!/bin/sh
# The gpu tests and the GPU benchmark on one card, rows to OUT_FOLDER/speed_gpu.json. Needs torch >= 2.11, triton >= 3.6, pytest; no
# network, no C++ extension.   scripts/gpu_check.sh [OUT_FOLDER] [KV_LENS]
#   TESTS=0      skip the tests
#   SANITIZE=1   run the small cases under compute-sanitizer (memcheck, racecheck) first
#   MODEL=1      also tokens per second of a whole model, to OUT_FOLDER/decode_gpu.json
#   KV_LENS      lengths such as 8192,40000 of the first shape only; without it, every shape the docs show (bench_gpu --suite)
set -eu
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
if [ -n "${2:-}" ]; then shapes="--kv-lens $2"; else shapes="--suite --repetitions 15"; fi
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [ "${SANITIZE:-0}" = 1 ]; then
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 "$python" tests/gpu/every_check.py cuda
    done
fi
spread=""
if $python -c 'import xdist' 2>/dev/null; then spread="-n 12 -p no:benchmark"; fi
if [ "${TESTS:-1}" = 1 ]; then
    $python -m pytest tests/gpu -m "gpu and not model" -o addopts="--import-mode=importlib --strict-markers" -q $spread -p no:cacheprovider
fi
# shellcheck disable=SC2086 # two words
$python -m louver.experiments.bench_gpu $shapes --json "$out/speed_gpu.json"
if [ "${MODEL:-0}" = 1 ]; then
    $python -m louver.experiments.decode_gpu --json "$out/decode_gpu.json"
fi
