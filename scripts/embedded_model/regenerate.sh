#!/bin/sh
# Make the embedded model anew: train (or go on training), export, write the GGUF pair and the pictures, evaluate.
# Usage: regenerate.sh WORKDIR
set -eu
work=${1:?usage: regenerate.sh WORKDIR}
here=$(cd "$(dirname "$0")" && pwd)
demo=$here/../../st3_edge/data/demo
# with other work on the machine, threads that spin at barriers cost more than they save
export OMP_WAIT_POLICY=PASSIVE
python "$here/train.py" --out "$work"
python "$here/export.py" hf "$work/full.pt" "$work/hf"
python "$here/export.py" gguf "$work/hf" "$demo" --type Q8_0
python "$here/export.py" pictures "$demo"
for style in known other; do
    python "$here/evaluate.py" "$demo" --style "$style"
done
