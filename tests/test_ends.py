"""Runs that end too early, for many reasons: one line says so, and the same command ends in the same bytes."""
import errno
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, command
from small_runs import METHODS, Runs

import cli
import grade
import lora
import model as nt_model
import run as training
import sweep

nt_eval = importlib.import_module("eval")


@pytest.fixture
def runs(tmp_path, monkeypatch, capsys):
    return Runs(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite(runs, method):
    """At the first step, in the middle and at the last; the run goes on from the step before."""
    assert runs(method, "whole") == (0, [])
    out = runs.folder / "broken"
    for bad_step, value in ((0, "nan"), (3, "inf"), (5, "-inf")):
        with runs.patch.context() as patch:
            inner = training.Run.update

            def update(self):
                if self.step == bad_step:
                    p = list(training.trainable(self.model).values())[-1]
                    p.grad.view(-1)[-1] = float(value)
                inner(self)
            patch.setattr(training.Run, "update", update)
            code, said = runs(method, "broken")
        assert code == 2 and len(said) == 1 and f"at step {bad_step}:" in said[0], said
        facts = json.loads((out / "nonfinite-rank0.json").read_text())
        assert facts["step"] == bad_step and len(facts["ids"]) == 4
        newest = training.newest_checkpoint(out)
        assert newest is None if bad_step == 0 else newest.name == f"step-{bad_step:06d}"
        assert not (out / "adapter").exists()
    assert runs(method, "broken") == (0, [])
    assert runs.adapter("broken") == runs.adapter("whole")
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [*range(1, 7)]


# ------------------------------------------------------------------------- interrupted anywhere, and a full disk
WRITES = [(cli, "append_line"), (cli, "write_whole"), (cli, "sync"), (training, "save_tensors"),
          (training, "sync"), (os, "replace"), (nt_model, "save_file")]
PLACES = [*WRITES, (training, "write_checkpoint"), (training, "newest_checkpoint"), (training.Run, "update"),
          (training.Run, "backward"), (training.Run, "save_checkpoint"), (training.Run, "finish_writing"),
          (nt_model, "load"), (lora, "add"), (lora, "save"), (grade, "is_correct"), (torch.optim.AdamW, "step")]


def disturbed(runs, name, place, n, fault):
    """A run in which the n-th call of a function (from 0) meets `fault` -> its exit code, what it said."""
    owner, attribute = place
    inner, calls = getattr(owner, attribute), []
    with runs.patch.context() as patch:
        def call(*args, **options):
            calls.append(1)
            return fault(inner, *args, **options) if len(calls) == n + 1 else inner(*args, **options)
        patch.setattr(owner, attribute, call)
        return runs("tabom", name, "--max_steps", "3")


def interrupted(inner, *args, **options):
    """Before or after the call."""
    if len(str(args)) % 2:
        inner(*args, **options)
    raise KeyboardInterrupt


def full(inner, *args, **options):
    """Some of it is written, then the disk is full."""
    if inner.__name__ == "append_line":
        with open(args[0], "a") as f:
            f.write("".join(map(cli.line_of, args[1:]))[:-9])
    elif inner.__name__ == "write_whole":
        args[0].with_name(args[0].name + ".tmp").write_text(args[1][:len(args[1]) // 2])
    elif inner.__name__ in ("save_file", "save_tensors"):
        args[1].write_bytes(b"x" * 999)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("fault, places, code, words, n_moments", [
    (interrupted, PLACES, 130, "interrupted; the same command continues", 12),
    (full, WRITES, 2, "No space left on device", 8)])
def test_ended_anywhere(runs, fault, places, code, words, n_moments):
    """Moment after moment in one folder until a run comes through; then in the next. All end in the same bytes."""
    assert runs("tabom", "whole", "--max_steps", "3") == (0, [])
    want, draw, number, met = runs.adapter("whole"), random.Random(words), 0, 0
    while met < n_moments:
        place = draw.choice(places)
        got, said = disturbed(runs, f"{number}", place, draw.randrange(6), fault)
        if got:
            assert got == code and len(said) == 1 and words in said[0], (place, got, said)
            assert runs.adapter(f"{number}") in (None, want)  # whole or absent
            met += 1
        else:
            assert said == [] and runs.adapter(f"{number}") == want, place
            number += 1
    assert runs("tabom", f"{number}", "--max_steps", "3") == (0, []) and runs.adapter(f"{number}") == want
    for out in (runs.folder / f"{i}" for i in range(number + 1)):
        lines = (out / "trajectories/rank0.jsonl").read_text().splitlines()
        assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 8
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3] and not list(out.glob("*.unfinished*"))


def test_folders_that_cannot_be(runs):
    (runs.folder / "file").write_text("mine")
    (runs.folder / "cycle").symlink_to("cycle")
    (runs.folder / "linked").symlink_to("file")
    for name in ("file", "cycle", "linked", "file/below", "/dev/null", "/proc/nanotraj", "x" * 300):
        code, said = runs("tabom", name)
        assert code == 2 and len(said) == 1 and said[0].startswith("error: "), (name, said)
        assert name in said[0]
    assert (runs.folder / "file").read_text() == "mine"


# ----------------------------------------------------------------------------------------------- several ranks
@pytest.mark.parametrize("error, code, words", [
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), 1, "another rank"),
    (RuntimeError("NCCL communicator was aborted on rank 1"), 1, "another rank has ended or did not answer"),
    (cli.UserError("lr is 0"), 2, "error: lr is 0"), (PermissionError(13, "denied", "out"), 2, "denied: 'out'"),
    (RuntimeError("shapes do not fit"), None, "")])
def test_an_error_on_one_rank_is_what_is_read(error, code, words, capsys, monkeypatch):
    """The rank that failed says why, the others one line; what nobody foresaw keeps its traceback."""
    monkeypatch.setenv("RANK", "1")

    def main():
        raise error
    with pytest.raises(SystemExit if code else RuntimeError) as ended:
        cli.run_cli(main)
    said = capsys.readouterr().err
    assert not code or (ended.value.code == code and words in said and said.count("\n") == 1)


@pytest.mark.parametrize("rank, world", [("2", "2"), ("x", "1"), ("-1", "2"), ("0", ""), ("1", None), ("0.5", "2")])
def test_a_rank_that_cannot_be(rank, world, monkeypatch):
    assert training.ranks() == (0, 1)
    monkeypatch.setenv("RANK", rank)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(cli.UserError, match=f"'RANK': '{rank}', 'WORLD_SIZE'"):
        training.ranks()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for port in ("abc", "", "-1", "29 500", "0", "65536", "99999", "tcp://10.0.0.1:80", "9" * 5000):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(cli.UserError, match=f"'MASTER_PORT': '{port}'.*use torchrun"):
            training.ranks()
    monkeypatch.setenv("MASTER_PORT", "29500")
    for address in ("no host", "", "a..b", "x" * 300, "localhost:29500", "http://localhost", None):
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        if address is not None:
            monkeypatch.setenv("MASTER_ADDR", address)
        with pytest.raises(cli.UserError, match=f"'MASTER_ADDR': {address or ''!r}.: .*unknown host; use torchrun"):
            training.ranks()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert training.ranks() == (1, 2)
    for local in ("2", "-1", "x", "", "1.0", " 1"):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(cli.UserError, match=f"'LOCAL_RANK': '{local}'"):
            training.ranks()


@pytest.mark.parametrize("words", [["tad.py", "--out", "run"], ["eval.py", "curve"], ["rollout.py", "collect", "--out", "run"],
                                   ["tools/harness.py", "--tasks", "gsm8k"]])
def test_a_host_that_nobody_knows(tmp_path, monkeypatch, words):
    """Of either rank, within seconds, before a model is loaded and with nothing written; torch waits for days."""
    monkeypatch.setattr(nt_model, "load", lambda *_: pytest.fail("a model is loaded"))
    for rank in ("0", "1"):
        began = time.monotonic()
        done = command(tmp_path, *words, WORLD_SIZE="2", RANK=rank, MASTER_ADDR="no host", MASTER_PORT="29500")
        assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
        assert done.stderr.startswith(f"error: {{'RANK': '{rank}'") and done.stderr.count("\n") == 1, done.stderr
        assert time.monotonic() - began < 30


def test_results_of_a_rank_that_is_not_named(monkeypatch, tmp_path):
    """WORLD_SIZE without RANK: torch would look for it itself, and find none."""
    monkeypatch.delenv("RANK", raising=False)
    for name, value in dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *how: joined.append(how))
    monkeypatch.setattr(nt_eval, "agreed", lambda value: value)
    nt_eval.Kept(tmp_path, {})
    assert joined == [("gloo", None, nt_eval.timedelta(days=7), 2, 0)]


def test_stderr_may_be_closed(tmp_path):
    done = subprocess.run(["sh", "-c", f"{sys.executable} {ROOT / 'data.py'} show tiny -n x 2>&-"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stdout


def test_ranks_that_read_other_records(monkeypatch):
    names = [f"tiny-train-{i}" for i in range(9)]
    training.check_alike("out/trajectories", names)
    for others in (names[:-1], [*names, "x"], names[::-1], []):
        with monkeypatch.context() as patch:
            theirs = []
            patch.setattr(training, "agreed", lambda value: theirs.append(value) or value)
            training.check_alike("", others)
            patch.setattr(training, "agreed", lambda value: theirs[0])  # rank 0 has read the others
            with pytest.raises(cli.UserError, match="out/trajectories: this rank reads others than rank 0"):
                training.check_alike("out/trajectories", names)


def answered(number, error):
    """An interrupt that ends in another error, as in torch's C code behind safetensors."""
    def main():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            pass  # lost
        raise error
    return main


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_outside_training_is_one_line(capsys, number):
    """Also where it ends in another error; and none is made of an error that comes later."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(n, signal.default_int_handler) for n in numbers]
    try:
        errors = OSError("x"), cli.UserError("y"), RuntimeError("gloo"), ValueError("could not determine the shape")
        for main in (lambda: signal.raise_signal(number), *(answered(number, error) for error in errors)):
            with pytest.raises(SystemExit) as ended:
                cli.run_cli(main)
            assert ended.value.code == 130 and capsys.readouterr().err == "interrupted; the same command continues\n"

        def later():
            raise cli.UserError("a fault of the user's")
        with pytest.raises(SystemExit) as ended:
            cli.run_cli(later)
        assert ended.value.code == 2 and capsys.readouterr().err == "error: a fault of the user's\n"
    finally:
        for n, handler in zip(numbers, before):
            signal.signal(n, handler)


def test_an_interrupt_that_is_ignored_stays_so():
    """As a shell sets it for what a script starts with &."""
    before = [signal.signal(n, handler) for n, handler in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL))]
    try:
        cli.run_cli(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        for n, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(n, handler)


def test_a_reader_that_has_enough_ends_a_command_quietly(capfd):
    """`python eval.py ... | head`"""
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)

    def main():
        os.write(writer, b"a line\n")
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run_cli(main)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert ended.value.code == 141 and capfd.readouterr() == ("", "")


def test_a_lost_interrupt_comes_again():
    """One that comes while __del__ runs is only reported by Python."""
    class Slow:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def main():
        Slow()
        time.sleep(60)
    before, began = [signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)], time.time()
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run_cli(main)
        assert ended.value.code == 130 and time.time() - began < 30
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


@pytest.mark.parametrize("script", ["tad.py", "t3d.py", "trims.py", "tabom.py", "eval.py", "rollout.py", "sample.py",
                                    "data.py", "lora.py", "model.py"])
def test_ctrl_c_while_a_script_imports(script, monkeypatch, capsys):
    """The ground floor comes before the packages that take seconds, and brings a hook that says one line."""
    lines = (ROOT / script).read_text().splitlines()
    names = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    assert all(name.split(".")[0] in sys.stdlib_module_names for name in names[:names.index("cli")]), names
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted; the same command continues\n"
    usual = []
    monkeypatch.setattr(sys, "__excepthook__", lambda *error: usual.append(error))
    sys.excepthook(ValueError, "x", None)
    assert usual == [(ValueError, "x", None)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_tells_its_child_to_end_and_waits_for_it(tmp_path, number):
    child = """import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[2], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[2], "began").touch()
time.sleep(60)"""
    def interrupt():
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            sweep.run_script(["tad.py", str(tmp_path)], launch=["-c", child])
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert (tmp_path / "saved").exists()


def test_every_epoch_is_kept_as_an_adapter_that_loads(runs, method="tabom"):
    """In each of three parts of six steps; whoever keeps none ends in the same bytes, and so does who was stopped."""
    def epochs(name):
        return {k: (runs.folder / name / f"epoch-{k}/adapter_model.safetensors").read_bytes() for k in (1, 2, 3)}
    assert runs(method, "kept", "--each_epoch", "--epochs", "3") == (0, [])
    assert runs(method, "same", "--epochs", "3") == (0, []) and runs.adapter("same") == runs.adapter("kept")
    assert not list((runs.folder / "same").glob("epoch-*"))
    made = epochs("kept")
    assert made[3] == runs.adapter("kept") and len(set(made.values())) == 3
    for k in (1, 2, 3):
        lora.load(nt_model.load(runs.folder / "base"), runs.folder / f"kept/epoch-{k}")
    with runs.patch.context() as patch:
        inner = training.Run.update

        def update(self):
            inner(self)
            if self.step == 2:
                raise cli.UserError("stopped")
        patch.setattr(training.Run, "update", update)
        assert runs(method, "stopped", "--each_epoch", "--epochs", "3")[0] == 2
    assert runs(method, "stopped", "--each_epoch", "--epochs", "3") == (0, []) and epochs("stopped") == made
