#!/usr/bin/env bash
# Everything that only a GPU can say, in stages of a fixed time each, the most telling first.
#   benchmarks/run_gpu.sh [FOLDER] [--stages NAME...] [--box SECONDS] [--tiny] [--list]
# FOLDER    of the results, written as they come (default: build/gpu in the repository)
# --stages  names of stages or of the presets "first", "second" and "third" (default: first)
# --box     seconds for the whole run (default: what the stages may take; first is under 8 minutes, second
#           under 4, third under 6)
# --tiny    tiny shapes on a CPU, in Triton's interpreter: tries the stages, no time means anything
# --list    print the stages and end
# A stage that fails does not end the run: FOLDER/stages.txt has a line a stage, FOLDER/logs.txt what each
# printed. The exit status is 1 when one failed or had no time, 2 for a wrong call.
#
# Needs torch, Triton and pytest; vLLM for the last stage. Where vLLM is not installed, PUNICA names a copy
# of its lora/ops/triton_ops, the baseline of the kernel benchmark. PYTHON names another interpreter;
# SERVING other options of the serving benchmark.
set -uo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"

first="smoke tests kernels profile cliffs memory large"
second="materialize serving"
third="sizes residency publish"
# name, seconds at most, what it says, the file with its rows
stages="\
smoke        60   results, then graphs replayed with other tasks (checks.jsonl)
tests        110  the kernels' tests on the device
kernels      110  llama-7b against punica, decode and prefill (kernels.json)
profile      50   what direct work adds to a layer, each kernel's time (checks.jsonl)
cliffs       60   257 tasks and more, 1024 slots (kernels-cliffs.json)
memory       40   results under compute-sanitizer (checks.jsonl)
large        40   llama-70b (kernels-70b.json)
materialize  40   a task into a slot (activation.json)
serving      190  real engines side by side (serving.json)
sizes        110  the private kernels with other sizes than they choose (checks.jsonl)
residency    145  tasks that come from host memory and disk (residency.json)
publish      100  a task from tensors in memory (publish.json)"

wrong() {
    echo "run_gpu.sh: $1" >&2
    exit 2
}

# --- the command line ---

out="$root/build/gpu" box=86400 tiny="" wanted=()
while [ $# -gt 0 ]; do
    case "$1" in
    --list)
        echo "$stages"
        printf 'first: %s\nsecond: %s\nthird: %s\n' "$first" "$second" "$third"
        exit 0
        ;;
    --tiny) tiny=1 ;;
    --box)
        [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || wrong "--box takes whole seconds"
        box="$2"
        shift
        ;;
    --stages)
        while [ $# -gt 1 ] && [[ "$2" != --* ]]; do
            case "$2" in
            first) wanted+=($first) ;;
            second) wanted+=($second) ;;
            third) wanted+=($third) ;;
            *)
                grep -q "^$2 " <<< "$stages" || wrong "no stage '$2'; --list has them"
                wanted+=("$2")
                ;;
            esac
            shift
        done
        [ ${#wanted[@]} -gt 0 ] || wrong "--stages takes names; --list has them"
        ;;
    -*) wrong "no option '$1'; use --stages, --box, --tiny or --list" ;;
    *) out="$1" ;;
    esac
    shift
done
[ ${#wanted[@]} -gt 0 ] || wanted=($first)

# --- where things are ---

python="${PYTHON:-python3}"
# The repository's root must stay off the path: its folder triton_kernels has the name of a package that
# vLLM imports.
case ":${PYTHONPATH:-none}:" in
*":$root:"* | *"::"*) wrong "leave this repository's root out of PYTHONPATH" ;;
esac
links="$(mktemp -d)"
trap 'rm -rf "$links"' EXIT
ln -s "$root/vllm_vlora" "$links/vllm_vlora"
export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

has() { "$python" -P -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

has torch || wrong "$python has no torch; PYTHON names another interpreter"
mkdir -p "$out" || exit 2

# --- the stages: each sets command, or skip to why it cannot run ---

bench() { command=("$python" "$root/benchmarks/run.py" "$@"); }

check() { bench gpucheck ${tiny:+--device cpu} --json "$out/checks.jsonl" --stages "$@"; }

# FILE OPTIONS...
kernels() {
    local file="$1"
    shift
    [ -z "$tiny" ] || set -- --device cpu --tiny
    # It ends before its box does, so that its tables are printed.
    bench kernels ${PUNICA:+--punica "$PUNICA"} --no-activation --json "$out/$file" \
        --budget $((limit > 20 ? limit - 15 : limit)) "$@"
}

plan() {
    command=() skip=""
    case "$1" in
    smoke) check smoke replay ;;
    tests)
        # One line a test, so that a run out of time has still said which failed.
        local backend=gpu only=""
        [ -z "$tiny" ] || backend=interpreter only="one_task_for_all or not_contiguous"
        command=(env VLORA_TEST_DIRECT=$backend VLORA_TEST_MATERIALIZE=$backend TRITON_INTERPRET=${tiny:-0}
            "$python" -P -m pytest -v -p no:cacheprovider --tb=short)
        [ -z "$only" ] || command+=(-k "$only")
        if [ -z "$tiny" ] && has xdist; then command+=(-n 6); fi
        command+=("$root"/tests/kernels/test_{direct_kernels,materialize}.py)
        ;;
    kernels)
        kernels kernels.json --shapes llama-7b --k 64 --formats float nf4 --rounds 10 \
            --tasks 64 1 256 512 1024 --prefill-tokens 2048 --prefill-tasks 8
        ;;
    profile) check beside idle profile ;;
    cliffs)
        kernels kernels-cliffs.json --shapes llama-7b --modules qkv_proj down_proj --k 64 --formats nf4 nf4-narrow \
            --slots 1024 --tasks 256 257 512 1024 --prefill-tokens 2048 --prefill-tasks 8 --rounds 5
        ;;
    memory)
        check smoke --quick
        # Memory of its own for each tensor, or the checker sees only the allocator's large blocks.
        command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${command[@]}")
        if command -v compute-sanitizer > /dev/null; then
            command=(compute-sanitizer --target-processes all --error-exitcode 9 "${command[@]}")
        elif [ -z "$tiny" ]; then
            skip="compute-sanitizer is not installed"
        fi
        ;;
    large)
        kernels kernels-70b.json --shapes llama-70b --k 64 --formats nf4 --tasks 64 \
            --prefill-tokens 2048 --prefill-tasks 8 --rounds 5
        ;;
    materialize)
        bench activation --no-engine --json "$out/activation.json" --formats bf16 nf4 --k 64
        [ -z "$tiny" ] || command+=(--device cpu --rounds 2 --warmup 1)
        ;;
    serving)
        has vllm || skip="vLLM is not installed"
        # Five engines and their caches fit into 80 GB; 1024 NF4 tasks would take minutes to write.
        local options="--model 7b-16 --together 3.1 --gpu-memory-utilization 0.1 --rounds 2 --distinct 4
            --configurations base,stock-32,direct-k64,direct-nf4 --tasks 1,64,256
            --prefill-len 128 --prompt-len 16 --output-len 32"
        [ -z "$tiny" ] || options="--quick --configurations base,stock-N,direct-k32,direct-nf4"
        bench serving ${SERVING:-$options} --json "$out/serving.json"
        ;;
    sizes) check sizes ;;
    residency)
        has vllm || skip="vLLM is not installed"
        bench residency --tasks 200 --held 20 --kept 60 --requests 100 --rounds 2 --json "$out/residency.json"
        [ -z "$tiny" ] || command+=(--quick)
        ;;
    publish)
        has vllm || skip="vLLM is not installed"
        bench publish --rounds 4 --json "$out/publish.json"
        [ -z "$tiny" ] || command+=(--quick)
        ;;
    esac
}

# --- the run ---

failed=0
report() { # NAME SECONDS RESULT
    printf '%-12s %4s s  %s\n' "$@" | tee -a "$out/stages.txt"
}

run() {
    local name="$1" limit left started=$SECONDS code
    limit="$(awk -v name="$name" '$1 == name { print $2 }' <<< "$stages")"
    # Triton's interpreter and a busy CPU take long.
    [ -z "$tiny" ] || limit=$((limit * 10))
    left=$((box - SECONDS))
    if [ $left -lt 1 ]; then
        failed=1
        report "$name" 0 "no time left"
        return
    fi
    limit=$((limit < left ? limit : left))
    plan "$name"
    if [ -n "$skip" ]; then
        report "$name" 0 "skipped: $skip"
        return
    fi
    timeout -k 5 "$limit" "${command[@]}" > "$links/log" 2>&1
    code=$?
    { echo "##### $name: ${command[*]}" && cut -c1-2000 "$links/log"; } >> "$out/logs.txt"
    case $code in
    0)
        tail -n "${TAIL:-12}" "$links/log" | cut -c1-200
        report "$name" $((SECONDS - started)) ok
        return
        ;;
    124 | 137) report "$name" $((SECONDS - started)) "time out" ;;
    *) report "$name" $((SECONDS - started)) "failed ($code)" ;;
    esac
    failed=1
    tail -n 30 "$links/log" | cut -c1-300
}

echo "# $(date -u +%FT%TZ) ${wanted[*]}${tiny:+ (tiny)}" >> "$out/stages.txt"
for name in "${wanted[@]}"; do run "$name"; done
exit $failed
