#!/usr/bin/env bash
# The wheel beside the lowest versions that pyproject.toml allows, in an environment of its own: the tests that start
# no engine, as far as they need neither vLLM nor another extra.
#   requirements/lowest.sh python3.11 .venv-lowest [what pytest shall run]
# torch is that of torch.txt, a CPU build for Python 3.11. LOWEST_TORCH=2.4.0 takes another, of gigabytes where the index
# has no CPU build; LOWEST=highest takes the newest of everything instead of the lowest.
set -euo pipefail
python="$1"
env="$2"
shift 2
root="$(cd "$(dirname "$0")/.." && pwd)"
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
torch="torch==${LOWEST_TORCH:-$(sed -n 's/^torch==//p' "$root/requirements/torch.txt")}"

"$python" -m venv "$tools/uv"
"$tools/uv/bin/pip" install --quiet uv
uv="$tools/uv/bin/uv"
rm -rf "$env"
"$python" -m venv "$env"
"$uv" build --quiet --out-dir "$tools/dist" --python "$env/bin/python" "$root"
# The resolver reads no local version; torch itself and the parts of its CUDA build come from where pip finds them.
echo "${torch%%+*}" > "$tools/torch.txt"
"$uv" pip compile --quiet "$root/pyproject.toml" --resolution "${LOWEST:-lowest-direct}" \
    --override "$tools/torch.txt" --python "$env/bin/python" --no-header --no-annotate |
    grep -vE '^(torch==|triton==|nvidia-|cuda-)' > "$tools/resolved.txt"
"$env/bin/pip" install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --retries 1 --timeout 30 "$torch"
"$env/bin/pip" install --quiet --no-deps -r "$tools/resolved.txt" "$tools"/dist/*.whl
"$env/bin/pip" check
cat "$tools/resolved.txt"
"$env/bin/pip" install --quiet pytest pytest-timeout pytest-xdist hypothesis jsonschema pyyaml
# The installed wheel is under test and not the tree: pytest's own command does not put the tree on the path.
cd "$root"
PYTHONPATH="$root/tests/support" OMP_NUM_THREADS=1 "$env/bin/pytest" -q -p absent -n 2 --dist loadfile \
    --no-loadscope-reorder -m "not engine and not slow and not architectures and not gpu" "$@"
