"""Collection end to end, measured: a row of BENCH.md. The suite only runs it, on a small model.

    python tests/measure_collection.py                     # the tiny model; or: barter 512
    python tests/measure_collection.py tiny 128 llada-8b dual       # blocks of tools/bench.py's shape, random; a cache

The clock runs around rollout(): prompts, decoding, grading and writing. A forward is a call of sample.Batch.forward, which
is the model and the choice of tokens; on a GPU it is waited for.
"""
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "tools")]
import bench  # noqa: E402
import data  # noqa: E402
import layers  # noqa: E402
import model as nt_model  # noqa: E402
import rollout  # noqa: E402
import sample  # noqa: E402


def random_blocks(shape, cfg):
    """A random model of a real shape over the vocabulary of cfg: all but the embedding and the head is as large."""
    facts = {fact: getattr(cfg, fact) for fact in ("vocab_size", "mask_id", "eos_ids", "pad_id")}
    return bench.random_weights(replace(bench.SHAPES[shape], **facts), *nt_model.default_device())


def main(name="tiny", n=512, shape=None, cache="none"):
    tok = data.load_tokenizer(name)
    model = nt_model.load(name, *nt_model.default_device())
    if shape:
        model = random_blocks(shape, model.cfg)
    problems, spent, inner = data.load_problems(name, "train", int(n)), [], sample.Batch.forward
    settings = data.TINY_DECODING | dict(cache=cache)
    layers.for_decoding(model)  # once per process

    def forward(*args):
        began = time.perf_counter()
        out = inner(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
        return out
    sample.Batch.forward = forward
    for privileged in [False, True] * (1 + torch.cuda.is_available()):  # a GPU's first two compile
        spent.clear()
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            rollout.rollout(model, tok, problems, folder, name, privileged, policy="static", per_step=1, **settings)
            took = time.perf_counter() - began
        print(f"{shape or name}{', solution shown' * privileged}: {len(problems)} problems in {took:.1f} s, {len(spent)} "
              f"forwards: {3600 * len(problems) / took:,.0f} samples/h, {1 - sum(spent) / took:.1%} of the time outside them")


if __name__ == "__main__":
    main(*sys.argv[1:])
