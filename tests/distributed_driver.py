"""Run under torchrun by test_distributed.py: several trainings in one process group, each recorded.

argv: a JSON file of {name: [script, *options]}, and the folder that rank 0 writes <name>.pt into: the trained
tensors before the first step, the gradient of the global batch there, the tensors at the end, and the number
of collectives of every kind in every step.
"""
import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
import eval as nt_eval  # noqa: E402
import grade  # noqa: E402
import model as nt_model  # noqa: E402
import run as training  # noqa: E402
from cli import run_cli  # noqa: E402

# what FSDP calls, by their names in torch 2.13 and before
GATHER, SCATTER = (("all_gather_single", "reduce_scatter_single") if hasattr(dist, "all_gather_single")
                   else ("all_gather_into_tensor", "reduce_scatter_tensor"))
COUNTED = {"all_reduce": "reduce", GATHER: "gather", SCATTER: "scatter"}


def flat(tensors):
    """Whole tensors, also of sharded ones, as one vector."""
    return torch.cat([(t.full_tensor() if isinstance(t, DTensor) else t).detach().flatten().double()
                      for t in tensors])


def run(name, script, options, folder):
    module = importlib.import_module(script)
    seen = dict(calls=[Counter()], world=int(os.environ.get("WORLD_SIZE", 1)), rows=[])
    real = {key: getattr(dist, key) for key in COUNTED}
    clip, save = torch.nn.utils.clip_grad_norm_, training.Run.save
    update, mask = training.Run.update, getattr(module, "mask_response", None)

    def counted(key):
        def call(*args, **kw):
            seen["calls"][-1][COUNTED[key]] += 1
            return real[key](*args, **kw)
        return call

    def clip_grad_norm_(params, *args, **kw):
        calls = seen["calls"][-1].copy()
        if "grad" not in seen:
            seen["grad"], seen["start"] = flat(p.grad for p in params), flat(params)
        seen["calls"][-1] = calls  # not those of this look
        return clip(params, *args, **kw)

    def counted_update(self):
        update(self)
        seen["calls"].append(Counter())

    def recorded_save(self, model):
        seen["sharded"] = any(isinstance(p, DTensor) for p in model.parameters())
        seen["end"] = flat(training.trainable(model).values())
        return save(self, model)

    def nothing_masked_in_most_examples(example, *args):
        masked, w = mask(example, *args)
        return masked & (sum(example["x0"]) % 4 == 0), w
    for key in COUNTED:
        setattr(dist, key, counted(key))
    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
    training.Run.update, training.Run.save = counted_update, recorded_save
    grade.is_correct = lambda problem, text: True  # a random model answers nothing
    nt_eval.draw = lambda *args: None
    if "empty" in name:
        module.mask_response = nothing_masked_in_most_examples
    if seen["world"] > 1:  # the head in chunks of 20 rows, and again in the backward pass
        nt_model.by_chunks.__kwdefaults__["chunk_bytes"] = 20 * 4 * 300
    try:
        sys.argv = [f"{script}.py", *options, "--out", str(folder / name)]
        module.main()
    finally:
        for key in COUNTED:
            setattr(dist, key, real[key])
        torch.nn.utils.clip_grad_norm_ = clip
        training.Run.update, training.Run.save = update, save
        if mask:
            module.mask_response = mask
    if int(os.environ.get("RANK", 0)) == 0:
        seen["calls"] = [dict(c) for c in seen["calls"][:-1]]
        torch.save(seen, folder / f"{name}.pt")


if __name__ == "__main__":
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])

    def main():
        for name, (script, *options) in jobs.items():
            run(name, script, options, out)
    run_cli(main)
