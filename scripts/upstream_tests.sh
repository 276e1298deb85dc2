#!/bin/sh
# llama.cpp's own C++ tests of its libraries, on ours, in a build of their own: minutes. Those that save and restore states run on a
# tiny model of every architecture, which test-llama-archs makes, with ST3 off: under ST3 a state cannot stay on its device, which
# they ask for (tests/native tries ours). Left out: tests that download a model or a vocabulary, and those of chat
# templates and grammars, which we do not touch.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh

tests="test-llama-archs test-save-load-state test-recurrent-state-rollback test-batch-alloc test-sampling test-opt test-rope
    test-alloc test-gguf test-barrier test-quantize-fns test-mtmd-c-api test-mtmd-impl"
build=$PWD/build/upstream-tests
{
    # shellcheck disable=SC2086
    cmake -S . -B "$build" -G Ninja ${CMAKE_ARGS:-} -DST3_UPSTREAM_TESTS=ON -DPython_EXECUTABLE="$PWD/$python" &&
        cmake --build "$build" --target $tests
} >build/upstream-tests.log 2>&1 || die "the build failed: see build/upstream-tests.log"

# test-llama-archs goes by another name where it makes the models
names=$(echo $tests test-generate-models | tr ' ' '|')
ctest --test-dir "$build/llama.cpp/tests" --output-on-failure --timeout 600 -R "^($names)\$" "$@"
