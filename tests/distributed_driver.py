"""Run under torchrun by test_distributed.py: several trainings in one process group, each recorded.

argv: a JSON file of {name: [script, *options]}, and the folder that rank 0 writes <name>.pt into: the trained
tensors before the first step, the gradient of the global batch there, the tensors at the end, and the number
of collectives in every step.
"""
import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


def run(name, script, options, folder):
    module, seen = importlib.import_module(script), dict(calls=[], world=int(os.environ.get("WORLD_SIZE", 1)))
    real = dict(clip=torch.nn.utils.clip_grad_norm_, reduce=dist.all_reduce, save=module.save_final,
                step=module.optimizer_step, mask=getattr(module, "mask_response", None))

    def flat(tensors):
        return torch.cat([t.detach().flatten().double() for t in tensors])

    def clip(params, *args, **kw):
        if "grad" not in seen:
            seen["grad"], seen["start"] = flat(p.grad for p in params), flat(params)
        return real["clip"](params, *args, **kw)

    def all_reduce(*args, **kw):
        seen["calls"][-1] += 1
        return real["reduce"](*args, **kw)

    def optimizer_step(*args, **kw):
        seen["calls"].append(0)
        return real["step"](*args, **kw)

    def save_final(cfg, model, *args):
        seen["end"] = flat(module.trainable(model).values())
        return real["save"](cfg, model, *args)

    def nothing_masked_in_most_examples(example, *args):
        masked, w = real["mask"](example, *args)
        return masked & (sum(example["x0"]) % 4 == 0), w
    torch.nn.utils.clip_grad_norm_, dist.all_reduce = clip, all_reduce
    module.optimizer_step, module.save_final = optimizer_step, save_final
    if name.endswith("empty"):
        module.mask_response = nothing_masked_in_most_examples
    try:
        sys.argv = [f"{script}.py", *options, "--out", str(folder / name)]
        module.main()
    finally:
        torch.nn.utils.clip_grad_norm_, dist.all_reduce = real["clip"], real["reduce"]
        module.optimizer_step, module.save_final = real["step"], real["save"]
        if real["mask"]:
            module.mask_response = real["mask"]
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(seen, folder / f"{name}.pt")


if __name__ == "__main__":
    from model import run_cli
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    run_cli(lambda: [run(name, script, options, out) for name, (script, *options) in jobs.items()])
