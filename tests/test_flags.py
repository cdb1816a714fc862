"""Every numeric option of every command has bounds, and a value outside them ends in one line, before anything."""
import functools
import importlib
import inspect
import io
import math
import os
import random
import re
import runpy
import socket
import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import ROOT

import cli
import compare
import data
import harness
import run
import sample
import sweep
import t3d
import tabom
import tad
import trims

eval_module = importlib.import_module("eval")
METHODS = {module.__name__: (module, [], [module.Config]) for module in (tad, t3d, tabom, trims)}
BENCH, ROLLOUT = (importlib.import_module(name) for name in ("bench", "rollout"))
REQUIRED = {"nll": ["--teacher", "tiny-ar"], "collect": ["--out", "out"], "inspect": ["out"], "stats": ["out"], "tds": ["--trajectories", "out"],
            "runs": ["out"], "published": ["gsm8k"], "log": ["out"], "merge": ["--adapter", "a", "--to", "b"]}
COMMANDS = {
    **METHODS, "sample": (sample, [], [sample.Options, sample.Decoding]),
    "bench": (BENCH, [], [BENCH.Options, sample.Decoding]), "sweep": (sweep, [], [sweep.Options]),
    "sweep paper": (sweep, ["paper"], [sweep.PaperOptions]),
    "harness": (harness, ["--tasks", "gsm8k"], [harness.Options, sample.Decoding]),
    **{f"{module.__name__} {name}": (module, [name, *REQUIRED.get(name, ())], classes)
       for module in (eval_module, ROLLOUT, data, compare) for name, (_, *classes) in module.COMMANDS.items()}}


def numeric(classes):
    """Yield (option, int or float) of the fields of dataclasses."""
    for cls in classes:
        hints = get_type_hints(cls)
        for field in fields(cls):
            kind = hints[field.name]
            kinds = [a for a in get_args(kind) if a is not type(None)] or [kind]
            if get_origin(kinds[0]) is list:
                kinds = get_args(kinds[0])
            if kinds[0] in (int, float):
                yield field.name, kinds[0]


def test_every_numeric_option_has_bounds_that_hold_its_defaults():
    named = set()
    made = runpy.run_path(str(ROOT / "weights/train.py"))["Config"]
    for _, _, classes in [*COMMANDS.values(), (None, [], [made])]:
        named |= {name for name, _ in numeric(classes)}
        for cls in classes:
            for name, _ in numeric([cls]):
                value = getattr(cls, name, None)
                if value is not None:
                    cli.check_numbers({name: value})
    assert named == cli.BOUNDS.keys()
    for module, _, _ in METHODS.values():
        for preset in module.PRESETS.values():
            cli.check_numbers(preset)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_number_outside_is_one_line_before_anything_happens(command, monkeypatch, tmp_path, capsys):
    module, words, classes = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    draw = random.Random(command)
    for name, kind in numeric(classes):
        least, most = cli.BOUNDS[name]
        below, above = least - draw.uniform(1e-3, 10), most * draw.uniform(1.1, 1e3) + 1
        values = [str(math.floor(below)), str(math.ceil(above)), "x", "", "1e", "²", "0x10"]
        values += [repr(below), repr(above), "nan", "inf", "-inf"] if kind is float else ["1.5", "nan", "1e3"]
        for value in draw.sample(values, 2):
            given = draw.choice([[f"--{name}={value}"], [f"--{name}", value]])
            with pytest.raises(cli.UserError) as ended:
                called(module, monkeypatch, *words, *given)
            said = str(ended.value)
            assert (f"{name} is " in said or f"--{name}" in said) and "\n" not in said, (name, value)
    assert not list(tmp_path.iterdir())


def called(module, patch, *words):
    """A command, in this process."""
    patch.setattr(sys, "argv", [module.__file__, *words])
    module.main() if hasattr(module, "main") else cli.run_command(module.__doc__, module.COMMANDS)


@pytest.mark.parametrize("value, bound", [("-7744", "at least 1"), ("0", "at least 1"), ("-1", "at least 1"), ("131073", "at most 131072")])
def test_a_longest_prompt_that_cannot_be(monkeypatch, value, bound):
    """Refused by its name in whichever command has it, not by what comes of it later."""
    having = [name for name, (_, _, classes) in COMMANDS.items() if "max_prompt" in dict(numeric(classes))]
    assert {"tad", "t3d", "tabom", "trims", "sample", "eval curve", "eval nll", "rollout collect"} <= set(having)
    for name in having:
        module, words, _ = COMMANDS[name]
        with pytest.raises(cli.UserError, match=f"^max_prompt is {value}: it must be {bound}$"):
            called(module, monkeypatch, *words, "--max_prompt", value)


class Reached(Exception):
    """A command has gone as far as it may in a test."""


NUMBERS = ["0", "1", "2", "3", "7", "-1", "x", "", " ", "1.5", "\u00b2", "1e3", "nan", "0x1", "9" * 5000]
LAUNCHED = {"RANK": NUMBERS, "LOCAL_RANK": NUMBERS, "WORLD_SIZE": NUMBERS,
            "MASTER_PORT": ["29500", "1", "65535", "0", "65536", "-1", "x", "", "2 9", "99999", "tcp://10.0.0.1:29500", "9" * 5000],
            "MASTER_ADDR": ["localhost", "127.0.0.1", "", "nowhere", "256.0.0.1", "a b", "a..b", "x" * 300, "http://localhost", "\udcff"]}
IGNORED = ["GROUP_WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE", "ROLE_RANK", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT",
           "TORCHELASTIC_MAX_RESTARTS", "SLURM_PROCID", "NODE_RANK"]  # without --overwrite
SMALL = ["--batch_size", "4", "--gen_len", "48", "--eval_problems", "0", "--out", "run"]
STARTED = {**{name: (name, [*SMALL, "--n_problems", "8"]) for name in METHODS},
           "eval curve": ("eval curve", ["-n", "2"]), "rollout collect": ("rollout collect", ["-n", "2"]), "harness": ("harness", []),
           "sample": ("sample", ["--prompt", "1 2"])}  # the last one has no ranks


def can_be(env, gpus=torch.cuda.device_count()):
    """Whether a process of these variables has a place among others, or is alone."""
    def number(name, usual):
        return int(env.get(name, usual)) if re.fullmatch("[0-9]{1,5}", env.get(name, usual)) else -1
    world = number("WORLD_SIZE", "1")
    met = world == 1 or env.get("MASTER_ADDR") in ("localhost", "127.0.0.1") and 0 < number("MASTER_PORT", "") < 65536
    return met and 0 <= number("RANK", "0") < world and 0 <= number("LOCAL_RANK", "0") < (gpus or world)


@pytest.mark.parametrize("name", list(STARTED))
def test_a_mutated_environment(name, monkeypatch, tmp_path):
    """One line before a model is loaded and with nothing written; or the work begins, as the rank that was named."""
    command, more = STARTED[name]
    module, words, _ = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))

    def host(address, port):
        if address not in (b"localhost", b"127.0.0.1"):
            raise socket.gaierror(-2, "Name or service not known")
        return [address]

    def reached(*_):
        raise Reached
    monkeypatch.setattr(socket, "getaddrinfo", host)
    for owner, attribute in ((run.Run, "open_folder"), (torch.distributed, "init_process_group"), (harness, "load_tasks"),
                             (eval_module, "load_both"), (ROLLOUT, "load_both"), (sample, "load_both")):
        monkeypatch.setattr(owner, attribute, reached)
    for variable in (*LAUNCHED, *IGNORED):
        monkeypatch.delenv(variable, raising=False)
    draw, ended = random.Random(name), {True: 0, False: 0}
    for _ in range(60):
        rank = draw.randrange(2)
        env = draw.choice([{}, dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")])
        for variable in draw.sample(list(LAUNCHED), draw.randrange(3)):
            env[variable] = draw.choice(LAUNCHED[variable])
        env.pop(draw.choice([*LAUNCHED, *["none"] * 20]), None)
        env |= {variable: draw.choice(NUMBERS) for variable in draw.sample(IGNORED, 2)}
        right = name == "sample" or can_be(env)
        ended[right] += 1
        with monkeypatch.context() as patch:
            for variable, value in env.items():
                patch.setenv(variable, value)
            with pytest.raises(Reached if right else cli.UserError) as end:
                called(module, patch, *words, *more)
            if right and name != "sample":
                assert run.ranks() == (int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))), env
        if not right:
            assert "\n" not in str(end.value) and "use torchrun, or set none of these" in str(end.value), env
            assert all(repr(env[variable]) in str(end.value) for variable in LAUNCHED if variable in env)
    assert name == "sample" or min(ended.values()) > 12, ended
    assert not list(tmp_path.iterdir())


def test_ctrl_c_and_a_full_disk_are_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    def full():
        raise OSError(28, "No space left on device", "out/x")
    for main, code, words in ((interrupted, 130, "the same command continues"), (full, 2, "out/x")):
        with pytest.raises(SystemExit) as ended:
            cli.run_cli(main)
        said = capsys.readouterr().err
        assert ended.value.code == code and words in said and said.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seconds, least, most", [(0.01, 0, 0), (0.1, 4, 7), (1, 60, 140)])  # of an inner step
def test_bars_in_a_log_are_a_few_lines_and_in_a_terminal_bars(seconds, least, most, monkeypatch):
    clock = iter(i * seconds for i in range(10**6))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))

    def work():
        for _ in cli.progress_bar(range(20), "outer"):
            bar = cli.progress_bar(None, "inner", 100)
            for i in range(100):
                bar.set_postfix_str(f"loss {i}", refresh=False)
                bar.update()
            bar.close()
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        work()
    lines = log.getvalue().splitlines()
    assert least <= len(lines) <= most  # one in 30 seconds of either bar
    for line in lines:
        assert re.fullmatch(r"(outer|inner): +\d+% \d+/\d+ \[\d\d:\d\d.*\]", line), line
    assert "\r" in terminal.getvalue() and not terminal.getvalue().endswith("\n")


def test_no_colour_goes_into_a_file(monkeypatch):
    order = torch.tensor([1, 0])
    out = sample.Output(torch.tensor([5, 6]), order, order, torch.tensor([0.2, 1]), 2)
    for stream, drawn in ((io.StringIO(), "  1 | · B\n  2 | A b"),
                          (Terminal(), "  1 | · \033[1;38;5;46mb\033[0m\n"
                                       "  2 | \033[1;38;5;208ma\033[0m \033[38;5;46mb\033[0m")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert sample.show(out, ["a", "b"]) == drawn


@pytest.mark.parametrize("words, want", [
    ("--model llada --warmup_steps 200", dict(warmup_steps=200, warmup_ratio=0)), ("--model llada", dict(warmup_ratio=0.03)),
    ("--model tiny --epochs 5", dict(epochs=5, max_steps=0)), ("--epochs 5 --max_steps 7", dict(epochs=5, max_steps=7)),
    ("--model dream --warmup_steps 0", dict(warmup_steps=0, warmup_ratio=0)),
    ("--model llada --warmup_ratio 0.1", dict(warmup_steps=20, warmup_ratio=0.1))])
def test_what_is_given_is_not_overruled_by_a_preset(words, want, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trims.py", *words.split()])
    cfg = vars(run.parse(trims.Config, trims.PRESETS, ""))
    assert {name: cfg[name] for name in want} == want


@pytest.mark.parametrize("gen_len", [24, 47, 96, 256])
def test_the_responses_of_a_game_have_one_length(gen_len):
    with pytest.raises(cli.UserError, match=f"--gen_len {gen_len}: responses of tiny have 48 tokens"):
        trims.load_examples(trims.Config(gen_len=gen_len), data.load_tokenizer("tiny"))


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "none of these"])
def test_pictures_are_drawn_whatever_the_backend(backend, tmp_path):
    """A notebook's variable reaches the programs that are started from it."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import eval; eval.draw({'a': {'b': [(1, 2)]}}, 'x', 'y', 'a.png')"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(MPLBACKEND=backend))
    assert done.returncode == 0 and (tmp_path / "a.png").stat().st_size > 1000, done.stderr


@pytest.mark.parametrize("name, value", [
    ("clip", -1.0), ("clip", 0.0), ("lr", 0.0), ("lr", -1.0), ("lr", float("inf")), ("lr", float("nan")), ("save_every", 0), ("max_steps", -1),
    ("t_min", 0.0), ("tau", 0.0), ("beta", -1.0), ("batch_size", 0), ("gen_len", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1),
    ("lora_dropout", 1.0), ("lora_r", 0), ("warmup_ratio", 1.5), ("lam", -1.0), ("threshold", -0.5), ("epochs", 0), ("seed", -1), ("limit", 0)])
def test_what_no_run_can_mean_is_outside_whatever_the_table_says(name, value):
    for given in (value, [value], [1, value]):
        with pytest.raises(cli.UserError, match=f"^{name} is .*: it must be at (least|most) "):
            cli.check_numbers({name: given})
