#!/bin/sh
# From a fresh checkout to answers about a picture: builds and installs into .venv, then runs the demo.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh

echo "Compiling llama.cpp with ST3 and installing it into .venv (minutes at the first time) ..."
{
    "$python" -m pip install -v --no-build-isolation --editable . 2>&1 && echo "exit 0" || echo "exit $?"
} | "$python" scripts/build_progress.py build/demo.log
exec .venv/bin/st3-edge demo
