"""Run under torchrun by test_faults.py: t3d.py whose processes die as FAULTS says.

FAULTS: JSON list, one entry per attempt of torchrun: {rank, at: record | step, n, signal}. A record's death
comes in the middle of its line; a step's before the ranks agree on it.
"""
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
import grade  # noqa: E402
import t3d  # noqa: E402
from model import run_cli  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
faults = json.loads(os.environ.get("FAULTS", "[]"))
fault = dict(enumerate(faults)).get(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), {})
reached = {"record": 0, "step": 0}


def die(at, before=lambda: None):
    reached[at] += 1
    if (fault.get("rank"), fault.get("at"), fault.get("n")) == (RANK, at, reached[at]):
        before()
        os.kill(os.getpid(), fault["signal"])


def is_correct(problem, text):
    def tear():
        with open(Path(sys.argv[sys.argv.index("--out") + 1]) / f"trajectories/rank{RANK}.jsonl", "ab") as f:
            f.write(b'{"id": "torn')
    die("record", tear)
    return True


def training_steps(first, *args):
    reached["step"] = first
    return real["steps"](first, *args)


def optimizer_step(*args):
    die("step")
    return real["optimizer"](*args)


real = dict(steps=t3d.training_steps, optimizer=t3d.optimizer_step)
grade.is_correct, t3d.training_steps, t3d.optimizer_step = is_correct, training_steps, optimizer_step
if __name__ == "__main__":
    run_cli(t3d.main)
