#!/bin/sh
# Builds llama-server and the other programs for 64-bit Windows by MinGW-w64, into build/windows/lib, and asks about the
# demo's pictures under Wine: answers, and the layers in which each visual token leaves, must be those of a build of this
# system for the same instructions. Debian: g++-mingw-w64-x86-64-posix, wine64. 20 minutes on two cores. Needs
# the environment that scripts/test.sh makes.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh
command -v wine >/dev/null || die "no Wine found (Debian: apt install wine wine64)"
command -v x86_64-w64-mingw32-g++-posix >/dev/null || die "no MinGW-w64 found (Debian: apt install g++-mingw-w64-x86-64-posix)"

instructions="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
build() {
    folder=$1
    shift
    # shellcheck disable=SC2086
    { cmake -S . -B "$folder" -G Ninja "$@" $instructions -DPython_EXECUTABLE="$PWD/$python" && cmake --build "$folder"; } \
        >"$folder.log" 2>&1 || die "the build failed: see $folder.log"
}
build build/windows --toolchain cmake/mingw-w64.cmake
build build/windows-beside
# programs bring GCC's own libraries with them
for library in libgcc_s_seh-1.dll libstdc++-6.dll libwinpthread-1.dll; do
    cp "$(x86_64-w64-mingw32-g++-posix -print-file-name=$library)" build/windows/lib/
done

ST3_LIB_DIR=$PWD/build/windows-beside/lib ST3_WINDOWS_DIR=$PWD/build/windows/lib "$python" -m pytest tests/server/test_windows.py
