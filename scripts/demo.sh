#!/bin/sh
# From a fresh checkout to answers about a picture: builds and installs into .venv, then runs the demo.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh

echo "Compiling llama.cpp with ST3 and installing it into .venv (minutes at the first time) ..."
"$python" -m pip install -qq --no-build-isolation --editable .
exec .venv/bin/st3-edge demo
