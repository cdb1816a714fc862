"""The command behind the comparison in docs/results.md, with four rows, one step and two problems."""
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import official_checkpoint
from conftest import ROOT, command

import cli
import compare
import data
import eval as nt_eval
import model as nt_model
import run
import sweep
from cli import UserError, read_jsonl, run_command
from sample import Decoding


@pytest.fixture
def small(monkeypatch, tmp_path):
    rows = ("base", "SFT-SD", "TAD: near only", "T3D")
    few = {label: command.replace("--n_problems 1000", "--n_problems 4")
           for label, command in sweep.METHODS["tiny"].items() if label in rows}
    monkeypatch.setitem(sweep.METHODS, "tiny", few)
    monkeypatch.setattr(sweep, "N_TRAJECTORIES", 4)
    monkeypatch.setattr(compare.compare, "__defaults__", (20, ""))  # redraws
    monkeypatch.setattr(sweep, "COMMON", sweep.COMMON.replace("200", "1").replace("16", "4"))
    protocol = {**nt_eval.PROTOCOLS["tiny-table"], "compiled": False}
    monkeypatch.setitem(nt_eval.PROTOCOLS, "tiny-table", protocol)
    out = tmp_path / "sweep"
    monkeypatch.setattr("sys.argv", ["sweep.py", "--seeds", "2", "--n", "2", "--out", str(out)])
    return out


class Ended:
    """What a process is like that has ended."""
    def __init__(self, done):
        self.returncode = done.returncode

    def wait(self):
        return self.returncode
    terminate = wait


@pytest.fixture
def started(monkeypatch, tmp_path):
    """[(words, what it said)] of every script that the sweep starts; they run in this process."""
    runs = []

    def start(words):
        done = command(tmp_path, Path(words[1]).name, *words[2:])
        runs.append((words, done.stderr))
        return done
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(Popen=lambda words: Ended(start(words))))
    return runs


def test_a_sweep_is_resumed_and_makes_the_table(small, started, monkeypatch, capsys):
    inner, run_script = sweep.evaluate, sweep.run_script

    def after_what_they_share(*args):
        for name in ("own", "privileged", "rollouts"):
            assert len(data.read_trajectories(small / f"trajectories-{name}")) == 4
        run_script(*args)
    monkeypatch.setattr(sweep, "run_script", after_what_they_share)

    def interrupted(label, folder, *args):
        if folder.name == "sft-sd-1":
            raise KeyboardInterrupt
        return inner(label, folder, *args)
    monkeypatch.setattr(sweep, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main()
    n, stamps = len(started), {p: p.stat().st_mtime_ns for p in small.glob("*/results.jsonl")}
    assert n == 4 and len(stamps) == 5  # seed 0 whole, seed 1: the base
    monkeypatch.setattr(sweep, "evaluate", inner)
    sweep.main()
    assert len(started) == 7 and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    text = (small / "compare.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("4 problems")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    rows = {line[0]: line for line in lines}
    assert rows["base"][1] == rows["SFT-SD"][1] == "2"
    for column in set(compare.COLUMNS) - {"first point, %", "TPF there", "at TPF 3, %"}:  # none here is so fast
        assert "±" in rows["TAD: near only"][rows["model"].index(column)], column
    assert (small / "compare.png").stat().st_size > 5000
    packed = compare.read_runs([small / "comparison.jsonl.gz"])
    assert list(packed) == list(sweep.METHODS["tiny"]) and compare.compare(packed, "SFT-SD") + "\n" == text
    monkeypatch.setattr(sweep, "prepare", None)  # what is finished is only shown
    sweep.main()
    assert (small / "compare.md").read_text() == text
    usual = sys.argv
    for other in (["--n", "1"], ["--split", "dev"], ["--task", "barter"]):  # never shown as their table
        monkeypatch.setattr("sys.argv", [*usual, *other])
        if other[-1] == "barter":
            monkeypatch.setitem(sweep.METHODS, "barter", sweep.METHODS["tiny"])
        with pytest.raises(UserError, match="is of other problems: repeat its --n, or another --out"):
            sweep.main()
    monkeypatch.setattr("sys.argv", [*usual, "--lr", "0.1"])  # has rows of its own
    wanted = []
    monkeypatch.setattr(sweep, "prepare", lambda labels, *_: wanted.extend(labels) or [])
    monkeypatch.setattr(sweep, "run_script", lambda words: wanted.append(words[-1]))
    for owner, name in ((sweep, "evaluate"), (compare, "pack"), (compare, "runs_command")):
        monkeypatch.setattr(owner, name, lambda *_: None)
    sweep.main()
    assert set(sweep.METHODS["tiny"]) <= set(wanted) and str(small / "sft-sd-1-lr0.1") in wanted
    # disjoint problems per seed, the same for every row; the SFT trained on the shared trajectories
    ids = {p.parent.name: read_jsonl(p)[0]["ids"] for p in small.glob("*/results.jsonl")}
    assert ids["base-0"] == ids["sft-sd-0"] == ids["tad-near_only-0"]
    assert not set(ids["base-0"]) & set(ids["base-1"])
    config = json.loads((small / "sft-sd-0/config.json").read_text())
    assert config["data"] == str(small / "trajectories-own") and config["seed"] == 0


def test_what_a_run_cost_is_read_from_its_folder(monkeypatch, tmp_path, started):
    monkeypatch.setitem(sweep.METHODS, "tiny", {"TRIMS": "trims.py --n_problems 8",
                                                "SFT-GT": "trims.py --trajectory_share 0 --n_problems 8"})
    monkeypatch.setattr(sweep, "COMMON", "--max_steps 1 --batch_size 4 --micro_batch 4")
    for label, scores in (("TRIMS", True), ("SFT-GT", False)):  # the teacher's pass stands for collecting
        sweep.run_script(sweep.command(label, 0, tmp_path / label))
        spent = sweep.costs(tmp_path / label)
        assert (spent["collect_s"] > 0) == scores and spent["train_s"] > 0


@pytest.mark.parametrize("task", ["tiny", "barter"])
def test_the_comparison_is_no_table_of_a_paper(task, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["sweep.py", "paper", task, "--quick", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=f"{task} is the comparison: python tools/sweep.py --task {task}"):
        sweep.main()
    assert not (tmp_path / "out").exists()


def test_only_what_the_rows_share_is_prepared(small, tmp_path):
    model, tok = nt_model.load("tiny"), data.load_tokenizer("tiny")
    assert len(sweep.prepare({"base", "SFT-SD"}, model, tok, tmp_path)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["trajectories-own"]


def test_a_run_that_fails_stops_the_sweep(small, started, monkeypatch):
    monkeypatch.setitem(sweep.METHODS, "tiny", {"base": "", "broken": "tad.py --window never"})
    with pytest.raises(UserError, match="tad.py .*--window never .* ended with 2"):
        sweep.main()
    monkeypatch.setattr("sys.argv", ["sweep.py", "--only", "nothing"])
    with pytest.raises(UserError, match="invalid choice"):
        sweep.main()


def accepted(words, model, monkeypatch):
    """Parse a command as its script does, and refuse what it would refuse before any work -> its options."""
    module = importlib.import_module(Path(words[0]).stem)
    monkeypatch.setattr("sys.argv", words)
    if hasattr(module, "PRESETS"):
        cfg = run.parse(module.Config, module.PRESETS, "")
        getattr(module, "check_config", lambda cfg: None)(cfg)
        assert words[0] != "trims.py" or cfg.data not in data.GAMES or cfg.gen_len == data.TINY_LEN
        return cfg
    if words[0] == "tools/harness.py":  # without commands
        args, given = cli.parse("", module.Options, Decoding)
        nt_eval.protocol_of(args.protocol, nt_model.family_of(model), args.tasks, args.points, **given)
        return args
    seen, commands = [], getattr(module, "COMMANDS", {"paper": (None, sweep.PaperOptions)})
    run_command("", {name: (lambda *args: seen.append(args), *classes) for name, (_, *classes) in commands.items()})
    args, *given = seen[0]
    if words[:2] == ["eval.py", "curve"]:
        family = nt_model.family_of(model)
        nt_eval.protocol_of(args.protocol, family, args.task, args.points, args.thresholds, **given[0])
    return args


def test_every_row_is_a_command_its_script_accepts(monkeypatch, tmp_path):
    for task, rows in sweep.METHODS.items():
        assert list(rows) == list(sweep.METHODS["tiny"])
        for label in filter(rows.get, rows):
            words = sweep.command(label, 1, tmp_path / "run", task)
            cfg = accepted(words, task, monkeypatch)
            assert (cfg.seed, cfg.lora_r, cfg.batch_size, cfg.model) == (1, 32, 16, task)
            assert getattr(cfg, "teacher", f"{task}-ar") == f"{task}-ar"
            assert accepted(sweep.command(label, 1, tmp_path / "run", task, 3e-4), task, monkeypatch).lr == 3e-4


@pytest.mark.parametrize("place", ["a b", "a'b", "$HOME", "a+b;c"])
def test_a_folder_with_strange_characters_is_one_word(monkeypatch, tmp_path, place):
    for label in ("TAD", "T3D"):
        words = sweep.command(label, 0, tmp_path / place / "run")
        assert words[-1] == str(tmp_path / place / "run")
        accepted(words, "tiny", monkeypatch)
    shutil.copytree(ROOT / "weights/tiny", tmp_path / f"models/{place}")
    for words in sweep.paper_commands("TAD-4", str(tmp_path / "models" / place), tmp_path / place):
        assert all(place in word for word in words if str(tmp_path) in word)
        assert "--model" not in words or words[words.index("--model") + 1].endswith(place)


DREAM = "--score entropy --block_len 256 --temperature 0.1 --top_p 0.9"


@pytest.mark.parametrize("table, words, n", [
    ("TABOM-2", "--gamma 0.1 --lam 2 --lr 1e-4", 1), ("TABOM-6", DREAM, 4), ("TABOM-fig2", DREAM, 0),
    ("TABOM-fig3", DREAM, 1), ("TAD-9", "--score entropy --temperature 0.2 --top_p 0.95", 4),
    ("TAD-few-shot", "--tasks gsm8k_cot_zeroshot", 5)])
def test_a_block_asks_for_the_family(tmp_path, table, words, n):
    """By its preset, another preset of the family, a hub's folder; elsewhere the commands are other ones."""
    config = ROOT / "tests/fixtures/hub/dream/config.json"
    (tmp_path / "models").mkdir()
    shutil.copyfile(config, tmp_path / "models/config.json")

    def count(model):
        said = [" ".join(line) for line in sweep.paper_commands(table, model, tmp_path / "out")]
        assert all(f"--model {model} " in line or f"--model {tmp_path}/out" in line for line in said if "--model" in line)
        return sum(words in line for line in said)
    least = count("dream")
    assert least >= n and count("dream-coder") == count(str(tmp_path / "models")) == least and count("llada") == 0


@pytest.mark.parametrize("table, model, windows", [
    ("TAD-10", "llada", ["8", "20"]), ("TAD-10", "dream", ["6", "auto-speed"]), ("TAD-1", "llada", ["8", "20"]),
    ("TAD-2", "dream", ["6", "auto-speed"])])
def test_a_family_trains_with_its_own_recipe(tmp_path, monkeypatch, table, model, windows):
    trained = [accepted(words, model, monkeypatch) for words in sweep.paper_commands(table, model, tmp_path)
               if words[0] == "tad.py"]
    assert [cfg.window for cfg in trained] == windows
    dream = (cfg.collect_temperature, cfg.collect_top_p, cfg.collect_score) if (cfg := trained[0]) else None
    assert (dream == (0.2, 0.95, "entropy")) == (model == "dream")


@pytest.mark.parametrize("table", ["TAD-few-shot", "TAD-fig1"])
def test_a_heading_that_calls_another_calls_that_of_the_family(tmp_path, table):
    for model, called in (("llada", "TAD-1"), ("dream", "TAD-2"), ("dream-coder", "TAD-2"), ("tiny", "TAD-1")):
        words = [words for words in sweep.paper_commands(table, model, tmp_path) if words[0] == "tools/sweep.py"]
        assert [line[2] for line in words] == [called]


def test_few_shots_and_filters_are_those_of_table_8(tmp_path):
    asked = {}
    for model in ("llada", "dream"):
        for words in sweep.paper_commands("TAD-few-shot", model, tmp_path):
            if words[0] == "tools/harness.py":
                task, line = words[words.index("--tasks") + 1], " ".join(words)
                asked.setdefault((model, task), set()).add((
                    "--num_fewshot 0" in line, "--metric exact_match,flexible-extract" in line, "--apply_chat_template" in line))
    assert asked == {**{("llada", task): {(False, False, False)} for task in ("gsm8k_boxed", "minerva_math", "mbpp", "humaneval")},
                     **{("dream", task): {(task == "mbpp_instruct", task == "gsm8k_cot_zeroshot", True)} for task in (
                         "gsm8k_cot_zeroshot", "minerva_math", "mbpp_instruct", "humaneval_instruct")}}


@pytest.mark.parametrize("table", ["TAD-1", "TAD-2", "TAD-3", "TAD-4", "TAD-6", "TAD-few-shot"])
def test_a_table_of_aups_has_the_published_y_max(tmp_path, table):
    *_, last = sweep.paper_commands(table, "dream-coder", tmp_path)
    assert last[0] == "tools/compare.py" and last[last.index("--y_max") + 1] == "dream"


def test_the_tiny_model_downloads_nothing_and_collects_its_one_task_once(tmp_path):
    for table in TABLES:
        commands = list(sweep.paper_commands(table, "tiny", tmp_path))
        assert not any("ifeval" in words for words in commands), table
        assert not any("+" in word for words in commands for word in words if str(tmp_path) in word), table


TABLES = re.findall(r"^## ((?:TAD|T3D|TABOM|TRIMS)-\S+)", "\n".join(
    page.read_text() for page in sorted(ROOT.glob("docs/papers-*.md"))), re.M)
MODELS = {"T3D": ["sdar-4b"], "TAD-2": ["dream"], "TABOM-4": ["dream"], "TABOM": ["llada", "dream"],  # else llada:
          **dict.fromkeys(["TAD-9", "TAD-10", "TAD-few-shot", "TAD-fig1", "TRIMS-1", "TRIMS-fig5", "TRIMS-fig7"],
                          ["llada", "dream"])}  # what a block is written for


def test_the_index_has_every_table_and_figure():
    """Of TAD 1 to 10 (no 5), of T3D 1 to 7, of TABOM 1 to 9, of TRIMS 1 to 3, and their figures with data."""
    want = [f"{paper}-{n}" for paper, last in (("TAD", 10), ("T3D", 7), ("TABOM", 9), ("TRIMS", 3))
            for n in range(1, last + 1) if (paper, n) != ("TAD", 5)]
    want += ["TAD-fig1", "TAD-fig3", "TAD-few-shot", "TABOM-fig2", "TABOM-fig3", *(f"TRIMS-fig{n}" for n in range(3, 10))]
    assert sorted(TABLES) == sorted(want)
    index = (ROOT / "docs/papers.md").read_text()
    for table in TABLES:
        assert f"`{table}`" in index
        assert re.search(r"Same\s+protocol: (yes|no|partly|as [A-Z\d]+-\w+|as there)|protocol is the same: T3D-5", sweep_text(table)), table
        if re.search(r"Same\s+protocol: (no|partly)", sweep_text(table)):  # and why
            assert re.search(r"Same\s+protocol: (no|partly)[,.:]\s", sweep_text(table)), table


def sweep_text(table):
    page = next(p.read_text() for p in ROOT.glob("docs/papers-*.md") if f"\n## {table} " in p.read_text())
    return page.split(f"\n## {table} ")[1].split("\n## ")[0]


def check_commands(monkeypatch, root, table, name, quick=False):
    """Each is parsed as its script does, and a folder that is read was written before, or will be by a table."""
    made, seen = [], {}
    for words in sweep.paper_commands(table, name, root, quick):
        writes = {"--out"} if words[0] in ("eval.py", "rollout.py") else {"--out", "--trajectories"}
        for before, word in zip(words, words[1:]):
            for path in word.split("+") if before not in writes else ():
                if path.startswith(str(root)):
                    assert any(path.startswith(f"{at}/") or f"{at}/".startswith(f"{path}/") for at in made), (
                        f"{words}: nothing has written {path}")
        made += [word for before, word in zip(words, words[1:]) if before in writes]
        shape = ["PATH" if word.startswith(str(root)) or before == "--label" else word
                 for before, word in zip(["", *words], words)]
        if tuple(shape) in seen:  # commands that differ in their names alone
            continue
        own = words.index("--model") + 1 if "--model" in words else 0  # one that a run makes is not there yet
        words = [name if i == own and shape[i] == "PATH" else word for i, word in enumerate(words)]
        args = seen[tuple(shape)] = accepted(words, name, monkeypatch)
        if words[0] == "tools/sweep.py":
            sweep.block_of(args.table)
        if quick and words[0] in ("tad.py", "t3d.py", "tabom.py", "trims.py"):
            assert args.max_steps == 2 and args.model == "tiny" and args.batch_size == 4
    assert seen


@pytest.mark.parametrize("table", TABLES)
def test_every_command_of_a_table_is_accepted(monkeypatch, tmp_path, table, capsys):
    """For the models of the paper and, small, for the tiny one."""
    for model in MODELS.get(table, MODELS.get(table.split("-")[0], ["llada"])):
        check_commands(monkeypatch, tmp_path, table, model)
    check_commands(monkeypatch, tmp_path, table, "tiny", quick=True)
    monkeypatch.setattr("sys.argv", ["sweep.py", "paper", table, "--model", model, "--dry_run", "--out", "o"])
    sweep.main()  # what is printed is what would run
    printed = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[1:] for line in printed] == list(sweep.paper_commands(table, model, "o"))


@pytest.mark.parametrize("table, model, right, wrong, message", [
    ("TAD-3", "llada", "--near $near", "--nera $near", "unrecognized arguments: --nera"),
    ("TRIMS-fig6", "llada", "--ordering ascending", "--ordering upwards", "invalid choice: 'upwards'"),
    ("T3D-4", "sdar-4b", "for point in 0 5", "for point in 0 8", "protocol t3d has 0 to 7"),
    ("TABOM-3", "dream", "--tasks ifeval", "--task ifeval", "--tasks|unrecognized"),
    ("TABOM-6", "llada", "collect $how", "collect --top_q 0.9", "unrecognized arguments: --top_q"),
    ("TABOM-1", "dream", "paper TABOM-2", "paper TABOM-20", "no table 'TABOM-20'"),
    ("T3D-2", "sdar-4b", "model $OUT/$data/$row/model", "model $OUT/$row/model", "nothing has written")])
def test_a_wrong_command_of_a_table_is_seen(monkeypatch, tmp_path, table, model, right, wrong, message):
    block = sweep.block_of(table)
    assert right in block
    inner = sweep.block_of
    monkeypatch.setattr(sweep, "block_of", lambda name: block.replace(right, wrong) if name == table else inner(name))
    with pytest.raises((UserError, AssertionError, SystemExit), match=message):
        check_commands(monkeypatch, tmp_path, table, model)


@pytest.mark.parametrize("family, table, refused", [
    ("sdar", "TAD-1", True), ("a2d-bd3lm", "TAD-2", True), ("diffcoder", "TAD-4", True), ("sdar", "T3D-1", False),
    ("llada", "TAD-1", False), ("a2d", "TAD-1", False)])
def test_a_policy_that_a_model_cannot_have_is_refused_before_the_first_command(tmp_path, monkeypatch, family, table, refused):
    """multiblock, of TAD's protocol, is for bidirectional models."""
    folder, ran, inner, asked = official_checkpoint(tmp_path / "base", family), [], nt_model.config_of, []
    monkeypatch.setattr(sweep, "run_script", lambda words, launch=(): ran.append(words))
    monkeypatch.setattr(nt_model, "config_of", lambda *words: asked.append(words) or inner(*words))
    args = sweep.PaperOptions(table=table, model=str(folder), out=str(tmp_path / "out"))
    if refused:
        with pytest.raises(UserError, match="policy multiblock is for bidirectional models"):
            sweep.paper_command(args)
    else:
        sweep.paper_command(args)
    assert bool(ran) != refused and len(asked) <= 3  # a hub is asked each time: twice for its family, and here


@pytest.mark.parametrize("table, model, right", [("T3D-1", "llada", "sdar"), ("TABOM-3", "sdar-4b", "dream, llada"),
                                                 ("T3D-5", str(ROOT / "tests/fixtures/dream_A"), "sdar"), ("TAD-3", "no-such", "no-such")])
def test_a_table_of_another_family_is_refused_before_its_first_command(monkeypatch, tmp_path, table, model, right):
    monkeypatch.setattr(sweep, "run_script", lambda *words: pytest.fail(f"ran {words}"))
    monkeypatch.setattr("sys.argv", ["sweep.py", "paper", table, "--model", model, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=right):
        sweep.main()
    assert not (tmp_path / "out").exists()


def in_process(monkeypatch, fail=()):
    """The processes of sweep.py: a script's main in this one -> the list of what was run."""
    ran = []

    def call(words):
        ran.append([Path(words[1]).name, *words[2:]])
        if any(bad in words for bad in fail):
            return Ended(subprocess.CompletedProcess(words, 2))
        module = importlib.import_module(Path(words[1]).stem)
        with monkeypatch.context() as m:
            m.setattr("sys.argv", list(map(str, words[1:])))
            module.main() if hasattr(module, "main") else run_command("", module.COMMANDS)
        return Ended(subprocess.CompletedProcess(words, 0))
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(check_output=subprocess.check_output, Popen=call))
    return ran


def paper(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["sweep.py", "paper", *map(str, words)])
    sweep.main()


ONE_OF_EACH = {  # a training table, an ablation with its curves, a figure of eval.py: fewer rows and tasks
    "T3D-2": {"math500 gsm8k mbpp humaneval": "gsm8k", "{math500,gsm8k,mbpp,humaneval}": "gsm8k",
              "in t3d-math t3d-code": "in t3d-math", "redi naive-td t3d;": "redi t3d;", "base,sft,redi,naive-td,t3d": "base,redi,t3d",
              "python t3d.py $shared --loss naive_td": "true", "sft --gen_len 600": "true",
              "  measure --model $OUT/sft/model": "true"},
    "TABOM-5": {"for window in 0 32": "for window in 32", "gsm8k math500 humaneval mbpp": "gsm8k",
                "{gsm8k,math500,humaneval,mbpp}": "gsm8k", "{0,32}-": "32-"},
    "TRIMS-fig7": {"descending ascending random": "descending"}}


@pytest.fixture
def small_tables(monkeypatch):
    """The blocks of ONE_OF_EACH, and what the tiny model then does on two problems each."""
    inner, commands = sweep.block_of, sweep.paper_commands

    def block_of(table):
        block = inner(table)
        for long, short in ONE_OF_EACH[table].items():
            assert long in block
            block = block.replace(long, short)
        return block

    def few(*args):
        for words in commands(*args):
            at = "--n_problems" in words and words[0] not in ("t3d.py", "tabom.py", "trims.py")
            yield [*words, "--n_problems", "2"] if at else words
    monkeypatch.setattr(sweep, "block_of", block_of)
    monkeypatch.setattr(sweep, "paper_commands", few)
    monkeypatch.setattr(compare.compare, "__defaults__", (20, ""))  # redraws
    protocols = {**nt_eval.PROTOCOLS, "tiny": nt_eval.PROTOCOLS["tiny-static"] | dict(compiled=False)}
    monkeypatch.setattr(nt_eval, "PROTOCOLS", protocols)


def rows_of(folder):
    """The first column of compare.md."""
    return [line.split(" | ")[0][2:] for line in (folder / "compare.md").read_text().splitlines() if "| " in line]


def test_a_training_table_runs_end_to_end(tmp_path, monkeypatch, small_tables, capsys):
    """T3D-2: collect, two trainings of all weights, a curve of each, and the table."""
    ran = in_process(monkeypatch)
    paper(monkeypatch, "T3D-2", "--quick", "--out", tmp_path)
    assert [words[0] for words in ran] == ["t3d.py", "trims.py", *3 * ["eval.py"], "compare.py"]
    assert rows_of(tmp_path) == ["model", "base", "redi", "t3d"]
    for row in ("redi", "t3d"):
        assert (tmp_path / "t3d-math" / row / "model/model.safetensors").exists()
        assert len(read_jsonl(tmp_path / f"{row}-gsm8k/results.jsonl")) == 1


def test_a_figure_runs_end_to_end(tmp_path, monkeypatch, small_tables):
    """TRIMS-fig7: the teacher's likelihood of the base and of a trained model, in one picture and one file."""
    in_process(monkeypatch)
    paper(monkeypatch, "TRIMS-fig7", "--quick", "--out", tmp_path)
    lines = {row["label"]: row["values"] for row in read_jsonl(tmp_path / "trajectory_nll.jsonl", ours=True)}
    assert list(lines) == ["tiny", f"{tmp_path}/descending/adapter"]
    assert all(len(values) == 48 for values in lines.values())
    assert (tmp_path / "trajectory_nll.png").stat().st_size > 5000


def test_an_ablation_runs_and_continues(tmp_path, monkeypatch, small_tables, capsys):
    """TABOM-5: train per row, evaluate, compare; a command that failed comes again."""
    with monkeypatch.context() as m:
        in_process(m, fail=["32-1"])
        with pytest.raises(UserError, match="eval.py curve .* ended with 2;"):
            paper(m, "TABOM-5", "--quick", "--out", tmp_path)
    ended = read_jsonl(tmp_path / "done.jsonl")
    assert [row["words"][0] for row in ended] == ["tabom.py", "tabom.py", "eval.py", "eval.py"]
    ran = in_process(monkeypatch)
    paper(monkeypatch, "TABOM-5", "--quick", "--out", tmp_path)
    assert len(ran) == 2 and "compare.md" in capsys.readouterr().out  # the last curve and the table
    assert rows_of(tmp_path) == ["model", "base", "32-0", "32-1"]
    paper(monkeypatch, "TABOM-5", "--quick", "--out", tmp_path)
    assert len(ran) == 2  # nothing is left
    with pytest.raises(UserError, match="no table 'TAD-5' in docs/papers-.\\.md: there are"):
        monkeypatch.undo()
        sweep.block_of("TAD-5")


def test_a_table_of_a_model_that_changed_is_made_again(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "weights/tiny", tmp_path / "m")
    ran = []
    monkeypatch.setattr(sweep, "run_script", lambda words, launch: ran.append(words))
    monkeypatch.setattr("sys.argv", ["sweep.py", "paper", "TAD-9", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "out")])
    sweep.main()
    n = len(ran)
    for i, name in enumerate(("model.safetensors", "vocab.json", "config.json"), 2):
        sweep.main()
        assert len(ran) == (i - 1) * n > 1
        with open(tmp_path / "m" / name, "a") as f:
            f.write("\n")
        sweep.main()
        assert len(ran) == i * n
