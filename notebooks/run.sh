#!/usr/bin/env bash
# Executes both notebooks from top to bottom on data/sample.
#
#   notebooks/run.sh [DIR]    keeps the executed notebooks in DIR
#
# Before that it checks that data/sample is what this code generates, and trains the two model
# versions that compare_models.ipynb compares into data/sample/models: one on the first hour of the
# sample, one on the first two. $MESHWISE is the program to use, by default a debug build.
set -euo pipefail
cd "$(dirname "$0")/.."
cache="${XDG_CACHE_HOME:-$HOME/.cache}/meshwise-ci/notebooks"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
executed="${1:-$work/executed}"
models=data/sample/models

# Installed again only when the requirements changed. The copy is made last, so that an
# installation that broke off is repeated.
venv="$cache/venv"
if ! cmp -s notebooks/requirements.txt "$venv/requirements.txt"; then
    rm -rf "$venv"
    mkdir -p "$cache"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r notebooks/requirements.txt
    cp notebooks/requirements.txt "$venv/requirements.txt"
fi

if [ -z "${MESHWISE:-}" ]; then
    cargo build --locked --quiet
    MESHWISE="${CARGO_TARGET_DIR:-target}/debug/meshwise"
fi

"$MESHWISE" data sample --out "$work/sample"
if ! diff -r --exclude=models data/sample "$work/sample"; then
    echo "data/sample is not what this code generates; replace it:" >&2
    echo "    meshwise data sample --out data/sample --force" >&2
    exit 1
fi

rm -rf "$models"
mkdir "$models"
for hours in 1 2; do
    "$MESHWISE" data sample --hours $hours --out "$work/export$hours" --keep "$work/node$hours" >/dev/null
    "$MESHWISE" model train --trees 50 --depth 3 --data-dir "$work/node$hours"
    cp "$work/node$hours"/models/*.json "$models"
done

# The user's own Jupyter settings play no part.
export IPYTHONDIR="$work/ipython" JUPYTER_CONFIG_DIR="$work/jupyter" MPLCONFIGDIR="$cache/matplotlib"
unset MESHWISE_EXPORT_DIR MESHWISE_MODELS_DIR
"$venv/bin/jupyter" nbconvert --log-level WARN --to notebook --execute --output-dir "$executed" \
    notebooks/*.ipynb
