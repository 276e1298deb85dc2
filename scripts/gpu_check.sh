#!/bin/sh
# Everything that wants an NVIDIA card, in one go: the op against its reference, compute-sanitizer, the op's time beside
# the memory's, the embedded model's kept tokens beside the CPU's, and at the 7B shape prefill and decode with and without ST3, and what
# scoring costs.
#
#   sh scripts/gpu_check.sh [LIBRARIES] [RESULTS]
#
# LIBRARIES: a folder of libraries that were built for this card elsewhere (build/gpu/lib there, stripped); without it
# they are built here for this card alone, some 190 compilations of up to half a minute. RESULTS: build/gpu-check.
# Needs no network: PYTHON names an interpreter with numpy, pytest, hypothesis, pillow, gguf and llama-cpp-python's
# bindings, and ST3_SDIST upstream's archive, if it is to be built. ST3_SHAPE=none leaves the 7B shape out, whose random
# weights take 4 GB of disk.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
libraries=${1:-}
results=${2:-build/gpu-check}
shape=${ST3_SHAPE:-llava-1.5-7b}
mkdir -p "$results"

command -v nvidia-smi >/dev/null || {
    echo "$0: no NVIDIA card here" >&2
    exit 1
}
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader | head -1; }
architecture=$(query compute_cap | tr -d .)

if [ -z "$libraries" ]; then
    cmake -S . -B build/gpu -G Ninja -DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$architecture-real" \
        "-DPython_EXECUTABLE=$(command -v "$python")" >"$results/build.log"
    cmake --build build/gpu >>"$results/build.log"
    libraries=build/gpu/lib
fi
ST3_LIB_DIR=$(cd "$libraries" && pwd)
export ST3_LIB_DIR ST3_NEED_GPU=1

failed=
summary=$results/summary.json
printf '{\n "card": "%s",\n "driver": "%s",\n "commit": "%s"' "$(query name)" "$(query driver_version)" \
    "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" >"$summary"

# step NAME COMMAND...: runs it, keeps its output, and tells how it went
step() {
    name=$1
    shift
    begin=$(date +%s)
    if "$@" >"$results/$name.log" 2>&1; then
        how=ok
    else
        how=failed
        failed="$failed $name"
    fi
    printf ',\n "%s": "%s"' "$name" "$how" >>"$summary"
    printf '%-24s %-8s %4d s  %s\n' "$name" "$how" $(($(date +%s) - begin)) "$(tail -1 "$results/$name.log")"
}

step op "$python" -m pytest -q -p no:cacheprovider tests/gpu
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" compute-sanitizer --tool "$tool" --kernel-regex kns=attn_span --error-exitcode 1 \
            "$python" -m pytest -q -p no:cacheprovider tests/gpu -k sanitized
    done
fi
step bandwidth "$python" scripts/bench_attn_span.py --json "$results/bandwidth.json"
step kept-tokens "$python" scripts/gpu_parity.py --json "$results/kept-tokens.json"
step kept-tokens-q8_0 "$python" scripts/gpu_parity.py --quantized --json "$results/kept-tokens-q8_0.json"
if [ "$shape" != none ]; then
    step bench sh -c '"$1" -m st3_edge bench --shape "$2" --against off --n-gpu-layers -1 --json >"$3"' \
        - "$python" "$shape" "$results/bench.json"
    step scoring "$python" scripts/bench_schedules.py --shape "$shape" --only scoring --n-gpu-layers -1 \
        --prefills 10 --json "$results/scoring.json"
fi
printf '\n}\n' >>"$summary"

cat "$results/bandwidth.log"
[ ! -f "$results/scoring.log" ] || cat "$results/scoring.log"
[ -z "$failed" ] || {
    echo "$0: failed:$failed (see $results)" >&2
    exit 1
}
