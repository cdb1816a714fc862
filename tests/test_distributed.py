"""World sizes 1, 2 and 4 (gloo) train the same thing: one launch each, all methods in it."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

COMMON = ["--eval_problems", "0", "--max_steps", "5", "--lr", "1e-2", "--lr_schedule", "constant",
          "--warmup_steps", "0", "--batch_size", "8", "--save_every", "50", "--lora_dropout", "0"]


def jobs(shared):
    """name -> script, options: every method, adapters and all weights; accumulation; ranks without rows."""
    own = ["--n_problems", "24", "--trajectories", str(shared / "own")]
    methods = {"tad": ["--n_problems", "24", "--window", "8", "--trajectories", str(shared / "privileged")],
               "t3d": ["--n_problems", "24", "--trajectories", str(shared / "rollouts")],
               "tabom": own, "trims": ["--n_examples", "24"]}
    out = {}
    for name, options in methods.items():
        for kind, flag in (("lora", "--no-full"), ("full", "--full")):
            out[f"{name}-{kind}"] = [name, *COMMON, "--micro_batch", "8", *options, flag]
        out[f"{name}-accumulated"] = [name, *COMMON, "--micro_batch", "1", *options]
    out["trims-empty"] = ["trims", *COMMON, "--micro_batch", "8", "--trajectory_share", "0",
                          *methods["trims"]]
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{world: {name: what the driver recorded}}"""
    root = tmp_path_factory.mktemp("worlds")
    (root / "jobs.json").write_text(json.dumps(jobs(root)))
    seen = {}
    for world in (1, 2, 4):
        folder = root / f"world-{world}"
        folder.mkdir()
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        driver = [str(ROOT / "tests/distributed_driver.py"), str(root / "jobs.json"), str(folder)]
        done = subprocess.run([sys.executable, *(torchrun if world > 1 else []), *driver],
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[world] = {name: torch.load(folder / f"{name}.pt") for name in jobs(root)}
    return seen


@pytest.mark.parametrize("name", list(jobs(ROOT)))
def test_worlds_agree(runs, name):
    one = runs[1][name]
    assert one["world"] == 1 and set(one["calls"]) == {0}
    moved = (one["end"] - one["start"]).norm()
    assert moved > 0.1
    for world in (2, 4):
        many = runs[world][name]
        assert many["world"] == world and many["calls"] == [1] * 5  # one bucket per step
        assert torch.equal(many["start"], one["start"])
        assert (many["grad"] - one["grad"]).norm() <= 1e-5 * one["grad"].norm()
        # AdamW makes full steps of gradients that are no more than rounding; all weights have more of those
        assert (many["end"] - one["end"]).norm() <= (5e-2 if name.endswith("full") else 2e-3) * moved


def test_accumulation_changes_nothing(runs):
    for method in ("tad", "t3d", "tabom", "trims"):
        a, b = runs[1][f"{method}-lora"], runs[2][f"{method}-accumulated"]
        assert (a["grad"] - b["grad"]).norm() <= 1e-5 * a["grad"].norm()
