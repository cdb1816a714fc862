#!/usr/bin/env bash
# What a GPU must show first, in under ten minutes: correctness of the compiled decoder, then times of an
# 8B-shaped model, a training step, NCCL. Run it from the repository's root; files go to $OUT [out/gpu].
set -u
export PYTHONUNBUFFERED=1 OUT="${OUT:-out/gpu}" TORCHINDUCTOR_COMPILE_THREADS=6
mkdir -p "$OUT"
nvidia-smi -L
python3 -c 'import torch; print(torch.__version__, torch.version.cuda)'

step() {  # step NAME SECONDS COMMAND...: its output to a file, the lines that matter in print
    local name=$1 limit=$2
    shift 2
    echo "== $name $(date +%T)"
    timeout -k 5 "$limit" "$@" > "$OUT/$name.txt" 2>&1
    echo "== $name rc=$? $(date +%T)"
    grep -aE '^(\{|\| |E  )|passed|failed|Error' "$OUT/$name.txt" | cut -c1-2000 | tail -14
}

pytest=(python3 -m pytest -q -s -m gpu tests/test_gpu.py)
step decodes 150 "${pytest[@]}" -k "decodes or no_host or int8"
step nccl 100 "${pytest[@]}" -k "nccl and flags0"
for batch in 1 32; do
    step "decode-$batch" 110 python3 tools/bench.py llada-8b --batch_size "$batch" --policy static \
        --no-early_stop --profile
done
step train 80 "${pytest[@]}" -k "step_against and 4-512"
