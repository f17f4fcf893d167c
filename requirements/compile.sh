#!/usr/bin/env bash
# Regenerate requirements/cpu.txt: a full pinned list, installed with --no-deps (`make requirements`).
set -euo pipefail
cd "$(dirname "$0")"
python="${1:-python3}"
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
"$python" -m venv "$tools"
"$tools/bin/pip" install --quiet uv
"$tools/bin/uv" pip compile --quiet cpu.in --override overrides.txt --python-version 3.11 \
    --no-header --no-annotate --output-file "$tools/all.txt"
{
    echo "# Made by requirements/compile.sh from cpu.in; do not edit. Install with --no-deps."
    # torch comes from torch.txt; the CUDA parts belong to its other build.
    grep -vE '^(torch==|nvidia-|cuda-)' "$tools/all.txt"
} > cpu.txt
