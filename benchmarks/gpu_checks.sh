#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in nine minutes: tests/gpu, the GPTQ kernel, an 8B-shaped model beside its
# arithmetic floor, bitsandbytes, every format's speed and memory, the demo. One JSON file comes of it.
#
#     bash benchmarks/gpu_checks.sh [--out FILE] [--only PART...] [--seconds 540]
#
# Python: $PYTHON where it is set, else $VENV (.venv) or python3, whichever has a torch that sees the GPU. Where none has,
# $VENV is made with `make`, which needs a package index. WHEELS=DIR: wheels that are unpacked beside Python first, for
# machines that reach no index. What is still missing is named in the file, and the parts that need it are skipped.
set -u
cd "$(dirname "$0")/.." || exit 1
venv=${VENV:-.venv}
site=

sees_gpu() { timeout 60 "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; }

found=
for python in ${PYTHON:+"$PYTHON"} "$venv/bin/python" python3; do
    if command -v "$python" >/dev/null && sees_gpu "$python"; then
        found=$python
        break
    fi
done
if [ -z "$found" ] && timeout 20 nvidia-smi -L >/dev/null 2>&1; then
    echo "no Python here has a torch that sees the GPU: installing into $venv" >&2
    timeout 240 make VENV="$venv" "$venv/.installed-dev" >&2
    sees_gpu "$venv/bin/python" && found=$venv/bin/python
fi
if [ -z "$found" ]; then
    echo "no NVIDIA GPU that torch can use on this machine: nothing was run" >&2
    exit 3
fi
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$found" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl >&2
fi
PYTHONPATH=$PWD${site:+:$site}${PYTHONPATH:+:$PYTHONPATH} "$found" benchmarks/gpu_checks.py --elapsed "$SECONDS" "$@"
