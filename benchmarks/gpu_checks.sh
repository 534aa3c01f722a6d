#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in nine minutes: tests/gpu, the GPTQ kernel, an 8B-shaped model beside its
# arithmetic floor, bitsandbytes, every format's speed and memory, the demo. One JSON file comes of it.
#
#     bash benchmarks/gpu_checks.sh [--out FILE] [--only PART...] [--seconds 540]
#
# Python: $PYTHON where it is set, else the one in $VENV (.venv), else python3, as long as its torch sees the GPU. Where
# none has all packages and an index can be reached, $VENV is made with `make`. WHEELS=DIR: wheels to be unpacked beside
# Python first, for machines that reach no index. What is still missing then is named in the file, and the parts that
# need it are skipped.
set -u
cd "$(dirname "$0")/.." || exit 1
venv=${VENV:-.venv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sees_gpu() { timeout 60 "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; }
lacks_nothing() { [ -z "$("$1" benchmarks/gpu_checks.py --missing)" ]; }
reaches_index() {
    timeout 30 python3 -m pip download --quiet --no-deps --retries 0 --timeout 5 -d "$work/index" typing-extensions \
        >/dev/null 2>&1
}

found=
for python in ${PYTHON:+"$PYTHON"} "$venv/bin/python" python3; do
    if command -v "$python" >/dev/null && sees_gpu "$python"; then
        found=$python
        break
    fi
done
if [ -z "$found" ] && ! timeout 20 nvidia-smi -L >/dev/null 2>&1; then
    echo "no NVIDIA GPU that torch can use on this machine: nothing was run" >&2
    exit 3
fi
if [ -n "${WHEELS:-}" ] && [ -n "$found" ]; then
    "$found" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl >&2
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
if { [ -z "$found" ] || ! lacks_nothing "$found"; } && reaches_index; then
    echo "installing into $venv" >&2
    timeout 240 make VENV="$venv" "$venv/.installed-dev" >&2 && sees_gpu "$venv/bin/python" && found=$venv/bin/python
fi
if [ -z "$found" ]; then
    echo "no NVIDIA GPU that torch can use on this machine: nothing was run" >&2
    exit 3
fi
"$found" benchmarks/gpu_checks.py --elapsed "$SECONDS" "$@"
