#!/usr/bin/env bash
# Everything that only a GPU can say, as one command: the kernels' tests, then the benchmarks.
#   benchmarks/run_gpu.sh [FOLDER FOR THE RESULTS]
# Needs torch and Triton; vLLM too for the serving benchmark. Where vLLM is not installed, PUNICA names a
# folder with its lora/ops/triton_ops, the baseline of the kernel benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device="$(python -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())')"

pytest -q -m gpu tests/kernels/test_direct_kernels.py tests/kernels/test_materialize.py
python benchmarks/run.py kernels ${PUNICA:+--punica "$PUNICA"} --json "$out/kernels-$device.json"
python benchmarks/run.py activation --no-engine --json "$out/activation-$device.json"
if python -c 'import vllm' 2>/dev/null; then
    python benchmarks/run.py serving --model 7b --full --json "$out/serving-$device.json"
fi
