#!/usr/bin/env bash
# What a GPU must show first, in under nine minutes: the compiled decoder is right, NCCL works, then the times of
# an 8B-shaped model and of a training step. Run it from the repository's root; files go to $OUT [out/gpu].
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
    grep -aE '^(\{|\| |E  )|passed|failed|Error' "$OUT/$name.txt" | cut -c1-1400 | tail -14
}

pytest=(python3 -m pytest -q -s -m gpu tests/test_gpu.py)
bench=(python3 tools/bench.py llada-8b --policy static --no-early_stop --batch_size)
for batch in 1 32; do
    step "decode-$batch" 110 "${bench[@]}" "$batch" --profile
done
step decodes 170 "${pytest[@]}" -n 6 -k "decodes or no_host or sampling" &
step nccl 170 "${pytest[@]}" -k "nccl and flags0" &
wait
step train 90 "${pytest[@]}" -k "step_against and 4-512"
