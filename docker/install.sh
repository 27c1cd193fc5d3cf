#!/usr/bin/env bash
# Installs the four packages for the first `python` on the path and keeps every version that is installed there already:
# the installed versions become constraints, so that pip adds what is missing and replaces nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -m pip --version >/dev/null 2>&1 || python -m ensurepip
installed="$(mktemp)"
trap 'rm -f "$installed"' EXIT
# Not `pip freeze`, which names the file or the repository where a package came from instead of its version.
python -m pip list --format=freeze | grep -E '^[A-Za-z0-9._-]+==' | grep -vE '^(wan[-_](model|data|train|infer))==' >"$installed" || true
python -m pip install --constraint "$installed" \
    ./packages/wan-model ./packages/wan-data ./packages/wan-train ./packages/wan-infer "$@"
