"""The command behind the comparison in docs/results.md, with five rows, one step and four problems."""
import json
import shutil
import subprocess

import pytest

import compare
import data
import eval as nt_eval
import model as nt_model
import run
import sweep
from cli import UserError, read_jsonl


@pytest.fixture
def small(monkeypatch, tmp_path):
    rows = ("base", "SFT-SD", "TRIMS", "TAD: near only", "T3D")
    few = {label: command.replace("--n_problems 1000", "--n_problems 8")
           for label, command in sweep.METHODS.items() if label in rows}
    monkeypatch.setattr(sweep, "METHODS", {**few, "TRIMS": few["TRIMS"] + " --n_examples 8"})
    monkeypatch.setattr(sweep, "N_TRAJECTORIES", 8)
    monkeypatch.setattr(sweep, "COMMON", sweep.COMMON.replace("200", "1").replace("16", "4"))
    protocol = {**nt_eval.PROTOCOLS["tiny-table"], "compiled": False}
    monkeypatch.setitem(nt_eval.PROTOCOLS, "tiny-table", protocol)
    out = tmp_path / "sweep"
    monkeypatch.setattr("sys.argv", ["sweep.py", "--seeds", "2", "--n", "4", "--out", str(out)])
    return out


def test_a_sweep_is_resumed_and_makes_the_table(small, monkeypatch, capsys):
    trained, real = [], subprocess.run

    def noted(words, **kw):
        if words[1].endswith(".py"):  # what the runs share is there before the first one
            for name in ("own", "privileged", "rollouts"):
                assert len(data.read_trajectories(small / f"trajectories-{name}")) == 8
            trained.append(words)
        return real(words, **kw)
    monkeypatch.setattr(subprocess, "run", noted)
    inner = sweep.evaluate

    def interrupted(label, folder, *args):
        if folder.name == "sft-sd-1":
            raise KeyboardInterrupt
        return inner(label, folder, *args)
    monkeypatch.setattr(sweep, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main()
    scores = small / "difficulty/rank0.jsonl"
    assert len(read_jsonl(scores)) == 8  # by the first TRIMS run, for all
    scored = scores.stat().st_mtime_ns
    n, stamps = len(trained), {p: p.stat().st_mtime_ns for p in small.glob("*/results.jsonl")}
    assert n == 5 and len(stamps) == 6  # seed 0 whole, seed 1: the base
    monkeypatch.setattr(sweep, "evaluate", inner)
    sweep.main()
    assert len(trained) == 9 and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    assert scores.stat().st_mtime_ns == scored
    text = (small / "compare.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("8 problems")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    rows = {line[0]: line for line in lines}
    assert rows["base"][1] == rows["SFT-SD"][1] == "2"
    for column in compare.COLUMNS:
        assert "±" in rows["TAD: near only"][rows["model"].index(column)], column
    assert (small / "compare.png").stat().st_size > 5000
    packed = compare.read_runs([small / "comparison.jsonl.gz"])
    assert list(packed) == list(sweep.METHODS) and compare.compare(packed, "base", "SFT-SD") + "\n" == text
    monkeypatch.setattr(sweep, "prepare", None)  # what is finished is only shown
    sweep.main()
    assert (small / "compare.md").read_text() == text
    monkeypatch.setattr("sys.argv", ["sweep.py", "--seeds", "2", "--n", "3", "--out", str(small)])
    with pytest.raises(UserError, match="other problems"):  # never shown as the table of --n 3
        sweep.main()
    # disjoint problems per seed, the same for every row; the SFT trained on the shared trajectories
    ids = {p.parent.name: read_jsonl(p)[0]["ids"] for p in small.glob("*/results.jsonl")}
    assert ids["base-0"] == ids["sft-sd-0"] == ids["tad-near_only-0"]
    assert not set(ids["base-0"]) & set(ids["base-1"])
    config = json.loads((small / "sft-sd-0/config.json").read_text())
    assert config["data"] == str(small / "trajectories-own") and config["seed"] == 0


def test_the_teacher_scores_once_for_all_trims_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "METHODS", {"TRIMS": "trims.py --n_examples 8",
                                            "SFT-GT": "trims.py --trajectory_share 0 --n_examples 8"})
    monkeypatch.setattr(sweep, "COMMON", "--max_steps 1 --batch_size 4 --micro_batch 4")
    appended = []
    for seed in (0, 1):
        sweep.train("TRIMS", seed, tmp_path / f"trims-{seed}")
        appended.append((tmp_path / "difficulty/rank0.seconds").read_text())
    assert appended[0] == appended[1] and len(read_jsonl(tmp_path / "difficulty/rank0.jsonl")) == 8
    spent = [sweep.costs(tmp_path / f"trims-{seed}")["collect_s"] for seed in (0, 1)]
    assert spent[0] == spent[1] > 0  # each would have had to
    shutil.rmtree(tmp_path / "difficulty")  # a link to nothing is no error: scored again
    shutil.rmtree(tmp_path / "trims-1/adapter")
    sweep.train("TRIMS", 1, tmp_path / "trims-1")
    assert (tmp_path / "trims-1/difficulty/rank0.jsonl").exists()
    sweep.train("SFT-GT", 0, tmp_path / "sft-gt-0")
    assert sweep.costs(tmp_path / "sft-gt-0")["collect_s"] == 0


def test_only_what_the_rows_share_is_prepared(small, tmp_path):
    model, tok = nt_model.load("tiny"), data.load_tokenizer("tiny")
    assert len(sweep.prepare({"base", "SFT-SD"}, model, tok, tmp_path)) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["trajectories-own"]


def test_a_run_that_fails_stops_the_sweep(small, monkeypatch):
    monkeypatch.setattr(sweep, "METHODS", {"base": "", "broken": "tad.py --window never"})
    with pytest.raises(UserError, match="broken, seed 0: tad.py ended with 2"):
        sweep.main()
    monkeypatch.setattr("sys.argv", ["sweep.py", "--only", "nothing"])
    with pytest.raises(UserError, match="unknown"):
        sweep.main()


def test_every_row_is_a_command_its_script_accepts(monkeypatch, tmp_path):
    import importlib
    for label, line in sweep.METHODS.items():
        if line:
            script, *options = sweep.command(label, 1, tmp_path / "run")
            module = importlib.import_module(script[:-3])
            monkeypatch.setattr("sys.argv", [script, *options])
            cfg = run.parse(module.Config, module.PRESETS, "")
            getattr(module, "check_config", lambda cfg: None)(cfg)
            assert cfg.seed == 1 and cfg.lora_r == 32 and cfg.batch_size == 16
