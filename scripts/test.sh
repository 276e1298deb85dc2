#!/bin/sh
# Builds what the tests need and runs them; arguments go to pytest. ST3_TEST_HF=1 installs torch and transformers as
# well, for the comparison with Hugging Face's LLaVA; ST3_TEST_NVCC=1 the headers with which nvcc compiles the kernels.
# Without them those tests are skipped and say so.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh

# llama-cpp-python for tests alone, from the archive that our libraries are built from, without a llama.cpp of its own.
archive=$("$python" vendor/upstream.py)
pinned='import importlib.metadata, json, sys
sys.exit(importlib.metadata.version("llama-cpp-python") != json.load(open("vendor/upstream.json"))["version"])'
if ! "$python" -c "$pinned" 2>/dev/null; then
    CMAKE_ARGS=-DLLAMA_BUILD=OFF "$python" -m pip install -qq --no-build-isolation "$archive"
fi

extras=test,server,plot
if [ "${ST3_TEST_HF:-0}" = 1 ]; then
    extras=$extras,hf
fi
if [ "${ST3_TEST_NVCC:-0}" = 1 ]; then
    extras=$extras,nvcc
fi
"$python" -m pip install -qq --no-build-isolation --editable ".[$extras]"

# Stock llama.cpp with the same flags, on the CPU: ST3 off must match it bit for bit, and is measured beside it.
# shellcheck disable=SC2086
{
    cmake -S . -B build/stock -G Ninja ${CMAKE_ARGS:-} -DST3_STOCK=ON -DGGML_CUDA=OFF \
        -DPython_EXECUTABLE="$PWD/$python" &&
        cmake --build build/stock --target llama mtmd llama-server llama-mtmd-cli ggml-rpc-server
} >build/stock.log 2>&1 || die "the stock build failed: see build/stock.log"

ST3_STOCK_LIB_DIR=$PWD/build/stock/lib exec "$python" -m pytest "$@"
