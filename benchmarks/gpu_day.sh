#!/usr/bin/env bash
# Fifteen minutes on one bare GPU: what Lumina computes and how fast, most valuable first, written down as it comes.
#
#   make gpu-wheels                                where there is an index: wheels/gpu, for the machine with the GPU
#   benchmarks/gpu_day.sh --wheels wheels/gpu      on that machine: a CUDA build of torch and triton, no network
#   benchmarks/gpu_day.sh --rehearse               all parts on a CPU, at tiny shapes (a minute)
#   benchmarks/gpu_day.sh --list                   the parts and their time limits; --help: the other options
#
# --wheels installs the folder's wheels and a copy of this tree into a temporary folder that only this run sees.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

arguments=()
wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        *) arguments+=("$1"); shift ;;
    esac
done

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
    rm -rf "$site/lumina"
    cp -r "$root/lumina" "$site/lumina"
    cp -r "$root/kernels" "$site/lumina/kernels"
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" "$root/benchmarks/gpu_day" ${arguments[@]+"${arguments[@]}"}
