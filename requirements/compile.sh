#!/usr/bin/env bash
# Regenerate cpu.txt and docs.txt: full pinned lists, installed with --no-deps (`make requirements`).
set -euo pipefail
cd "$(dirname "$0")"
python="${1:-python3}"
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
"$python" -m venv "$tools"
"$tools/bin/pip" install --quiet uv
# resolve NAME [OPTION...]: NAME.txt from NAME.in.
resolve() {
    local name="$1"
    shift
    "$tools/bin/uv" pip compile --quiet "$name.in" "$@" --python-version 3.11 \
        --no-header --no-annotate --output-file "$tools/$name.txt"
    {
        echo "# Made by requirements/compile.sh from $name.in; do not edit. Install with --no-deps."
        # torch comes from torch.txt; the CUDA parts belong to its other build.
        grep -vE '^(torch==|nvidia-|cuda-)' "$tools/$name.txt"
    } > "$name.txt"
}
resolve cpu --override overrides.txt
resolve docs
