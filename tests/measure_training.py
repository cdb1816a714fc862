"""A training step, measured: rows of BENCH.md. The suite only runs it, on a small model.

    python tests/measure_training.py tad ours          # or sft; or plain: the logits of all positions, a copied teacher
    python tests/measure_training.py tad ours --model llada-8b --batch_size 4 --profile     # also where the time goes
"""
import argparse
import re
import threading
import time

import numpy as np
import torch
from conftest import ROOT  # noqa: F401, it puts the folders on the path
from torch.profiler import profile
from test_gpu import lora_step, milliseconds

import bench
import data
import lora
import model as nt_model
import run
import trims


class Peak(threading.Thread):
    """The largest anonymous memory since start(), in MiB; Linux."""
    def now(self):
        return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) >> 10

    def run(self):
        self.before = self.most = self.now()
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.001)


def sft_step(base, device, batch, length, plain):
    """A step of random-mask SFT, otherwise as lora_step(): as trims.py does it, or with the logits of all positions."""
    torch.manual_seed(0)
    model, half = lora.add(base, 128, 128).train(), length // 2
    if device == "cuda" and not plain:
        run.compile_blocks(model)
    texts = torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [dict(id=i, prompt_ids=text[:half], x0=text[half:]) for i, text in enumerate(texts)]
    cfg = trims.Config(batch_size=batch, trajectory_share=0.0, lr=1e-3)
    params, losses = run.trainable(model).values(), []
    optimizer = torch.optim.AdamW(params, lr=1e-3) if plain else run.adamw(params, cfg)

    def step():
        rngs = [np.random.default_rng([len(losses), i]) for i in range(batch)]
        b = trims.make_batch(examples, rngs, cfg, model.cfg)
        if plain:
            inputs, cols = data.response_inputs(model.cfg, b["prompts"], b["xt"])
            inputs = {key: None if t is None else t.to(device) for key, t in inputs.items()}
            row, j = b["masked"].nonzero(as_tuple=True)
            logits = model(**inputs).float()[row.to(device), cols[row, j].to(device)]
            loss = trims.mdlm_loss(logits, b["x0"][row, j].to(device), b["loss_w"][row, j].to(device))
        else:
            loss = trims.training_loss(model, b, cfg)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return step, losses


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["tad", "sft"])
    parser.add_argument("kind", choices=["ours", "plain"])
    parser.add_argument("--model", default="llada-60m", choices=list(bench.SHAPES))
    parser.add_argument("--profile", action="store_true")
    for name, default in dict(batch_size=2, length=512, steps=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(words)
    device, dtype = nt_model.default_device()
    base, peak = bench.random_weights(bench.SHAPES[args.model], device, dtype), Peak(daemon=True)
    peak.start()
    make = dict(tad=lora_step, sft=sft_step)[args.method]
    step, losses = make(base, device, args.batch_size, args.length, args.kind == "plain")
    if device == "cpu":
        print(f"{bench.flop_of(step) / 1e9:.0f} GFLOP", end=", ")
    ms = milliseconds(step, device, args.steps)
    print(f"{args.method} {args.kind}: {ms / 1000:.3f} s, {1000 * args.batch_size * args.length / ms:.0f} tok/s, grown by "
          f"{peak.most - peak.before} MiB on the host, losses {[round(loss, 4) for loss in losses]}")
    if args.profile:
        with profile() as traced:
            profiled_ms = milliseconds(step, device, args.steps)  # one more goes first
        table = traced.key_averages().table(f"self_{device}_time_total", row_limit=40, max_name_column_width=110)
        print(f"{table}{args.steps + 1} steps, {profiled_ms:.1f} ms each while they were profiled")


if __name__ == "__main__":
    main()
