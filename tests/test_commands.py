"""Command lines changed at random, of every script: each is refused in one line with exit code 2 before anything
is collected, loaded for hours or trained, or it is taken, and stopped here where its work would begin.
"""
import functools
import importlib
import inspect
import os
import random
import signal
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import random_model
from dataclasses import fields
from small_runs import VOCAB
from test_flags import COMMANDS

import cli
import compare
import data
import lora
import model as nt_model
import rollout
import run as training
import sample
import sweep
import teacher
import trims

nt_eval, bench, harness = (importlib.import_module(name) for name in ("eval", "bench", "harness"))
WORK = [(rollout, "decode_into"), (trims, "score_examples"), (training.Run, "steps"), (sample, "generate"),
        (sample, "stream"), (nt_eval, "curve"), (nt_eval, "mean_tds"), (nt_eval, "draw"), (compare, "compare"),
        (bench, "measure"), (harness, "lm_eval_package"), (sweep, "prepare"), (sweep, "paper_commands"),
        (lora, "merge")]
COMMANDS = {**COMMANDS, "lora merge": (lora, ["merge"], [lora.Merge]), "model": (nt_model, [], [nt_model.ModelOptions])}


class Begun(BaseException):
    """Where the work begins."""


def begin(*args, **kw):
    raise Begun


def kind_of(cls, field):
    """(type, its choices or None) of an option."""
    kind = get_type_hints(cls)[field.name]
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    choices = field.metadata.get("choices") or (get_args(kind) if get_origin(kind) is Literal else None)
    choices = list(choices() if callable(choices) else choices) if choices else None
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    return str if get_origin(kind) is Literal else kind, choices


ODD = ["", " ", "é∅𝄞", "\udcff", "a\nb", "x" * 300, "/dev/null", "/proc/self/mem", "none/such/place", "rows.jsonl", "base",
       "--", "-1", "%s", "{}", "../base", "nan", "a+b", "a=b", "x:y=z", "."]
JUNK = ["", "nan", "inf", "-inf", "1e309", "-1e309", "x", "²", "0x10", "1e", "10**3", "1,5", "9" * 40, "-" + "9" * 40, "None",
        "True", "[1]", "١"]


def value_of(name, kind, choices, draw):
    """-> a value as words, and whether an option of this kind may be given it."""
    if kind is bool:
        return draw.choice([([f"--{name}"], True), ([f"--no-{name}"], True), ([f"--{name}=1"], False),
                            ([f"--{name}="], False), ([f"--no-{name}=x"], False)])
    if choices:
        value = draw.choice(choices + ["", "x", choices[0].upper() + "x", choices[-1][:-1] + "?", "é"])
        return [f"--{name}={value}"], value in choices
    if kind is str:
        value = draw.choice(ODD)
        return [f"--{name}={value}"], value != ""
    least, most = cli.BOUNDS[name]
    if draw.random() < 0.5:
        value = draw.choice(JUNK)
        try:
            good = least <= kind(value) <= most
        except ValueError:
            good = False
        return [f"--{name}={value}"], good
    value = draw.choice([least, most, draw.uniform(least, min(most, 100)), draw.uniform(least, most), least - 1, most * 2 + 1,
                         -draw.uniform(0.1, 9)])
    value = round(value) if kind is int else value
    return [f"--{name}={value}"], least <= value <= most
