"""A training step on a CPU, measured: rows of BENCH.md. Not part of the suite, which counts and does not measure.

    python tests/measure_training.py tad ours        # or sft; or plain: the logits of all positions, a copied teacher
"""
import re
import sys
import threading
import time

import numpy as np
import torch
from conftest import ROOT  # noqa: F401, it puts the folders on the path
import test_gpu

import bench
import data
import lora
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


def counted(call, device, n, milliseconds=test_gpu.milliseconds):
    """test_gpu.milliseconds(), and the products of the first call."""
    print(f"{bench.flop_of(call) / 1e9:.0f} GFLOP", end=", ")
    return milliseconds(call, device, n)


test_gpu.milliseconds = counted


def sft_steps(base, batch, length, plain, n):
    """-> seconds of a LoRA step of random-mask SFT, as trims.py does it or with the logits of all positions."""
    torch.manual_seed(0)
    model, half = lora.add(base, 128, 128).train(), length // 2
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
            row, j = b["masked"].nonzero(as_tuple=True)
            loss = trims.mdlm_loss(model(**inputs).float()[row, cols[row, j]], b["x0"][row, j], b["loss_w"][row, j])
        else:
            loss = trims.training_loss(model, b, cfg)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return counted(step, "cpu", n) / 1000, losses


def main(method, kind, n=3):
    base = bench.random_weights(bench.SHAPES["llada-60m"])
    steps = dict(tad=lambda *args: test_gpu.lora_steps(base, "cpu", *args), sft=lambda *args: sft_steps(base, *args))[method]
    peak = Peak(daemon=True)
    peak.start()
    seconds, losses = steps(2, 512, kind == "plain", int(n))
    print(f"{method} {kind}: {seconds:.2f} s, grown by {peak.most - peak.before} MiB, losses "
          f"{[round(loss, 4) for loss in losses]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
