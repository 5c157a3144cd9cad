#!/usr/bin/env bash
# What a GPU machine that can fetch nothing lacks: the wheels of wheels.txt, unpacked, in one archive, .gpu/site.tar.xz.
#
#   bench/gpu/bundle.sh     or: make gpu-bundle     pip and xz; 4 minutes, and 1 GB of a temporary folder
#
# The archive and the clone must travel together: at most LIMIT bytes, which an 88 MB wheel alone would exceed.
set -euo pipefail
cd "$(dirname "$0")/../.."
LIMIT=$((60 << 20))
PYTHON=${PYTHON:-python3}
target=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux2014_x86_64)
for n in 17 24 27 28 31 34 35; do target+=(--platform "manylinux_2_${n}_x86_64"); done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m pip download --quiet --disable-pip-version-check --require-hashes "${target[@]}" -d "$work/wheels" \
  -r bench/gpu/wheels.txt
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-compile "${target[@]}" \
  --target "$work/site" "$work"/wheels/*.whl
mkdir -p .gpu
tar -C "$work/site" -c . | xz --x86 --lzma2=preset=6,dict=192MiB >.gpu/site.tar.xz
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -bc | awk '$2 == "total" {s += $1} END {print s + 0}')
archive=$(stat -c %s .gpu/site.tar.xz)
echo "wheels $(du -bs "$work/wheels" | cut -f1), archive $archive, the clone beside it $tree: of $LIMIT bytes"
((archive + tree <= LIMIT)) || { echo "too large to travel with the clone" >&2; exit 1; }
