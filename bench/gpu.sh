#!/usr/bin/env bash
# One call on a bare GPU machine, at the root of a copy of the clone: bash bench/gpu.sh [options of cosup bench gpu]
#
# It installs nothing: what .gpu/site.tar.xz holds (make gpu-bundle, where there is a network) and the packages of
# this clone are put into a folder of their own, on which Python is started. Results lie in $OUT, else ./cosup-bench.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-cosup-bench}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
site=$place/site-packages  # by such a name QuACK knows modules that are no code of its user's
mkdir -p "$out" "$site"
if [[ -e .gpu/site.tar.xz ]]; then tar -xJf .gpu/site.tar.xz -C "$site"; fi
cp -r cosup tests pyproject.toml "$place"
cp -r kernels bench "$place/cosup"
export PYTHONPATH=$place:$site:$site/nvidia_cutlass_dsl/dsl_packages PYTHONUNBUFFERED=1
export PYTHONSAFEPATH=1  # the clone's own folder, where this runs, would hide the package
python3 -m cosup.bench.gpu --out "$out" "$@" 2>&1 | tee "$out/gpu.log"
