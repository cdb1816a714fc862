"""Real processes of tabom.py that get signals at random moments, or a place where they cannot write: one line each,
and the same command ends in the same bytes.
"""
import ctypes
import json
import os
import random
import shutil
import signal
import time

import pytest
import ranks
from conftest import random_model
from small_runs import COMMON, METHODS, VOCAB

import model as nt_model

PROGRAM = """import ctypes, os, resource, struct
import cli, grade, layers, tabom
grade.is_correct = lambda *_: True  # a random model answers nothing
layers.can_pack = lambda weight: False

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
        nt_model.save(random_model(max_position_embeddings=160, **VOCAB), folder / "base")
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
            os.kill(process.pid, number)
        process.join(120)
        usual = ("began", "decoding", "8 of 8 ", "saved", "evaluate:")
        return process.exitcode, [line for line in log.read_text().splitlines() if not line.startswith(usual)]

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
        assert steps == [1, 2, 3] and not [*out.rglob("*.unfinished"), *out.rglob("*.tmp")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("signals"))


def test_signals_at_random_moments(runs):
    """24 of them: moment after moment in one folder until a run comes through; then in the next."""
    draw, number, met = random.Random(3), 0, 0
    while met < 24:
        signum = draw.choice([signal.SIGINT, signal.SIGTERM])
        code, said = runs(f"{number}", signum, draw.uniform(0, runs.seconds))
        assert runs.adapter(f"{number}") in (None, runs.whole)  # whole or absent
        if code:
            words = {130: "interrupted; the same command continues", 143: "SIGTERM: stopped after step "}
            assert len(said) == 1 and said[0].startswith(words[code]), '\n'.join(said)
            met += 1
        else:
            assert not said, said
            runs.check_end(f"{number}")
            number += 1
    runs.check_end(f"{number}")


def mounted(folder, size):
    """A disk of so many bytes at a folder, or the one there made as large; False where mounting is not allowed."""
    libc, remount = ctypes.CDLL(None), 32 * os.path.ismount(folder)
    return not libc.mount(b"tmpfs", bytes(folder), b"tmpfs", remount, f"size={size}".encode())


def test_a_full_disk(runs):
    """A small tmpfs, or where none may be mounted files that may not grow; each time there is a little more room."""
    out, size, met = runs.folder / "full", 4096, 0
    out.mkdir()
    try:
        while True:
            env = {} if mounted(out, size) else dict(LIMIT=str(size - 4000))
            code, said = runs("full", **env)
            if not code:
                break
            assert code == 2 and len(said) == 1 and said[0].startswith("error: "), said
            assert "No space left" in said[0] or "File too large" in said[0], said
            assert runs.adapter("full") is None
            met, size = met + 1, size + 28672
        print(met, size)
        assert said == [] or said[0].startswith("warning: "), said
        assert met >= 4
        runs.check_end("full")
    finally:
        if os.path.ismount(out):
            ctypes.CDLL(None).umount(bytes(out))


@pytest.mark.parametrize("name", ["", "trajectories", "checkpoints"])
def test_a_read_only_folder(runs, name):
    """The run's own, or one in it, of a run that still has to train."""
    out = runs.folder / f"read-only-{name}"
    out.mkdir()
    if name:
        assert runs(out.name)[0] == 0
        shutil.rmtree(out / "adapter")
        for made in (out / name).iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    (out / name).chmod(0o555)
    code, said = runs(out.name, MODES="1")
    assert code == 2 and len(said) == 1 and "Permission denied" in said[0] and str(out / name) in said[0], said
    assert runs.adapter(out.name) is None
    (out / name).chmod(0o755)
    runs.check_end(out.name)
