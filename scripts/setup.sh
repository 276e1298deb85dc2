# Sourced by the other scripts, in the repository's root: makes .venv with all that a build needs, and names its
# Python $python. CMAKE_ARGS is passed on to our build (-DGGML_CUDA=on, ...); PYTHON names another interpreter.

die() {
    echo "$0: $*" >&2
    exit 1
}

find_python() {
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "no Python 3.10 or newer found: install one, or name it with PYTHON=/path/to/python"
}

command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    die "no C++ compiler found: install one (Debian, Ubuntu: apt install g++)"

python=.venv/bin/python
if ! "$python" -c '' 2>/dev/null; then
    found=$(find_python)
    "$found" -m venv --clear .venv || die "$found cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"
elif ! "$python" -c 'import pip' 2>/dev/null; then # as uv makes them
    "$python" -m ensurepip >/dev/null || die ".venv has no pip: install it there, or remove .venv to have it made anew"
fi

mkdir -p build # where logs go before CMake makes it
# CMake keeps an option until another value is given, also one that failed: other words than the last time begin anew.
if [ "$(cat build/cmake_args 2>/dev/null)" != "${CMAKE_ARGS:-}" ]; then
    rm -f build/py3-*/CMakeCache.txt build/stock/CMakeCache.txt build/upstream-tests/CMakeCache.txt
    echo "${CMAKE_ARGS:-}" >build/cmake_args
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1

# Builds run without isolation: what they leave behind then fits the next build, which compiles only what changed.
tools=scikit-build-core
new='import re, sys; v = re.search(r"(\d+)\.(\d+)", sys.stdin.read()); sys.exit(not v or (int(v[1]), int(v[2])) < (3, 21))'
cmake --version 2>/dev/null | "$python" -c "$new" || tools="$tools cmake"
command -v ninja >/dev/null || tools="$tools ninja"
# shellcheck disable=SC2086
"$python" -m pip install -qq $tools
PATH=$PWD/.venv/bin:$PATH
