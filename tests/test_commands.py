"""Command lines changed at random, of every script: refused in one line with exit code 2 before anything is collected
or trained, or taken, and stopped here where the work would begin.
"""
import functools
import importlib
import inspect
import io
import random
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import random_model
from small_runs import VOCAB
from test_flags import COMMANDS, METHODS

import cli
import compare
import data
import lora
import model as nt_model
import rollout
import run as training
import sample
import sweep
import trims

nt_eval, bench, harness = (importlib.import_module(name) for name in ("eval", "bench", "harness"))
WORK = [(rollout, "decode_into"), (trims, "score_examples"), (training.Run, "steps"), (sample, "generate"),
        (sample, "stream"), (nt_eval, "curve"), (nt_eval, "load_teacher_tokenizer"), (nt_eval, "mean_of"),
        (nt_eval, "draw"), (compare, "compare"), (bench, "measure"), (harness, "lm_eval_package"),
        (sweep, "prepare"), (sweep, "run_script"), (lora, "merge")]
COMMANDS = {**COMMANDS, "model": (nt_model, [], [nt_model.ModelOptions]), "lora merge": (lora, [], [lora.Merge])}
LORA = {"merge": (lora.merge_command, lora.Merge)}
GIVEN = {"eval nll": ["--teacher=tiny-ar"], "harness": ["--tasks=x"], "eval tds": ["--trajectories=records"], "eval log": ["a_run"],
         "rollout collect": ["--out=collected"], "rollout inspect": ["records"], "rollout stats": ["records"],
         "compare runs": ["results"], "sweep paper": ["TAD-4"], "data stats": ["tiny"],
         "lora merge": ["--adapter=adapter", "--to=merged"]}
TEXTS = ["", " ", "é∅𝄞", "\udcff", "a\nb", "x" * 300, "/dev/null", "/proc/self/mem", "none/such/place", "--", "-1", "%s",
         "{}", "rows.jsonl", "base", "../base", "nan", "a+b", "a=b", "x:y=z", "."]
NUMBERS = ["", "nan", "inf", "-inf", "1e309", "-1e309", "x", "²", "0x10", "1e", "10**3", "1,5", "9" * 40,
           "-" + "9" * 40, "None", "True", "[1]", "١", "--", "0", "-1", "1", "0.5"]
N = 34  # command lines of each of 25 commands
TAKEN = set()  # (command, words) that were tried without an option that changes nothing


class Begun(BaseException):
    """The work begins."""


def begin(*args, **kw):
    raise Begun


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one of each thing that a command can be given."""
    folder = tmp_path_factory.mktemp("commands")
    nt_model.save(random_model(max_position_embeddings=160, **VOCAB), folder / "base")
    nt_model.copy_tokenizer("tiny", folder / "base")
    base = nt_model.load(folder / "base")
    rollout.rollout(base, data.load_tokenizer("tiny"), data.load_problems("tiny", "train", 4), folder / "records",
                    "base", gen_len=8, block_len=4, policy="static", per_step=1)
    lora.save(lora.add(base, 4, 4), folder / "adapter")
    (folder / "rows.jsonl").write_text('{"id": "a", "prompt": "1 + 1?", "answer": "2", "solution": "It is 2"}\n')
    (folder / "a_run").mkdir()
    cli.append_line(folder / "a_run/log.jsonl", dict(step=1, loss=1.0, tok_per_s=2.0))
    point = dict(label="base", rule="threshold 0.9", ids=["a", "b"], correct=[1, 0], tokens=[5, 6], nfe=[4, 4],
                 seconds=1.0)
    nt_eval.write_results([("base", [point])], folder / "results")
    return folder


@pytest.fixture
def called(place, monkeypatch):
    """Call a command with words -> its exit code (0 also where its work begins), and its lines on stderr."""
    for owner, name in WORK:
        monkeypatch.setattr(owner, name, begin)
    few = data.game_problems
    monkeypatch.setattr(data, "game_problems", lambda name, split, n: few(name, split, min(n, 80)))
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    monkeypatch.setattr("builtins.input", begin)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.chdir(place)

    def call(command, *words):
        module, *_ = COMMANDS[command]
        said = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as stderr is outside of pytest
        monkeypatch.setattr(sys, "stderr", said)
        monkeypatch.setattr(sys, "argv", [module.__file__, *command.split()[1:], *words])
        try:
            cli.run_cli(module.main if hasattr(module, "main") else lambda: cli.run_command(
                module.__doc__, getattr(module, "COMMANDS", LORA)))
            code = 0
        except Begun:
            code = 0
        except SystemExit as e:
            code = e.code
        said.seek(0)
        return code, said.read().splitlines()
    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def kind_of(cls, field):
    """-> the type of an option's values, and their choices or None."""
    kind = get_type_hints(cls)[field.name]
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    choices = field.metadata.get("choices") or (get_args(kind) if get_origin(kind) is Literal else None)
    return kind, list(choices() if callable(choices) else choices) if choices else None


def value_of(name, kind, choices, draw):
    """-> a word that gives an option a value, and whether such an option may have it."""
    if kind is bool:
        return draw.choice([(f"--{name}", True), (f"--no-{name}", True), (f"--{name}=1", False),
                            (f"--{name}=", False), (f"--no-{name}=x", False)])
    if choices:
        value = draw.choice(choices + ["", "x", choices[0].upper() + "x", choices[-1][:-1] + "?", "é"])
        return f"--{name}={value}", value in choices
    if kind is str:
        value = draw.choice(TEXTS)
        return f"--{name}={value}", value not in ("", "--")
    least, most = (1, 9) if name == "seeds" else cli.BOUNDS[name]  # a list of all its jobs is made
    near = [least, most, draw.uniform(least, min(most, 99)), least - 1, 2 * most + 1, -draw.uniform(0.1, 9)]
    value = draw.choice(NUMBERS + [str(round(x) if kind is int else x) for x in near] * 3)
    try:
        least, most = cli.BOUNDS[name]
        return f"--{name}={value}", least <= kind(value) <= most
    except ValueError:
        return f"--{name}={value}", False


def changed(command, number, draw):
    """-> the words of a good command line after one to four changes, and whether they can still mean something."""
    module, _, classes = COMMANDS[command]
    options = [(field, *kind_of(cls, field)) for cls in classes for field in fields(cls)]
    words, good = [*GIVEN.get(command, [])], True
    words += ["--model=base"] * any(field.name == "model" for field, *_ in options)
    words += [f"--out=run-{number}"] * (command in METHODS)
    named = [option for option in options if not option[0].metadata.get("positional")]
    for field, kind, choices in draw.sample(named, min(len(named), draw.choice([1, 1, 2, 3]))):
        word, may_be = value_of(field.name, kind, choices, draw)
        words, good = [*words, word], good and may_be
    valued = [field.name for field, kind, _ in named if kind is not bool and "bare" not in field.metadata]
    fault = draw.choice(["", "", "", "twice", "place", "no value", "unknown", "short"])
    if fault == "twice":
        words.append(words[-1] if words and words[-1].startswith("--") else "--help=")
        good = good and words[-1] != "--help="
    elif fault == "place" and GIVEN.get(command, ["-"])[0][0] != "-":  # another first argument
        words[0] = draw.choice(TEXTS)
        good = good and words[0] not in ("", "--", "-1")
    elif valued and fault in ("no value", "short"):
        name = draw.choice(valued)
        words.append(f"--{name}" if fault == "no value" else f"--{name[:-1]}_=1")
        good = False
    elif fault == "unknown":
        words, good = [*words, draw.choice(["--nonsense", "-z", "--nonsense=1", "surplus"])], False
    return words, good


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_changed_command_line(command, called):
    draw, codes = random.Random(command), []
    assert called(command, *(["--model=base"] if "merge" in command else []), *GIVEN.get(command, []))[0] == 0
    for number in range(N):
        words, good = changed(command, number, draw)
        code, said = called(command, *words)
        codes.append(code)
        assert code in ((0, 2) if good else (2,)), (words, said)
        if code:
            assert [line[:7] for line in said if not line.startswith("warning: ")] == ["error: "], (words, said)
        assert not any("Traceback" in line for line in said), words
    assert not Path("collected").exists() or not list(Path("collected").glob("*.jsonl"))
    assert 2 in codes


@pytest.mark.parametrize("command, words, why", [
    ("tad", "--near none --distant none", "nothing is left"), ("tad", "--window 9223372036854775807", "positive number"),
    ("tad", "--window 1000000000", "positive number"), ("tad", "--window 000", "positive number"),
    *((method, "--lora_targets q_proj,q_proj", "LoRA targets") for method in METHODS),
    ("tad", "--near none --source gt_random", "nothing is left"), ("tabom", "--window 1", "two tokens"),
    ("tabom", "--segment two_steps", "not ranked"), ("t3d", "--refresh 0", "give 1 or more"),
    ("t3d", "--eos_in_loss 2", "for block-causal models"), ("sample", "--threshold 90", "at most 1"),
    ("trims", "--n_problems 7", "exceeds the data"),
    ("trims", "--n_problems 1 --trajectory_share 0 --max_steps 0", "exceeds the data"),
    ("sample", "--html a.html --prompts rows.jsonl", "is for one prompt"),
    *((method, "--trajectories records+records --collect_seed 1", "is for collecting") for method in ("tad", "tabom", "t3d")),
    ("eval curve", "--points 99", "has 0 to"), ("bench", "--temperature 1", "the --per_step best"),
    ("eval curve", "--thresholds 0.5 0.7 --policy static", "has one"),
    ("trims", "--data no/such --no-only_correct", "no/such is none"),
    ("compare runs", "a_run/log.jsonl", "absent or of another type"),
    ("eval curve", "--protocol tiny-static --thresholds 0.5", "has one"),
    *(("compare runs", f"--control {label}", f"'{label}': there are") for label in ("SFT-X", "TAD", "SFT-SD")),
    ("lora merge", "--to base", "not empty"),
    *((method, f"--batch_size 5000 {more}", "exceeds the data") for method in METHODS
      for more in ("", "--max_steps 5"))])
def test_options_that_contradict(command, words, why, called):
    code, said = called(command, *GIVEN.get(command, []), *words.split())
    assert code == 2 and len(said) == 1 and said[0].startswith("error: ") and why in said[0], said


@pytest.mark.parametrize("command, words, more", [
    *((method, "--full", more) for method in METHODS for more in (
        "--lora_r 8", "--lora_alpha 8", "--lora_dropout 0.1", "--lora_targets all", "--fsdp")),
    *((method, "--lr_schedule constant", "--lr_floor 0.1") for method in METHODS),
    ("tad", "", "--collect_top_p 0.9"), ("tabom", "", "--collect_top_p 0.9"),
    ("trims", "--warmup_ratio 0.1", "--warmup_steps 3"), ("trims", "", "--with_thinking"), ("trims", "", "--no-only_correct"),
    ("trims", "--data rows.jsonl --batch_size 1", "--no-only_correct"),
    ("trims", "--data records --model base --gen_len 8 --batch_size 1 --no-only_correct", "--with_thinking"),
    *(("trims", "--trajectory_share 0", more) for more in (
        "--teacher tiny-ar", "--metric entropy", "--n_buckets 4", "--ordering random", "--p_context 0.1", "--p_future 0.9",
        "--trajectory_weight none", "--score_batch 2")),
    *(("tad", "--distant ce", more) for more in ("--tau 2", "--teacher_prompt plain")),
    ("tad", "--distant none", "--lam 2"), ("t3d", "--lam 0", "--path code"),
    *(("tad", f"--source {source}", more) for source in ("traj_random", "gt_random") for more in (
        "--tau 2", "--teacher_prompt plain", "--distant ce", "--lam 2")),
    *(("t3d", "--loss naive_td", more) for more in ("--alpha 1", "--beta 1", "--logratio sum", "--fake argmax", "--refresh 3")),
    *(("tabom", "--lam 0", more) for more in ("--gamma 0.1", "--entropy_at own_step")),
    ("tabom", "--lam 0 --segment two_steps", "--window 8"), ("sample", "", "--batch_size 2"), ("sample", "", "--per_step 2"),
    ("sample", "--policy static", "--threshold 0.9"), ("sample", "", "--top_p 0.9"), ("sample", "", "--vicinity 4"),
    ("harness", "--protocol tiny", "--threshold 0.5"), ("bench", "", "--vicinity 3"),
    ("rollout collect", "", "--threshold 0.9"), ("eval curve", "", "--vicinity 3"), ("eval curve", "--policy static --out b", "--threshold 0.5"),
    ("harness", "--protocol tiny", "--block_add 0.5"), ("bench", "", "--threshold 0.9")])
def test_an_option_that_changes_nothing_is_named(command, words, more, called):
    """Alone, the words are taken; with the option behind them they are refused, and it is named."""
    given = [*GIVEN.get(command, []), *words.split()]
    if (command, words) not in TAKEN:
        assert called(command, *given) == (0, [])
    TAKEN.add((command, words))
    code, said = called(command, *given, *more.split())
    name = more.split()[0].replace("--no-", "--")
    assert code == 2 and len(said) == 1 and said[0].startswith(f"error: {name} ") and said[0].endswith(": leave it out"), said
