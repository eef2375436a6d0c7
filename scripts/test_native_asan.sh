#!/bin/sh
# The native kernels' tests on a build instrumented by AddressSanitizer and UndefinedBehaviorSanitizer.   scripts/test_native_asan.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
build=$PWD/build/asan
mkdir -p "$PWD/build"
"$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$bin/python" -DLOUVER_SANITIZE=ON >"$build.log" ||
    { cat "$build.log"; exit 1; }
"$bin/cmake" --build "$build"

# A copy of the package that holds the instrumented module and no other.
rm -rf "$build/src"
mkdir -p "$build/src"
cp -r src/louver "$build/src/"
rm -f "$build"/src/louver/kernels/cpu/*.so
cp "$build"/_native*.so "$build/src/louver/kernels/cpu/"

# Python itself is not instrumented: the runtimes come first by preloading, and Python's own leaks at exit are not ours to judge.
runtime() { "${CXX:-c++}" -print-file-name="$1"; }
export PYTHONPATH="$build/src" LD_PRELOAD="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so)"
# Reports go to files: pytest captures what a process it kills has written, and would take it along.
rm -f "$build"/report.*
export ASAN_OPTIONS="detect_leaks=0:log_path=$build/report" UBSAN_OPTIONS="print_stacktrace=1:log_path=$build/report"
export LOUVER_EXAMPLES="${LOUVER_EXAMPLES:-3}"

# An editable install finds louver before PYTHONPATH is asked: its finder has to go.
alone='import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]'
"$bin/python" -c "$alone
from louver.kernels.cpu import native
assert '/build/asan/' in native.load().__file__, f'not the instrumented module: {native.load().__file__}'"
status=0
"$bin/python" -c "$alone
import pytest
sys.exit(pytest.main(sys.argv[1:]))" \
    -q -p no:cacheprovider -m "not gpu and not vllm and not model" ${*:-tests/kernels tests/sketch tests/attention} || status=$?
for report in "$build"/report.*; do
    [ ! -e "$report" ] || { status=1; cat "$report"; }
done
exit $status
