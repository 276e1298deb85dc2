#!/bin/sh
# Builds the libraries with AddressSanitizer and UndefinedBehaviorSanitizer (gcc's) in build/sanitize and runs
# tests/native on them; arguments go to pytest. What scripts/test.sh has installed is needed.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh

"$python" -c 'import gguf, hypothesis, pytest' 2>/dev/null || die "run scripts/test.sh first: it installs what tests need"

{
    cmake -S . -B build/sanitize -G Ninja -DST3_SANITIZE=ON -DGGML_CUDA=OFF -DPython_EXECUTABLE="$PWD/$python" &&
        cmake --build build/sanitize --target llama mtmd
} >build/sanitize.log 2>&1 || die "the build with sanitizers failed: see build/sanitize.log"

# Python is not built with them, so their runtime comes first; the C++ library too, for the exceptions to be seen.
runtime=
for name in libasan.so libubsan.so libstdc++.so.6; do
    runtime="$runtime $(${CC:-cc} -print-file-name=$name)"
done

# Leaks: Python leaves memory at its end, so the tests count what is allocated themselves. Stock libraries that were
# compiled without sanitizers would not compute the same bits.
env -u ST3_STOCK_LIB_DIR LD_PRELOAD="$runtime" ST3_LIB_DIR="$PWD/build/sanitize/lib" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest tests/native "$@"
