"""Random flips and cuts over every kind of file a run reads: made again, or refused in one line; and what
--overwrite and merge leave alone.
"""
import gzip
import importlib
import json
import random
import resource
import shutil
import sys

import pytest
from conftest import ROOT, random_model
from safetensors.torch import load_file, save_file
from small_runs import VOCAB, Runs

import cli
import compare
import data
import lora
import model as nt_model
import rollout
import run as training
import tabom
from cli import UserError

nt_eval = importlib.import_module("eval")


@pytest.fixture
def runs(tmp_path, monkeypatch, capsys):
    return Runs(tmp_path, monkeypatch, capsys)


def damage(raw, draw):
    """Bytes with one fault: a bit, a lost end, an end of zeros (a power cut), a lost middle, a strange line."""
    at, n = draw.randrange(len(raw)), draw.randrange(1, 60)
    kind = draw.choice(["bit", "bit", "bit", "end", "zeros", "middle", "line"])
    if kind == "bit":
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1:]
    if kind == "line":
        line = draw.choice([b"[1]", b"5", b"null", b"{", b"[" * 9000, b'{"id": 3}', b"\xff\xfe", b""])
        return raw + line if b"\n" not in raw else raw[:raw.rfind(b"\n", 0, at) + 1] + line + b"\n" + raw[at:]
    return {"end": raw[:at], "zeros": raw[:at] + bytes(n), "middle": raw[:at] + raw[at + n:]}[kind]


ROWS = [dict(id=f"r{i}", x0=[i, 2, 3], scores=[0.25, None, 1e-6], text='é "\n\ud83d', correct=i % 2 == 0)
        for i in range(6)]


def test_a_line_is_whole_or_made_again(tmp_path):
    """200 faults: what is read after mending are rows as they were written, and the file then holds no others."""
    file, draw = tmp_path / "rank0.jsonl", random.Random(0)
    cli.append_line(file, *ROWS)
    raw, found = file.read_bytes(), 0
    assert cli.read_jsonl(file, ours=True) == ROWS
    for _ in range(200):
        broken = damage(raw, draw)
        file.write_bytes(broken)
        try:
            strict = cli.read_jsonl(file, ours=True, id=str, x0=list)
            assert all({key: row[key] for key in ROWS[0]} in ROWS for row in strict)
        except UserError as e:
            found += "\n" not in str(e) and "rank0.jsonl line" in str(e)
        mended = [row for row in cli.read_jsonl(file, ours=True, mend=True) if row != {"id": 3}]
        assert all({key: row[key] for key in ROWS[0]} in ROWS for row in mended) and len(mended) >= len(ROWS) - 6
        cli.append_line(file, *(row for row in ROWS if row not in mended))
        assert {row["id"] for row in cli.read_jsonl(file, ours=True)} >= {row["id"] for row in ROWS}
    assert found > 80


def test_lines_of_before_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "x0": [1]}\n{"id": "b", "x0": [2]}\n{"id": "torn')
    assert [row["id"] for row in cli.read_jsonl(tmp_path / "a.jsonl", True, growing=True)] == ["a", "b"]
    with pytest.raises(UserError, match="line 3 is not valid JSON or is damaged"):
        cli.read_jsonl(tmp_path / "a.jsonl", ours=True)
    cli.read_jsonl(tmp_path / "a.jsonl", ours=True, mend=True)
    cli.append_line(tmp_path / "a.jsonl", {"id": "c"})
    assert [row["id"] for row in cli.read_jsonl(tmp_path / "a.jsonl", ours=True)] == ["a", "b", "c"]


@pytest.mark.parametrize("method, pattern, again, n", [
    ("tabom", "trajectories/rank0.jsonl", ["checkpoints"], 12), ("tabom", "checkpoints/step-000003/*", [], 10),
    ("tabom", "log.jsonl", [], 8), ("tabom", "config.json", [], 10),
    ("trims", "difficulty/rank0.jsonl", ["checkpoints"], 6)])
def test_a_run_ends_in_the_same_bytes_or_is_refused(runs, method, pattern, again, n):
    """again: what is made anew, so that the damaged file is read."""
    assert runs(method, "whole", "--max_steps", "3") == (0, [])
    want, draw, out = runs.adapter("whole"), random.Random(pattern), runs.folder / "run"
    for _ in range(n):
        shutil.copytree(runs.folder / "whole", out)
        for name in ["adapter", *again]:
            shutil.rmtree(out / name)
        file = draw.choice(sorted(out.glob(pattern)))
        file.write_bytes(damage(file.read_bytes(), draw))
        code, said = runs(method, "run", "--max_steps", "3")
        if code:
            assert code == 2 and len(said) == 1 and said[0].startswith("error: ") and not runs.adapter("run"), said
        else:
            assert runs.adapter("run") == want and all(line.startswith("warning: ") for line in said), said
        shutil.rmtree(out)


def test_an_adapter_is_as_it_was_written_or_refused(runs):
    assert runs("tabom", "whole", "--max_steps", "1") == (0, [])
    folder, draw = runs.folder / "whole/adapter", random.Random(0)
    files = {file: file.read_bytes() for file in folder.iterdir()}
    assert len(files) == 3
    lora.load(nt_model.load(runs.folder / "base"), folder)
    for _ in range(40):
        file = draw.choice(sorted(files))
        broken = damage(files[file], draw)
        file.write_bytes(broken)
        if broken != files[file] and broken.splitlines() != files[file].splitlines():
            with pytest.raises(UserError) as refused:
                lora.load(nt_model.load(runs.folder / "base"), folder)
            assert "\n" not in str(refused.value)
        file.write_bytes(files[file])


def test_results_of_an_evaluation(tmp_path):
    """The points that a continued evaluation takes over, and the rows of one that is not finished."""
    config, draw = dict(model="tiny", label="x", problems="abc", decoding={}), random.Random(0)
    points = [dict(key=f"k{i}", ids=["a", "b"], correct=[1, 0], tokens=[5, 6 + i], nfe=[4, 4]) for i in range(3)]
    rows = [dict(id=f"p{i}", response="é", tokens=3, nfe=2, seconds=0.5, forwards=2) for i in range(3)]
    kept = nt_eval.Kept(tmp_path, config)
    cli.append_line(kept.results, *points)
    cli.append_line(tmp_path / "rows-k.rank0.jsonl", *rows)
    files = {file: file.read_bytes() for file in tmp_path.glob("*.json*")}
    for _ in range(60):
        file = draw.choice(sorted(files))
        file.write_bytes(damage(files[file], draw))
        try:
            kept = nt_eval.Kept(tmp_path, config)
            assert all({k: point[k] for k in points[0]} in points for point in kept.points.values())
            assert all({k: row[k] for k in rows[0]} in rows for row in kept.rows("rows-k").values())
        except UserError as e:
            assert "\n" not in str(e)
        for file, raw in files.items():
            file.write_bytes(raw)
    assert nt_eval.Kept(tmp_path, config).points.keys() == {"k0", "k1", "k2"}


def test_weights_are_as_they_were_written_or_refused(tmp_path):
    """Of a model that --full, `lora.py merge` or save() made; whole_folder() wrote their checksums."""
    with cli.whole_folder(tmp_path / "model") as folder:
        nt_model.save(random_model(max_position_embeddings=160, **VOCAB), folder)
        nt_model.copy_tokenizer("tiny", folder)
    files, draw = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}, random.Random(0)
    nt_model.load(tmp_path / "model")
    for _ in range(40):
        file = draw.choice(sorted(files))
        broken = damage(files[file], draw)
        file.write_bytes(broken)
        if broken.splitlines() != files[file].splitlines():
            with pytest.raises(UserError) as refused:
                nt_model.load(tmp_path / "model")
            assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
        file.write_bytes(files[file])


def test_trajectories_of_several_folders(runs):
    """--trajectories A+B mends nothing: what is damaged is refused."""
    assert runs("tabom", "whole", "--max_steps", "2") == (0, [])
    want, draw = runs.adapter("whole"), random.Random(0)
    first, second = (runs.folder / name / "rank0.jsonl" for name in "ab")
    lines = (runs.folder / "whole/trajectories/rank0.jsonl").read_bytes().splitlines(keepends=True)
    for file, some in ((first, lines[:4]), (second, lines[4:])):
        file.parent.mkdir()
        file.write_bytes(b"".join(some))
    options = "--max_steps", "2", "--trajectories", f"{first.parent}+{second.parent}"
    assert runs("tabom", "both", *options) == (0, []) and runs.adapter("both") == want
    for number in range(12):
        raw = draw.choice([first, second]).read_bytes()
        file = first if raw == first.read_bytes() else second
        file.write_bytes(raw[:-1 - draw.randrange(60)] if number < 4 else damage(raw, draw))  # torn, four times
        code, said = runs("tabom", f"run-{number}", *options)
        if code or file.read_bytes().splitlines() != raw.splitlines():
            assert code == 2 and len(said) == 1 and said[0].startswith("error: "), said
        else:
            assert runs.adapter(f"run-{number}") == want
        file.write_bytes(raw)
    assert not list(runs.folder.glob("[ab]/*.damaged"))


def test_what_is_only_shown(tmp_path, monkeypatch):
    """Results to compare, the log to draw, the seconds of a collection: as written, or refused in one line."""
    points = [POINT, POINT | dict(rule="1 per forward", run=dict(tds=0.5), provenance=dict(task="tiny"))]
    rows = [dict(step=i, loss=1.5, tok_per_s=2.0) for i in range(5)]
    drawn = []
    monkeypatch.setattr(nt_eval, "draw", lambda panels, *_: drawn.append(panels["loss"]))
    cli.append_line(tmp_path / "results.jsonl", *points)
    cli.append_line(tmp_path / "log.jsonl", *rows)
    cli.append_line(tmp_path / "rank0.seconds", dict(seconds=1.25), dict(seconds=0.5))
    readers = {"results.jsonl": lambda: len(nt_eval.read_points(tmp_path)), "log.jsonl": lambda: (
        nt_eval.log_command(nt_eval.LogOptions([tmp_path])) or len(drawn.pop()[tmp_path])),
        "rank0.seconds": lambda: rollout.collection_seconds(tmp_path)}
    draw, refused = random.Random(0), 0
    for name, reader in readers.items():
        file = tmp_path / name
        raw, want = file.read_bytes(), reader()
        for _ in range(30):
            file.write_bytes(damage(raw, draw))
            try:
                assert reader() <= want  # whole lines may be cut off
            except UserError as e:
                refused += 1
                assert "\n" not in str(e) and name in str(e)
        file.write_bytes(raw)
    assert refused > 45


# --------------------------------------------------------------------------------------- what is left alone
def test_overwrite_removes_only_what_a_run_made(runs):
    assert runs("tabom", "run", "--max_steps", "1") == (0, [])
    out, mine = runs.folder / "run", ["thesis.tex", "adapter-old/x", "notes.jsonl", "model.py", "log.jsonl.mybackup",
                                      "window.docx", "model.unfinished/x", "tds.txt"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (runs.folder / "elsewhere").mkdir()
    (runs.folder / "elsewhere/rank0.jsonl").write_text("mine")
    (out / "difficulty").symlink_to(runs.folder / "elsewhere")
    assert runs("tabom", "run", "--max_steps", "2", "--lr", "1e-3", "--overwrite") == (0, [])
    assert len((out / "log.jsonl").read_text().splitlines()) == 2 and not (out / "difficulty").exists()
    assert all((out / name).read_text() == "mine" for name in [*mine, "../elsewhere/rank0.jsonl"])


def contents(folder):
    return sorted(file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "lock")


@pytest.mark.parametrize("wrong", [[], ["--gen_len", "8000"], ["--batch_size", "64"], ["--trajectories", "other"]])
def test_overwrite_loses_nothing(runs, wrong):
    """Neither a run that is finished, where the new one ends in an error, nor what somebody put into its folders."""
    assert runs("tabom", "other", "--max_steps", "1", "--collect_seed", "3", "--collect_temperature", "1") == (0, [])
    out, mine = runs.folder / "run", ["trajectories/thesis.tex", "adapter/README.md", "curve.png", "epoch-1-notes.txt"]
    assert runs("tabom", "run", "--max_steps", "1") == (0, [])
    for name in mine:
        (out / name).write_text("mine")
    before = contents(out)
    wrong = [runs.folder / "other/trajectories" if word == "other" else word for word in wrong]
    code, said = runs("tabom", "run", "--max_steps", "2", "--overwrite", *wrong)
    assert code == (2 if wrong else 0) and not (out / "curve.png").exists()
    assert contents(out / "overwritten-0") == before
    if wrong:
        assert len(said) == 1 and said[0].startswith("error: "), said
        assert not (out / "adapter").exists() and runs("tabom", "run", "--max_steps", "2") == (0, [])
    assert runs("tabom", "run", "--max_steps", "1", "--overwrite") == (0, [])
    assert (out / "overwritten-1/adapter").is_dir() and contents(out / "overwritten-0") == before
    settings = [json.loads((out / f"{folder}config.json").read_text()) for folder in ("overwritten-0/", "overwritten-1/", "")]
    assert [one["max_steps"] for one in settings] == [1, 2, 1]
    shutil.rmtree(out / "overwritten-0")  # then the first number that is free is taken, and none twice
    assert runs("tabom", "run", "--max_steps", "1", "--overwrite") == runs("tabom", "run", "--max_steps", "1", "--overwrite") == (0, [])
    assert {p.name for p in out.glob("overwritten-*")} == {"overwritten-0", "overwritten-1", "overwritten-2"}


@pytest.mark.parametrize("name", ["trajectories/thesis.txt", "difficulty/mine.txt", "curve.png", "window.jsonl", "log.png"])
def test_a_new_run_writes_over_nothing(runs, name):
    """A folder may hold other files, a job's own log say, but none of a name that a run writes."""
    out = runs.folder / "run"
    (out / name).parent.mkdir(parents=True)
    for file in (out / name, out / "slurm.log"):
        file.write_text("mine")
    for more in ([], ["--overwrite"]):
        code, said = runs("tabom", "run", "--max_steps", "1", *more)
        assert code == 2 and len(said) == 1 and "config.json is absent or not that of a run" in said[0], said
    assert (out / name).read_text() == "mine"
    (out / name).unlink()
    if "/" in name:
        (out / name).parent.rmdir()
    assert runs("tabom", "run", "--max_steps", "1") == (0, []) and (out / "slurm.log").read_text() == "mine"


@pytest.mark.parametrize("given, option", [
    ("run/model", "--model"), ("run/trajectories", "--trajectories"), ("run/trajectories+other", "--trajectories"),
    ("linked", "--model"), ("run/difficulty/rank0.jsonl", "--data"), ("gsm8k={}/run/difficulty/g.jsonl", "--data"),
    ("gsm8k={}/run/difficulty/g*.jsonl", "--data"), ("run/difficulty/rank0.jsonl:prompt=prompt", "--data"),
    ("a+b/model", "--model")])
def test_a_run_does_not_replace_what_it_reads(runs, given, option):
    assert runs("tabom", "run", "--max_steps", "1") == (0, [])
    shutil.copytree(runs.folder / "base", runs.folder / "run/model")
    (runs.folder / "linked").symlink_to("run/model")
    shutil.copytree(runs.folder / "run/trajectories", runs.folder / "run/difficulty")
    row = dict(question="1 + 1?", answer="It is 2.\n#### 2")
    (runs.folder / "run/difficulty/g.jsonl").write_text((json.dumps(row) + "\n") * 8)
    before = {file: file.read_bytes() for file in runs.folder.rglob("*") if file.is_file()}
    out = "a+b" if "a+b" in given else "run"
    (runs.folder / "a+b").symlink_to("run")
    parts = [given] if "a+b" in given else given.split("+")
    given = "+".join(part.format(runs.folder) if "{}" in part else str(runs.folder / part) for part in parts)
    code, said = runs("tabom", out, "--max_steps", "1", option, given, "--overwrite")
    assert code == 2 and "lies in what this command would replace" in said[-1], said
    assert before == {file: file.read_bytes() for file in before}


def test_finished_means_whole(runs):
    """What is damaged is not called finished; results that another program wrote are not ours."""
    assert runs("tabom", "run", "--max_steps", "1") == (0, [])
    assert runs("tabom", "run", "--max_steps", "1") == (0, [f"{runs.folder}/run is finished already; --overwrite starts anew"])
    for file in sorted((runs.folder / "run/adapter").iterdir()):
        raw = file.read_bytes()
        for broken in (raw[:-1], raw[:20] + b"#" + raw[21:], None):
            file.unlink() if broken is None else file.write_bytes(broken)
            code, said = runs("tabom", "run", "--max_steps", "1")
            if file.name != cli.SUMS or broken == raw[:20] + b"#" + raw[21:]:
                assert code == 2 and len(said) == 1 and "is not as it was written" in said[0], (file, said)
        file.write_bytes(raw)
    (runs.folder / "foreign").mkdir()
    (runs.folder / "foreign/results.jsonl").write_text("mine")
    for more in ([], ["--overwrite"]):
        code, said = runs("tabom", "foreign", *more)
        assert code == 2 and "config.json is absent or not that of a run" in said[0], said
    assert (runs.folder / "foreign/results.jsonl").read_text() == "mine"


def test_folders_beside_checkpoints_are_left_alone(runs):
    assert runs("tabom", "run", "--max_steps", "2") == (0, [])
    steps = runs.folder / "run/checkpoints"
    for name in ("step-best", "step-000001-keep", "step-"):
        shutil.copytree(steps / "step-000001", steps / name)
    shutil.rmtree(runs.folder / "run/adapter")
    assert runs("tabom", "run", "--max_steps", "4") [0] == 2  # other settings
    shutil.rmtree(steps / "step-000002")
    assert runs("tabom", "run", "--max_steps", "2") == (0, [])
    assert {p.name for p in steps.iterdir()} == {"step-best", "step-000001-keep", "step-", "step-000001", "step-000002"}


@pytest.mark.parametrize("theirs", [dict(model="gpt", seed=1, micro_batch=4, mine=True), {}, dict(model="x", lr=1)])
def test_the_config_of_another_program(runs, theirs):
    out = runs.folder / "run"
    (out / "model").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(theirs))
    for more in ([], ["--overwrite"]):
        code, said = runs("tabom", "run", *more)
        assert code == 2 and len(said) == 1 and "not that of a run" in said[0] and (out / "model").is_dir(), said


def test_what_a_finished_run_was_trained_with_stays(runs):
    assert runs("tabom", "run", "--max_steps", "1") == (0, [])
    before = (runs.folder / "run/config.json").read_text()
    shutil.rmtree(runs.folder / "run/checkpoints")
    code, said = runs("tabom", "run", "--max_steps", "1", "--lr", "0.5")
    assert code == 2 and "belongs to another configuration (lr 0.01 -> 0.5)" in said[0], said
    assert (runs.folder / "run/config.json").read_text() == before


@pytest.mark.parametrize("change", ["weights", "config", "data", "joined", "named"])
def test_inputs_that_changed_between_two_starts(runs, change):
    """A file of another content under the same name is other data, another model."""
    rows = [dict(prompt="start : 1 2", solution="3 4", answer="4")] * 8
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps(row | dict(id=f"{name}-{i}")) + "\n" for i, row in enumerate(rows)]
        (runs.folder / name).write_text("".join(lines))
    data_of = {"joined": "{0}/a.jsonl+{0}/b.jsonl", "named": "{0}/b.jsonl:prompt=prompt"}.get(change, "{0}/b.jsonl")
    how = ["--data", data_of.format(runs.folder), "--max_prompt", "60"]
    assert runs("tabom", "run", *how) == (0, [])
    done = runs.adapter("run")
    shutil.rmtree(runs.folder / "run/adapter")
    assert runs("tabom", "run", *how) == (0, []) and runs.adapter("run") == done
    shutil.rmtree(runs.folder / "run/adapter")
    if change == "weights":
        model = nt_model.load(runs.folder / "base")
        model.norm.weight.data[0] += 1e-3
        nt_model.save(model, runs.folder / "base")
    elif change == "config":
        config = runs.folder / "base/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(rope_theta=777.0)))
    else:
        file = runs.folder / "b.jsonl"
        file.write_text(file.read_text().replace("3 4", "3 5"))
    code, said = runs("tabom", "run", *how)
    what = "weights" if change in ("weights", "config") else "problems"
    assert code == 2 and len(said) == 1 and f"another configuration ({what} " in said[0], said
    assert runs.adapter("run") is None


def test_folders_and_patterns_of_data_that_changed(runs):
    """What is compared are the problems that were read, wherever they stood."""
    assert runs("tabom", "own", "--max_steps", "1") == (0, [])
    parts = runs.folder / "parts"
    parts.mkdir()
    for name in "ab":
        rows = [dict(question=f"{name} {i}?", answer=f"It is {i}.\n#### {i}") for i in range(4)]
        (parts / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(runs.folder / "own/trajectories", runs.folder / "records")
    plain = ["--trajectory_share", "0", "--max_steps", "1"]
    for i, (source, file) in enumerate(((f"gsm8k={parts}/*.jsonl", parts / "b.jsonl"),
                                        (runs.folder / "records", runs.folder / "records/rank0.jsonl"))):
        how = [*plain, "--data", source, *["--gen_len", "8", "--no-only_correct"] * i]
        assert runs("trims", f"run{i}", *how)[0] == 0
        shutil.rmtree(runs.folder / f"run{i}/adapter")
        if i:
            rows = cli.read_jsonl(file, ours=True)
            file.write_text("".join(cli.line_of(row | dict(x0=row["x0"][::-1])) for row in rows))
        else:
            file.write_text(file.read_text().replace("It is 2", "It is two"))
        code, said = runs("trims", f"run{i}", *how)
        assert code == 2 and "another configuration (problems " in said[-1], said


def test_what_only_looks_like_ours_stays(runs):
    """Names beside those of a run; a folder without config.json; checksums of another program; --to of --prompts."""
    assert runs("tabom", "run", "--max_steps", "1") == (0, [])
    mine = ["epoch-notes/x", "nonfinite-ranking.json"]
    for name in mine:
        (runs.folder / "run" / name).parent.mkdir(exist_ok=True)
        (runs.folder / "run" / name).write_text("mine")
    assert runs("tabom", "run", "--max_steps", "1", "--overwrite") == (0, [])
    assert all((runs.folder / "run" / name).read_text() == "mine" for name in mine)
    for name in ("epoch-1/thesis", "log.jsonl", "results.jsonl"):
        (runs.folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (runs.folder / "mine" / name).write_text("mine")
        code, said = runs("tabom", "mine", "--max_steps", "1", "--each_epoch", "--epochs", "1")
        assert code == 2 and "config.json is absent" in said[0] and (runs.folder / "mine" / name).read_text() == "mine"
        shutil.rmtree(runs.folder / "mine")
    (runs.folder / "sums").mkdir()
    (runs.folder / "sums/thesis.tex").write_text("mine")
    (runs.folder / "sums" / cli.SUMS).write_text(f"{cli.sha256(runs.folder / 'sums/thesis.tex')}  thesis.tex\n")
    before = {f: f.read_bytes() for f in runs.folder.rglob("*") if f.is_file()}
    base, adapter = str(runs.folder / "base"), str(runs.folder / "run/adapter")
    shutil.copytree(adapter, runs.folder / "other")
    for to in ("sums", "other"):
        with pytest.raises(UserError, match="is there and not empty: choose another"):
            lora.merge_command(lora.Merge(model=base, adapter=adapter, to=str(runs.folder / to)))
    assert before == {f: f.read_bytes() for f in before}


def test_a_collection_of_a_model_that_changed(runs):
    assert runs("tabom", "one", "--max_steps", "1") == (0, [])
    model = nt_model.load(runs.folder / "base")
    model.norm.weight.data[0] += 1e-3
    nt_model.save(model, runs.folder / "base")
    code, said = runs("tabom", "two", "--trajectories", runs.folder / "one/trajectories")
    assert code == 2 and "trajectories of other settings (weights)" in said[0], said


@pytest.mark.parametrize("file", ["base/vocab.json", "base/generation_config.json", "base/chat_template.jinja",
                                  "first/rank0.jsonl", "second/rank0.jsonl"])
def test_a_run_whose_files_changed_under_their_names(runs, file):
    """A model's tokeniser, and records of --trajectories A+B with right checksums."""
    assert runs("tabom", "own", "--max_steps", "1") == (0, [])
    rows = cli.read_jsonl(runs.folder / "own/trajectories/rank0.jsonl", ours=True)
    for name, part in (("first", rows[:4]), ("second", rows[4:])):
        (runs.folder / name).mkdir()
        (runs.folder / name / "rank0.jsonl").write_text("".join(map(cli.line_of, part)))
    how = "--max_steps", "1", "--trajectories", f"{runs.folder / 'first'}+{runs.folder / 'second'}"
    assert runs("tabom", "run", *how) == (0, [])
    shutil.rmtree(runs.folder / "run/adapter")
    file = runs.folder / file
    if file.suffix == ".jsonl":
        rows = cli.read_jsonl(file, ours=True)
        file.write_text("".join(cli.line_of(row | dict(x0=row["x0"][::-1])) for row in rows))
    else:
        file.write_text(file.read_text() + "\n" if file.exists() else "{}")
    code, said = runs("tabom", "run", *how)
    assert code == 2 and len(said) == 1 and "another configuration (weights " in said[0], said


def test_a_teacher_that_changed_under_its_name(runs):
    """Before the first checkpoint its scores are made again; behind one the run belongs to another teacher."""
    teacher = runs.folder / "teacher"
    shutil.copytree(ROOT / "weights/tiny-ar", teacher)

    def scores():
        rows = cli.read_jsonl(runs.folder / "run/difficulty/rank0.jsonl", ours=True)
        return {row["key"]: row["scores"] for row in rows}

    def change():
        weights = load_file(teacher / "model.safetensors")
        save_file({name: t * 1.1 for name, t in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "steps", lambda *_: sys.exit(9))
        assert runs("trims", "run", "--teacher", teacher)[0] == 9
        first = scores()
        change()
        assert runs("trims", "run", "--teacher", teacher)[0] == 9
    both = scores()
    assert len(first) == 8 and len(both) == 16 and not [v for k, v in both.items() if k not in first and v in first.values()]
    assert runs("trims", "run", "--teacher", teacher)[0] == 0 and len(scores()) == 16
    shutil.rmtree(runs.folder / "run/adapter")
    change()
    code, said = runs("trims", "run", "--teacher", teacher)
    assert code == 2 and len(said) == 1 and "another configuration (weights " in said[0], said


@pytest.mark.parametrize("theirs", ["my thesis", '{"id": 1, "text": "', '{"id": "1", "x0": [1]}\nthe end', "[1, 2"])
def test_a_last_line_without_its_end_is_not_lost(tmp_path, theirs):
    """Somebody's file that a command was given by mistake, or a line of ours that a power cut tore."""
    file = tmp_path / "a.jsonl"
    file.write_text(theirs)
    whole = [line for line in theirs.splitlines()[:-1]]
    assert len(cli.read_jsonl(file, ours=True, mend=True)) == len(whole)
    assert file.read_text().splitlines() == whole and (tmp_path / "a.jsonl.damaged").read_text() == theirs.splitlines()[-1] + "\n"
    file.write_text('{"id": "x"}')  # whole but for its end
    assert cli.read_jsonl(file, ours=True, mend=True) == [{"id": "x"}] and file.read_text() == '{"id": "x"}\n'


OWN_LINE = cli.line_of(dict(label="base", values=[1.0, float("nan")]))


@pytest.mark.parametrize("theirs", ['{"base": 3}', "[1]", "null", '{"label": "base", "values": [1.0]}', OWN_LINE.replace("1.0", "2.0"),
                                    OWN_LINE[:-5], cli.line_of(dict(label="base", x0=[1])), cli.line_of(dict(label=1, values=[1])),
                                    cli.line_of(dict(label="base", values="123")), OWN_LINE + '{"label": "TAD", "values": [1]}'])
def test_a_picture_beside_numbers_of_another_program(tmp_path, theirs):
    file = tmp_path / "window.jsonl"
    file.write_text(theirs)
    with pytest.raises(UserError, match="window.jsonl line [12] is not valid JSON or is damaged"):
        nt_eval.report({"TAD": [1.0]}, "x", "y", tmp_path / "window.png")
    assert file.read_text() == theirs
    file.write_text(OWN_LINE)
    nt_eval.report({"TAD": [1.0]}, "x", "y", tmp_path / "window.png")
    assert [row["label"] for row in cli.read_jsonl(file, ours=True)] == ["base", "TAD"]


def test_half_characters_in_ids_and_labels(tmp_path):
    rows = [dict(prompt="a", answer="b", id=name) for name in ("x\ud83d", "\udc00", "ok")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p["id"] for p in data.load_problems(str(tmp_path / "a.jsonl"))] == ["x\ufffd", "\ufffd", "ok"]
    with pytest.raises(SystemExit) as ended:
        cli.run_cli(lambda: (tmp_path / "\ud83d.txt").write_text("\ud83d"))
    assert ended.value.code == 2


def test_records_that_two_folders_share(runs):
    assert runs("tabom", "run", "--max_steps", "1") == (0, [])
    first = runs.folder / "run/trajectories"
    shutil.copytree(first, runs.folder / "other")
    for second in (first, runs.folder / "other"):
        code, said = runs("tabom", f"new-{second.name}", "--trajectories", f"{first}+{second}")
        assert code == 2 and len(said) == 1 and "hold the same problem" in said[0], said
    rows = cli.read_jsonl(runs.folder / "other/rank0.jsonl", ours=True)
    for change in (dict(model="another"), dict(x0=[1] * 4, order=[0] * 4, rank=[0, 1, 2, 3])):  # not the first one
        lines = map(cli.line_of, [*rows[:-1], rows[-1] | change])
        (runs.folder / "other/rank0.jsonl").write_text("".join(lines))
        code, said = runs("tabom", "new", "--trajectories", f"{runs.folder / 'other'}+{first}")
        assert code == 2 and len(said) == 1 and "has none of" in said[0], said


def test_problems_whose_answers_changed_since(tmp_path):
    model, tok = random_model(max_position_embeddings=160, **VOCAB), data.load_tokenizer("tiny")
    problems = data.load_problems("tiny", "train", 2)
    settings = dict(gen_len=8, block_len=4, policy="static", per_step=1)
    assert len(rollout.rollout(model, tok, problems, tmp_path, "x", **settings)) == 2
    for key in ("answer", "solution", "prompt", "grader", "question", "tests", "setup", "entry_point"):
        changed = [problems[0], problems[1] | {key: "something else"}]
        with pytest.raises(UserError, match=f"other settings .{key}."):
            rollout.rollout(model, tok, changed, tmp_path, "x", **settings)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[[1], " * 100_000])
def test_json_that_is_nested_too_deep(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for read in (cli.read_json, cli.read_object, lambda file: nt_model.load(tmp_path)):
        with pytest.raises(UserError, match="config.json is not valid JSON"):
            read(tmp_path / "config.json")


@pytest.mark.parametrize("field", ["source", "question", "grader", "entry_point"])
def test_fields_that_must_be_text(tmp_path, field):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b", field: 5}) + "\n")
    with pytest.raises(UserError, match=f"row 1: {field} must be text"):
        data.load_problems(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("made", [["model/model.safetensors"], ["adapter/x"], ["checkpoints/step-000009/x"]])
def test_a_folder_without_config_json_that_holds_a_model_is_refused(tmp_path, made):
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="config.json is absent or not that of a run"):
            training.Run(tabom.Config(out=str(tmp_path), overwrite=overwrite))
    assert all((tmp_path / name).read_text() == "mine" for name in made)


def test_merge_replaces_nothing(tmp_path, monkeypatch):
    nt_model.save(random_model(max_position_embeddings=160, **VOCAB), tmp_path / "base")
    nt_model.copy_tokenizer("tiny", tmp_path / "base")
    lora.save(lora.add(nt_model.load(tmp_path / "base"), 4, 4), tmp_path / "adapter")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for to in ("base", "adapter", "", ".", "base/config.json"):
        with pytest.raises(UserError, match="choose another, or remove it|lies in what this command would replace"):
            lora.merge_command(lora.Merge(model="base", adapter="adapter", to=to))
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    (tmp_path / "linked").mkdir()
    for name in ("linked", "nowhere"):
        (tmp_path / f"to-{name}").symlink_to(name)
    for to in ("new", "empty", "deep/er", "to-linked", "to-nowhere"):
        lora.merge_command(lora.Merge(model="base", adapter="adapter", to=to))
        sums = dict(line.split("  ")[::-1] for line in (tmp_path / to / cli.SUMS).read_text().splitlines())
        assert sums == {f.name: cli.sha256(f) for f in (tmp_path / to).iterdir() if f.name != cli.SUMS}
        assert nt_model.load(tmp_path / to) and json.loads((tmp_path / to / "config.json").read_text())
    assert not list(tmp_path.glob("*.unfinished*"))


def test_lines_of_before_behind_sealed_ones_are_kept_beside(tmp_path, capsys):
    """`cat old.jsonl >> new.jsonl`: they may be damaged, so they are made again; nothing of them is lost."""
    file, old = tmp_path / "rank0.jsonl", '{"id": "old", "x0": [1]}\n{"id": "older"}\n'
    cli.append_line(file, *ROWS)
    file.write_text(file.read_text() + old)
    assert cli.read_jsonl(file, ours=True, mend=True) == ROWS == cli.read_jsonl(file, ours=True)
    assert (tmp_path / "rank0.jsonl.damaged").read_text() == old
    assert capsys.readouterr().err.count(f"kept in {file}.damaged") == 2


def test_a_line_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    """The first bytes of it do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            cli.append_line(tmp_path / "rank0.jsonl", *ROWS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cli.read_jsonl(tmp_path / "rank0.jsonl", ours=True, mend=True) in ([], ROWS[:1])


POINT = dict(label="base", rule="threshold 0.9", ids=["a", "b"], correct=[1, 0], tokens=[5, 6], nfe=[4, 4], seconds=1.0)
GOOD = cli.line_of(POINT)
BARE = GOOD[:GOOD.index(', "crc"')] + "}\n"


@pytest.mark.parametrize("text", ["", BARE, BARE + GOOD, GOOD + BARE, GOOD[:-20], GOOD.replace("[1, 0]", "[1, 1]"), "null\n", "[]\n",
                                  GOOD.replace('"crc": "', '"crc": 1, "x": "'), GOOD + "{}\n", GOOD[1:]])
def test_results_that_compare_cannot_read(tmp_path, text):
    """Only lines that a command here wrote, each with its checksum; also in a packed file."""
    for file, content in (("results.jsonl", text.encode()), ("runs.jsonl.gz", gzip.compress(text.encode()))):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError) as refused:
            compare.read_runs([tmp_path / file])
        assert "\n" not in str(refused.value) and str(tmp_path / file) in str(refused.value)
    (tmp_path / "results.jsonl").write_text(GOOD)
    assert list(compare.read_runs([tmp_path])) == ["base"]
