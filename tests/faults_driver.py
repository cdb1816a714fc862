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
import run  # noqa: E402
import t3d  # noqa: E402
from cli import run_cli  # noqa: E402

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


def resume(self):
    reached["step"] = real["resume"](self)
    return reached["step"]


def update(self):
    die("step")
    return real["update"](self)


real = dict(resume=run.Run.resume, update=run.Run.update)
grade.is_correct, run.Run.resume, run.Run.update = is_correct, resume, update
if __name__ == "__main__":
    run_cli(t3d.main)
