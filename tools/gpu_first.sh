#!/usr/bin/env bash
# What a GPU must show first, in under nine minutes: the times of an 8B-shaped model, then that the compiled decoder
# and NCCL are right, then the times of a training step. Run it from the repository's root; files go to $OUT [out/gpu].
set -u
export PYTHONUNBUFFERED=1 OUT="${OUT:-out/gpu}" TORCHINDUCTOR_COMPILE_THREADS=4
mkdir -p "$OUT"
nvidia-smi -L
python3 -c 'import torch; print(torch.__version__, torch.version.cuda)'

step() {  # step NAME SECONDS COMMAND...: its output to a file, the lines that matter in print
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" > "$OUT/$name.txt" 2>&1
    echo "== $name rc=$? after $((SECONDS - began)) s"
    grep -aE '^(\{|\| |E  )|PASSED|FAILED|passed|failed|Error' "$OUT/$name.txt" | cut -c1-1400 | tail -24
}

pytest=(python3 -m pytest -v -s -m gpu tests/test_gpu.py)
for batch in 1 32; do
    step "decode-$batch" 130 python3 tools/bench.py --model llada-8b --per_step 8 --batch_size "$batch" --turns 2 --profile
done
step decodes 180 "${pytest[@]}" -n 7 -k "decodes or no_host or sampling" &
step nccl 180 "${pytest[@]}" -n 3 -k "nccl" &
wait
step train 120 "${pytest[@]}" -k "step_against and 4-512 or real_shapes and LLaDA"
