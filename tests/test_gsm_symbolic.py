"""The data set that a package makes: GSM-Symbolic of reasoning-gym."""
import importlib
import json
import shutil
import sys

import pytest
from checkpoints import official_checkpoint
from conftest import ROOT

import cli
import data
import grade
import recipes

pytest.importorskip("reasoning_gym")
METHODS = {"tad": ["--window", "2"], "tabom": ["--window", "2"], "t3d": ["--max_prompt", "2000"],
           "trims": ["--teacher", "teacher", "--gen_len", "512"]}


def test_reference_solutions_are_right_and_empty_ones_are_not():
    problems = data.load_problems("gsm-symbolic", n=300)
    assert len(problems) == 300 and len({p["solution"] for p in problems}) == 300
    said = [recipes.gsm8k_row(dict(question="", answer=p["solution"]))["answer"] for p in problems]
    assert [float(a) for a in said] == [float(p["answer"]) for p in problems]  # the generator says both
    assert all(grade.is_correct(p, p["solution"]) for p in problems)
    assert not any(grade.is_correct(p, text) for p in problems for text in ("", "####", "The answer is unknown."))
    wrong = [p["solution"] + f" {float(p['answer']) + 1}" for p in problems]
    assert not any(map(grade.is_correct, problems, wrong))


def test_splits_ask_nothing_twice_and_are_made_again():
    splits = {split: data.load_problems("gsm-symbolic", split) for split in data.AVOIDED}
    assert {split: len(problems) for split, problems in splits.items()} == dict(train=7395, dev=499, test=999)
    asked = [recipes.same_question(p) for problems in splits.values() for p in problems]
    assert len(set(asked)) == len(asked)
    assert len({p["id"] for problems in splits.values() for p in problems}) == len(asked)
    assert data.load_problems("gsm-symbolic", "dev", 20) == splits["dev"][:20]
    rows = [i for part in recipes.MADE.values() for i in part]
    assert sorted(rows) == list(range(9000))  # row i is drawn with the seed i: no two splits share one


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(cli.UserError, match="^gsm-symbolic needs the package reasoning-gym: pip install reasoning-gym$"):
        data.load_problems("gsm-symbolic", "test")


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_every_method_trains_two_steps(tmp_path, monkeypatch, family):
    longest = {"llada": "max_sequence_length"}.get(family, "max_position_embeddings")
    base = official_checkpoint(tmp_path / "base", family, **{longest: 4096})
    monkeypatch.setattr(grade, "is_correct", lambda *_: True)  # a random model is never right
    monkeypatch.setitem(recipes.MADE, "train", range(8))
    shutil.copytree(ROOT / "weights/tiny-ar", tmp_path / "teacher", ignore=shutil.ignore_patterns("SHA256SUMS"))
    config = json.loads((tmp_path / "teacher/config.json").read_text())  # these prompts are bytes to it
    (tmp_path / "teacher/config.json").write_text(json.dumps(config | dict(max_position_embeddings=4096)))
    monkeypatch.chdir(tmp_path)
    for method, options in METHODS.items():
        args = ["--model", base, "--data", "gsm-symbolic", "--gen_len", 8, "--batch_size", 2, "--micro_batch", 2,
                "--max_steps", 2, "--out", tmp_path / method, *options]
        args += [] if method == "trims" else ["--block_len", 4]
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *map(str, args)])
        importlib.import_module(method).main()
        rows = cli.read_jsonl(tmp_path / method / "log.jsonl")
        assert rows[-1]["step"] == 2 and rows[-1]["grad_norm"] > 0, method
