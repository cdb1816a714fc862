"""Collection end to end, measured: a row of BENCH.md. Not part of the suite, which counts and does not measure.

    python tests/measure_collection.py                     # the tiny model; or: barter 512

The clock runs around rollout(): prompts, decoding, grading and writing. A forward is a call of sample.Batch.forward, which
is the model and the choice of tokens; on a GPU it is waited for.
"""
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import layers  # noqa: E402
import model as nt_model  # noqa: E402
import rollout  # noqa: E402
import sample  # noqa: E402


def main(name="tiny", n=512):
    model, tok = nt_model.load(name, *nt_model.default_device()), data.load_tokenizer(name)
    problems, spent, inner = data.load_problems(name, "train", int(n)), [], sample.Batch.forward
    layers.for_decoding(model)  # once per process

    def forward(*args):
        began = time.perf_counter()
        out = inner(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
        return out
    sample.Batch.forward = forward
    for privileged in (False, True):
        spent.clear()
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            rollout.rollout(model, tok, problems, folder, name, privileged, policy="static", per_step=1, **data.TINY_DECODING)
            took = time.perf_counter() - began
        print(f"{name}{', solution shown' * privileged}: {len(problems)} problems in {took:.1f} s, {len(spent)} forwards: "
              f"{3600 * len(problems) / took:,.0f} samples/h, {1 - sum(spent) / took:.1%} of the time outside the forwards")


if __name__ == "__main__":
    main(*sys.argv[1:])
