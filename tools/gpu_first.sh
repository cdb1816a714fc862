#!/usr/bin/env bash
# What a GPU must show first, in under nine minutes: the times of an 8B-shaped model, then that the compiled decoder
# and NCCL are right, then the times of a training step. Run it from the repository's root; files go to $OUT [out/gpu].
# `gpu_first.sh more`, in six: where a training step's time goes, decoding with an adapter, collection, SDAR, the rest.
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
    grep -aE '^(\{|\| |E  )|PASSED|FAILED|passed|failed|Error|tok/s|samples/h|CUDA time total' "$OUT/$name.txt" |
        cut -c1-1400 | tail -24
}

pytest=(python3 -m pytest -v -s -m gpu tests/test_gpu.py)
if [ "${1:-first}" = first ]; then
    for batch in 1 32; do
        step "decode-$batch" 130 python3 tools/bench.py --model llada-8b --per_step 8 --batch_size "$batch" --turns 2 --profile
    done
    step decodes 180 "${pytest[@]}" -n 7 -k "decodes or no_host or sampling" &
    step nccl 180 "${pytest[@]}" -n 3 -k "nccl" &
    wait
    step train 120 "${pytest[@]}" -k "step_against and 4-512 or real_shapes and llada"
else
    step train-profile 80 python3 tests/measure_training.py tad ours --model llada-8b --batch_size 4 --steps 5 --profile
    step collection 90 python3 tests/measure_collection.py tiny 128 llada-8b dual
    step sdar 80 python3 tools/bench.py --model sdar-4b --batch_size 128 --prompt_len 320 --gen_len 64 --turns 1 --profile
    step adapter-made 40 python3 -c 'import sys; sys.path.append("tools"); import bench, lora, torch
base = bench.random_weights(bench.SHAPES["llada-8b"], "cuda", torch.bfloat16)
lora.save(lora.add(base, 128, 128), sys.argv[1])' out/gpu-adapter
    step adapter 90 python3 tools/bench.py --model llada-8b --adapter out/gpu-adapter --per_step 8 --batch_size 1 --turns 1
    step rest 120 "${pytest[@]}" -k "step_against and 2048 or real_shapes and not llada"
fi
