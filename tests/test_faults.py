"""Processes that die, checkpoints that are cut: nothing is lost or comes twice, the result is the same."""
import contextlib
import ctypes
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import ranks
import torch
from conftest import ROOT, random_model
from safetensors.torch import load_file
from small_runs import COMMON, METHODS
from small_runs import VOCAB as SMALL

import cli
import lora
import model as nt_model
import rollout
import run as training
import tad
from model import UserError

nt_eval = importlib.import_module("eval")
VOCAB = dict(vocab_size=300, mask_token_id=297, eos_token_id=296, pad_token_id=296)
OPTIONS = ["--n_problems", "8", "--gen_len", "8", "--block_len", "4", "--batch_size", "4", "--micro_batch",
           "1", "--collect_batch", "2", "--max_steps", "10", "--refresh", "5", "--save_every", "5", "--lr",
           "1e-2", "--log_every", "1", "--eval_problems", "0"]
LORA = ["--lora_r", "4", "--lora_dropout", "0"]


def launch(world, out, *options, faults=(), attempts=None, torchrun=False):
    """Restarted as often as there are faults -> whether it ended well, and what it said."""
    driver = [ROOT / "tests/faults_driver.py", "--out", out, *OPTIONS, *([] if "--full" in options else LORA), *options]
    log, env = out.with_suffix(".log"), dict(FAULTS=json.dumps(faults))
    log.unlink(missing_ok=True)
    if torchrun:
        done = subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
            f"--max_restarts={len(faults) - 1}", *map(str, driver)], capture_output=True, text=True, timeout=600,
            env={**os.environ, **env, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        return done.returncode == 0, done.stderr
    for attempt in attempts or range(max(1, len(faults))):
        codes = ranks.launch(world, *driver, log=log, **env, TORCHELASTIC_RESTART_COUNT=str(attempt))
    return not any(codes), log.read_text()


def records(out):
    lines = [json.loads(line) for f in sorted((out / "trajectories").glob("*.jsonl"))
             for line in f.read_text().split("\n")[:-1]]
    return {r["id"]: (r["x0"], r["order"]) for r in lines}, len(lines)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_while_collecting_and_training(tmp_path, kind):
    """torchrun restarts a run whose rank dies in a record (lora), then ends at SIGTERM; restarted, it dies in a
    step; it is continued by hand on two ranks (the same bits) and on one (the same up to rounding).
    """
    nt_model.save(random_model(max_position_embeddings=160, **VOCAB), tmp_path / "base")
    nt_model.copy_tokenizer("tiny", tmp_path / "base")
    options = ["--model", str(tmp_path / "base"), "--full" if kind == "full" else "--no-full"]
    final = "model/model.safetensors" if kind == "full" else "adapter/adapter_model.safetensors"
    whole, cut, alone = tmp_path / "whole", tmp_path / "cut", tmp_path / "alone"
    ended, said = launch(2, whole, *options)
    assert ended, said[-3000:]
    faults = [dict(rank=1, at="record", n=2, signal=signal.SIGKILL),
              dict(rank=1, at="step", n=3, signal=signal.SIGTERM),  # between two refreshes of the reference
              dict(rank=0, at="step", n=8, signal=signal.SIGKILL)]
    faults = faults[kind == "full":]
    ended, said = launch(2, cut, *options, "--overwrite", faults=faults[:-1], torchrun=kind == "lora")
    assert not ended and said.count("SIGTERM: stopped after step 3;") == 1, said[-3000:]
    ended, said = launch(2, cut, *options, "--overwrite", faults=faults, attempts=[len(faults) - 1])  # as a restart
    assert not ended and not (cut / final).exists(), said[-3000:]
    assert sorted(p.name for p in (cut / "checkpoints").glob("step*")) == ["step-000003", "step-000005"]
    n_files = len(list((cut / "checkpoints/step-000003").glob("*.safetensors")))
    assert n_files == (2 if kind == "full" else 1)
    assert records(cut) == records(whole) and records(whole)[1] == 8
    shutil.copytree(cut, alone)
    same, other = load_file(whole / final), {}
    for world, out in ((2, cut), (1, alone)):
        ended, said = launch(world, out, *options)
        assert ended, said[-3000:]
        other[world] = load_file(out / final)
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 11))
    assert all(torch.equal(same[k], other[2][k]) for k in same)
    base = load_file(tmp_path / "base/model.safetensors") if kind == "full" else {}
    moved, apart = (torch.cat([(t[k] - same[k]).flatten() for k in same]).norm()
                    for t in ({k: base.get(k, torch.zeros(1)) for k in same}, other[1]))
    assert 0 < apart <= 1e-3 * moved


# ------------------------------------------------------------------------------------------------ checkpoints
def trained(seed=0):
    model = lora.add(random_model(), 4, 4)
    opts = [torch.optim.AdamW(training.trainable(model).values(), lr=1e-2)]
    for p in training.trainable(model).values():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    opts[0].step()
    return model, opts


def a_run(tmp_path, model, optimizers):
    """A run that stands between two of its steps."""
    r = training.Run(tad.Config(out=str(tmp_path)))
    r.model, r.optimizers, r.reference = model, optimizers, lambda step: None
    return r


@pytest.mark.parametrize("n_files", [1, 2])
def test_a_checkpoint_cut_anywhere_is_not_used(tmp_path, capsys, n_files):
    model, opts = trained()
    a_run(tmp_path, model, opts)  # its config.json
    tensors = {k: t.detach().clone() for k, t in training.checkpoint_tensors(model, opts, None).items()}
    for step in (5, 10):
        (tmp_path / "checkpoints/tmp").mkdir(parents=True)
        for rank in range(n_files)[::-1]:  # of two, each has half of the rows
            mine = {k: t.chunk(n_files)[rank].contiguous() if t.ndim else t for k, t in tensors.items()}
            training.write_checkpoint(tmp_path / "checkpoints", step, mine, rank, n_files)
    newest, before = tmp_path / "checkpoints/step-000010", tmp_path / "checkpoints/step-000005"
    files, draw = sorted(newest.iterdir()), random.Random(0)
    assert len(files) == n_files and training.newest_checkpoint(tmp_path) == newest
    for cut in [0, *(draw.random() for _ in range(40))]:
        file = draw.choice(files)
        raw = file.read_bytes()
        file.write_bytes(raw[:int(cut * len(raw))])
        cli.say.cache_clear()
        assert training.newest_checkpoint(tmp_path) == before
        assert "damaged" in capsys.readouterr().err
        file.write_bytes(raw)
    for file in files:  # the last byte, a wrong one, the whole file
        raw = file.read_bytes()
        for broken in (raw[:-1], raw[:50] + bytes([raw[50] ^ 1]) + raw[51:], None):
            file.unlink() if broken is None else file.write_bytes(broken)
            assert training.newest_checkpoint(tmp_path) == before
            file.write_bytes(raw)
    other, other_opts = trained(seed=1)
    assert a_run(tmp_path, other, other_opts).resume() == 10
    got = training.checkpoint_tensors(other, other_opts, None)
    assert got.keys() == tensors.keys() and all(torch.equal(got[k], tensors[k]) for k in tensors)


def test_the_last_two_are_kept(tmp_path):
    model, opts = trained()
    r = a_run(tmp_path, model, opts)
    for step in range(1, 6):
        r.save_checkpoint(step)
    r.finish_writing()
    assert [p.name[-1] for p in sorted((tmp_path / "checkpoints").glob("step*"))] == ["4", "5"]


def test_saving_does_not_wait_for_the_disk_and_sees_the_weights_as_they_were(tmp_path, monkeypatch):
    model, opts = trained()
    want, inner = training.checkpoint_tensors(model, opts, None), training.save_tensors
    want = {k: t.detach().clone() for k, t in want.items()}
    gate = threading.Event()
    monkeypatch.setattr(training, "save_tensors", lambda *a: gate.wait(60) and inner(*a))
    r = a_run(tmp_path, model, opts)
    r.save_checkpoint(1)  # returns while its thread waits at the gate
    with torch.no_grad():
        for p in training.trainable(model).values():
            p.add_(1)
    assert not (tmp_path / "checkpoints/step-000001").exists()
    gate.set()
    assert r.resume() == 1
    assert all(torch.equal(t, want[k]) for k, t in training.checkpoint_tensors(model, opts, None).items())
    monkeypatch.setattr(training, "save_tensors", lambda *a: 1 / 0)
    r.save_checkpoint(2)
    with pytest.raises(UserError, match="could not be written: division"):
        r.finish_writing()


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """Another process holds the lock: one line; when it has ended, the folder is free."""
    hold = """import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
input()"""
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "lock")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UserError, match="in use by another run"):
        training.Run(tad.Config(out=str(tmp_path)))
    holder.communicate(b"\n")
    training.Run(tad.Config(out=str(tmp_path)))


def test_a_collection_or_an_evaluation_has_its_folder_alone(tmp_path):
    hold = """import fcntl, sys
files = [open(name, "a") for name in sys.argv[1:]]
[fcntl.lockf(file, fcntl.LOCK_EX) for file in files]
print("held", flush=True)
input()"""
    collected, evaluated = tmp_path / "collected", tmp_path / "evaluated"
    for folder in (collected, evaluated):
        folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", hold, collected / "lock-0", evaluated / "lock-0"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UserError, match="in use by another run"):
        rollout.Shard(collected, 0, 1, "", "")
    with pytest.raises(UserError, match="in use by another run"):
        nt_eval.Kept(evaluated, {})
    rollout.Shard(collected, 1, 1, "", "")  # another rank
    holder.communicate(b"\n")
    rollout.Shard(collected, 0, 1, "", "")
    nt_eval.Kept(evaluated, {})


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    model, opts = trained()
    r = a_run(tmp_path, model, opts)
    r.step, r.n_steps, r.total, r.ids = 3, 10, {"loss": 0.0}, ["a", "b"]
    before = {name: p.detach().clone() for name, p in training.trainable(model).items()}
    for p in training.trainable(model).values():
        p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(UserError, match="gradient norm is nan at step 3"):
        r.update()
    assert all(torch.equal(p, before[name]) for name, p in training.trainable(model).items())
    assert json.loads((tmp_path / "nonfinite-rank0.json").read_text())["ids"] == ["a", "b"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_or_optimizer_state_that_is_not_finite_reaches_no_checkpoint(tmp_path, value):
    for spoil in ("weight", "state"):
        model, opts = trained()
        r = a_run(tmp_path / spoil, model, opts)
        r.step, r.ids = 0, []
        r.save_checkpoint(1)
        r.finish_writing()
        p = next(iter(training.trainable(model).values()))
        (p.data if spoil == "weight" else opts[0].state[p]["exp_avg"]).view(-1)[-1] = value
        with pytest.raises(UserError, match="sum of the weights is .* at step"):
            r.save_checkpoint(2)
        assert training.newest_checkpoint(tmp_path / spoil).name == "step-000001"


# ------------------------------------------------------------------------- signals, full disks, read-only folders
PROGRAM = """import ctypes, os, resource, struct
import cli, grade, layers, tabom
grade.is_correct = lambda *_: True  # a random model answers nothing
layers.can_pack = lambda *args: False

def main():
    if "MODES" in os.environ:  # bind root too
        ctypes.CDLL(None).capset(struct.pack("2I", 0x20080522, 0), bytes(24))
    if "LIMIT" in os.environ:  # bytes of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
    print("began")
    tabom.main()
cli.run_cli(main)
"""


class Processes:
    """Runs in folders below one. whole: the bytes of one that nothing disturbs, which takes `seconds`."""

    def __init__(self, folder):
        self.folder = folder
        nt_model.save(random_model(max_position_embeddings=160, **SMALL), folder / "base")
        nt_model.copy_tokenizer("tiny", folder / "base")
        (folder / "program.py").write_text(PROGRAM)
        rows = [dict(id=f"p{i}", prompt=f"{i} + 1?", answer=str(i + 1)) for i in range(8)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert self("warm-up") == (0, [])
        began = time.monotonic()
        assert self("whole") == (0, [])
        self.seconds, self.whole = time.monotonic() - began, self.adapter("whole")

    def __call__(self, name, number=0, after=120, **env):
        """A process, which gets a signal some seconds after its beginning -> exit code, its messages."""
        log, out = self.folder / "log", self.folder / name
        log.write_text("")
        args = [*METHODS["tabom"], *COMMON, "--max_steps", "3", "--model", self.folder / "base", "--data",
                self.folder / "rows.jsonl", "--out", out]
        (process,) = ranks.start(1, self.folder / "program.py", *args, log=log, **env)
        while process.is_alive() and "began" not in log.read_text():
            time.sleep(0.002)
        process.join(after)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it may end just now
                os.kill(process.pid, number)
        process.join(120)
        usual = ("began", "decoding", "8 of 8 ", "saved")
        said = [line for line in log.read_text().splitlines() if not line.startswith(usual)]
        return process.exitcode, [line for line in said if not re.search("is finished already|more are collected", line)]

    def adapter(self, name):
        file = self.folder / name / "adapter/adapter_model.safetensors"
        return file.read_bytes() if file.exists() else None

    def check_end(self, name):
        """The run is finished, with all of its parts and nothing else."""
        out = self.folder / name
        assert self(name)[0] == 0 and self.adapter(name) == self.whole
        lines = (out / "trajectories/rank0.jsonl").read_text().splitlines()
        assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 8
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3] and not [*out.rglob("*.unfinished*"), *out.rglob("*.tmp")]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("signals"))


def test_signals_at_random_moments(processes):
    """20 of them: moment after moment in one folder until a run comes through; then in the next."""
    draw, number, met = random.Random(0), 0, 0
    while met < 20:
        signum = draw.choice([signal.SIGINT, signal.SIGTERM])
        code, said = processes(f"{number}", signum, draw.uniform(0, processes.seconds))
        assert processes.adapter(f"{number}") in (None, processes.whole)  # whole or absent
        if code == -signum:  # nothing was left to be done
            assert not said and processes.adapter(f"{number}"), said
        elif code:
            words = {130: "interrupted; the same command continues", 143: "SIGTERM: stopped after step "}
            assert len(said) == 1 and said[0].startswith(words[code]), '\n'.join(said)
            met += 1
        else:
            assert not said, said
            processes.check_end(f"{number}")
            number += 1
    processes.check_end(f"{number}")


def mounted(folder, size):
    """A disk of so many bytes at a folder, or the one there made as large; False where mounting is not allowed."""
    libc, remount = ctypes.CDLL(None), 32 * os.path.ismount(folder)
    return not libc.mount(b"tmpfs", bytes(folder), b"tmpfs", remount, f"size={size}".encode())


def test_a_full_disk(processes):
    """A small tmpfs, or where none may be mounted files that may not grow; each time there is a little more room."""
    out, size, met = processes.folder / "full", 4096, 0
    out.mkdir()
    try:
        while True:
            env = {} if mounted(out, size) else dict(LIMIT=str(size - 4000))
            code, said = processes("full", **env)
            if not code:
                break
            assert code == 2 and len(said) == 1 and said[0].startswith("error: "), said
            assert "No space left" in said[0] or "File too large" in said[0], said
            assert processes.adapter("full") is None
            met, size = met + 1, size + 28672
        assert said == [] or said[0].startswith("warning: "), said
        assert met >= 4
        processes.check_end("full")
    finally:
        if os.path.ismount(out):
            ctypes.CDLL(None).umount(bytes(out))


@pytest.mark.parametrize("name", ["", "trajectories", "checkpoints"])
def test_a_read_only_folder(processes, name):
    """The run's own, or one in it, of a run that still has to train."""
    out = processes.folder / f"read-only-{name}"
    out.mkdir()
    if name:
        assert processes(out.name)[0] == 0
        shutil.rmtree(out / "adapter")
        for made in (out / name).iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    (out / name).chmod(0o555)
    code, said = processes(out.name, MODES="1")
    assert code == 2 and len(said) == 1 and "Permission denied" in said[0] and str(out / name) in said[0], said
    assert processes.adapter(out.name) is None
    (out / name).chmod(0o755)
    processes.check_end(out.name)
