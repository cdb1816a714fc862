"""The lm_eval bridge: real task definitions on local files, a scripted model, scores computed by hand."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from checkpoints import official_checkpoint
from conftest import ROOT

import compare
import data
import eval as nt_eval
import harness
import model as nt_model
from cli import UserError, read_jsonl

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm_eval[math,ifeval]'")
TASKS = Path(lm_eval.__file__).parent / "tasks"
SHOTS = [("Ann has 2 pens and buys 3. How many?", "2 + 3 = 5\n#### 5"),
         ("Bob had 9 and lost 4. How many?", "9 - 4 = 5\n#### 5")]
GSM8K = [  # question, target, reply, right by strict-match, by flexible-extract
    ("What is 6 times 7?", "42\n#### 42", " It is\n#### 42\n\nQuestion: What is 1?\nAnswer: #### 1", 1, 1),
    ("What is 1000 plus 234?", "#### 1,234", " The sum is $1,234.", 0, 1),  # only the last number
    ("What is 10 minus 3?", "#### 7", " 10 - 3 = 8\n#### 8", 0, 0)]
MATH = [  # problem, solution, reply, right by minerva's exact match, by math-verify
    ("Compute $1/2 + 1/4$.", "$\\boxed{\\frac{3}{4}}$",
     " $\\boxed{\\frac{3}{4}}$\nFinal Answer: The final answer is $\\frac{3}{4}$. I hope it is correct."
     "\n\nProblem:\nFinal Answer: The final answer is $1$. I hope it is correct.", 1, 1),
    ("Compute $2^5$.", "$\\boxed{32}$", " So it is $\\boxed{32}$.", 0, 1)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The installed gsm8k and minerva_math500 over local files; a random LLaDA in the official format."""
    root = tmp_path_factory.mktemp("lm_eval")
    files = dict(
        train=write_jsonl(root / "train.jsonl", [dict(question=q, answer=a) for q, a in SHOTS]),
        test=write_jsonl(root / "test.jsonl", [dict(question=q, answer=a) for q, a, *_ in GSM8K]))
    math = dict(test=write_jsonl(root / "math.jsonl",
                                 [dict(problem=p, solution=s, answer="") for p, s, *_ in MATH]))
    for name, yaml, data_files in (("gsm8k", "gsm8k/gsm8k.yaml", files),
                                   ("gsm8k_boxed", ROOT / "assets/gsm8k_boxed.yaml", files),
                                   ("minerva_math500", "minerva_math/minerva_math500.yaml", math)):
        kwargs = json.dumps(dict(data_files=data_files, cache_dir=str(root / "cache")))
        (root / f"{name}.yaml").write_text(f"include: {TASKS / yaml}\ntask: {name}\ndataset_path: json\n"
                                           f"dataset_name: null\ndataset_kwargs: {kwargs}\n")
    (root / "llada").mkdir()
    official_checkpoint(root / "llada", "llada", max_sequence_length=4096)
    return root


def scripted(replies, seen):
    """decode_rows of a model that answers by the last question it reads, and finishes in reverse order."""
    def decode_rows(model, tok, prompts, settings, batch_size, streams=None, progress=False):
        for i in reversed(range(len(prompts))):
            text = tok.decode(prompts[i].tolist())
            seen.append(text)
            reply = replies[max(replies, key=text.rfind)]
            yield i, dict(response=reply, tokens=10, nfe=4, seconds=0.5, forwards=4)
    return decode_rows


def evaluate(monkeypatch, model, tok, tasks, items, **options):
    seen = []
    monkeypatch.setattr(nt_eval, "decode_rows", scripted({q: reply for q, _, reply, *_ in items}, seen))
    bridge = harness.bridge(model, tok, dict(gen_len=16), batch_size=2)
    manager = harness.load_tasks(tasks, None, False)
    results = lm_eval.simple_evaluate(model=bridge, tasks=tasks, task_manager=manager, bootstrap_iters=0,
                                      **options)
    return results, seen, bridge


def test_gsm8k_few_shots_stops_and_scores(here, monkeypatch):
    model, tok = nt_model.load(here / "llada"), data.load_tokenizer(here / "llada")
    results, seen, bridge = evaluate(monkeypatch, model, tok, [str(here / "gsm8k.yaml")], GSM8K,
                                     num_fewshot=2)
    scores = results["results"]["gsm8k"]
    assert scores["exact_match,strict-match"] == pytest.approx(1 / 3)
    assert scores["exact_match,flexible-extract"] == pytest.approx(2 / 3)
    rows = [r for r in results["samples"]["gsm8k"] if r["filter"] == "strict-match"]
    uncut = [reply for _, _, reply, *_ in GSM8K]
    assert [r["resps"][0][0] for r in rows] == [" It is\n#### 42\n\n", *uncut[1:]]
    # plain text: both few-shots (in the order that lm_eval's seed drew), then the question; nothing around it
    shots = ["Question: {}\nAnswer: {}\n\n".format(*shot) for shot in SHOTS]
    for (question, *_), text in zip(GSM8K, reversed(seen)):
        assert text in [a + b + f"Question: {question}\nAnswer:" for a, b in (shots, shots[::-1])]
    assert len(bridge.decoded) == 3 and nt_eval.wall_seconds(bridge.decoded.values()) == 1.5


def test_gsm8k_boxed_asks_as_tads_scripts_do(here, monkeypatch):
    """No examples, the instruction behind the question; the last number of a reply counts."""
    model, tok = nt_model.load(here / "llada"), data.load_tokenizer(here / "llada")
    replies = ["So \\boxed{42}.", "It is 7, no: $1,234.50", "\\boxed{-3} of 10", "none", "42.0"]
    answers = ["x\n#### 42", "x\n#### 1,234.50", "x\n#### -3", "x\n#### 4", "x\n#### 42"]
    cases = [(f"How many of {i}?", answer, reply) for i, (answer, reply) in enumerate(zip(answers, replies))]
    write_jsonl(here / "boxed.jsonl", [dict(question=q, answer=a) for q, a, _ in cases])
    (here / "boxed.yaml").write_text((here / "gsm8k_boxed.yaml").read_text().replace("test.jsonl", "boxed.jsonl"))
    results, seen, _ = evaluate(monkeypatch, model, tok, [str(here / "boxed.yaml")], cases)
    rows = sorted(results["samples"]["gsm8k_boxed"], key=lambda row: row["doc_id"])
    assert [row["exact_match"] for row in rows] == [1, 1, 0, 0, 0]
    asked = "Question: How many of {}? Please reason step by step, and put your final answer within \\boxed{{}}."
    assert sorted(seen) == [asked.format(i) for i in range(5)]
    manager = harness.load_tasks([str(here / "gsm8k.yaml")], None, False)
    assert "gsm8k_boxed" in manager.all_tasks  # by its name, from any folder


def test_chats_are_the_templates_own(here, monkeypatch):
    model, tok = nt_model.load(here / "llada"), data.load_tokenizer(here / "llada")
    for multiturn in (False, True):
        _, seen, _ = evaluate(monkeypatch, model, tok, [str(here / "gsm8k.yaml")], GSM8K, num_fewshot=1,
                              apply_chat_template=True, fewshot_as_multiturn=multiturn)
        turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
        question = f"Question: {GSM8K[0][0]}\nAnswer:"
        want = []
        for q, a in SHOTS:
            said = [("user", f"Question: {q}\nAnswer:"), ("assistant", a), ("user", question)]
            said = said if multiturn else [("user", f"Question: {q}\nAnswer: {a}\n\n{question}")]
            want.append("<|startoftext|>" + "".join(turn(*x) for x in said)
                        + "<|start_header_id|>assistant<|end_header_id|>\n\n")
        assert seen[-1] in want


def test_minerva_math500_and_its_two_graders(here, monkeypatch):
    from importlib import metadata
    if not metadata.version("antlr4-python3-runtime").startswith("4.11"):
        pytest.skip("lm_eval's MATH tasks need antlr4-python3-runtime 4.11 (pip install 'lm_eval[math]')")
    model, tok = nt_model.load(here / "llada"), data.load_tokenizer(here / "llada")
    results, seen, _ = evaluate(monkeypatch, model, tok, [str(here / "minerva_math500.yaml")], MATH)
    scores = results["results"]["minerva_math500"]
    assert scores["exact_match,none"] == 0.5 and scores["math_verify,none"] == 1.0
    assert results["n-shot"]["minerva_math500"] == 4 and seen[0].count("Problem:") == 5


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_only_the_template_makes_special_tokens(tmp_path, family):
    model = nt_model.load(official_checkpoint(tmp_path, family))
    tok = data.load_tokenizer(tmp_path)
    bridge = harness.bridge(model, tok, {})
    end = tok.decode([tok.chat.end_id])
    for text in ("What is 2 + 2?", f" say {end} twice", "two\n\nlines"):
        chat = bridge.apply_chat_template([dict(role="user", content=text)])
        assert bridge.prompt_ids(chat).tolist() == tok.prompt_ids(text).tolist()
        assert isinstance(chat, str) and chat.count(end) == 1 + text.count(end) + (family == "dream")
    said = [dict(role="system", content="Be brief."), dict(role="user", content="2 + 2?")]
    asked = bridge.prompt_ids(bridge.apply_chat_template(said))
    assert asked.tolist() == tok.prompt_ids("2 + 2?", "Be brief.").tolist()
    begun = bridge.apply_chat_template([*said, dict(role="assistant", content="It is")],
                                       add_generation_prompt=False)
    assert bridge.prompt_ids(begun).tolist() == asked.tolist() + tok.encode("It is")
    with pytest.raises(UserError, match="changed its rendered chat"):
        bridge.prompt_ids(begun + "!")
    for ask in (bridge.loglikelihood, bridge.loglikelihood_rolling):
        with pytest.raises(UserError, match="log-likelihoods"):
            ask([])


def test_the_tiny_model_has_no_chat_template():
    bridge = harness.bridge(nt_model.load("tiny"), data.load_tokenizer("tiny"), {})
    tok = data.load_tokenizer("tiny")  # a task's text becomes the prompt that it was trained on
    assert torch.equal(bridge.prompt_ids("ball under pink"), tok.prompt_ids("ball under pink"))
    with pytest.raises(UserError, match="no chat template: leave --apply_chat_template out"):
        bridge.apply_chat_template([dict(role="user", content="a")])


@pytest.mark.parametrize("until, said", [(["c", "b"], "a "), (["", "x"], "a b c"), ("b", "a "), (None, "a b c"), ([], "a b c")])
def test_a_reply_ends_before_its_first_stop_string(monkeypatch, until, said):
    monkeypatch.setattr(nt_eval, "decode_rows", scripted({"q": "a b c"}, []))
    bridge = harness.bridge(nt_model.load("tiny"), data.load_tokenizer("tiny"), {})
    assert bridge.generate_until([SimpleNamespace(args=("q", {"until": until}))]) == [said]


def command(here, out, *more):
    return ["tools/harness.py", "--model", str(here / "llada"), "--tasks", str(here / "gsm8k.yaml"),
            "--num_fewshot", "1", "--apply_chat_template", "--thresholds", "0.05", "--gen_len", "12",
            "--block_len", "12", "--out", str(out), *more]


def test_batch_ranks_and_a_second_run_agree(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(here, tmp_path / "one", "--batch_size", "1"))
    harness.main()
    assert "gsm8k" in capsys.readouterr().out
    script, *argv = command(here, tmp_path / "two", "--batch_size", "2")
    done = ranks.launch(2, ROOT / script, *argv, log=tmp_path / "log")
    assert done == [0, 0], (tmp_path / "log").read_text()[-3000:]
    shards = [read_jsonl(p) for p in sorted((tmp_path / "two").glob("responses.rank*.jsonl"))]
    assert [len(s) for s in shards] == [2, 1]  # three documents over two ranks, each decoded once

    def result(name):
        rows = read_jsonl(tmp_path / name / "samples-gsm8k.jsonl")
        keep = ("doc_id", "filter", "filtered_resps", "exact_match", "arguments")
        whole = json.loads((tmp_path / name / "lm_eval.json").read_text())
        (point,) = read_jsonl(tmp_path / name / "results.jsonl", ours=True)
        assert point["ids"] == ["gsm8k-0", "gsm8k-1", "gsm8k-2"] and point["provenance"]["task"] == "gsm8k"
        assert point["correct"] == [row["exact_match"] for row in rows if row["filter"] == "strict-match"]
        counts = [point[key] for key in ("correct", "tokens", "nfe")]
        return [[row[k] for k in keep] for row in rows], counts, whole["results"], whole["provenance"]["lm_eval"]
    assert result("one") == result("two") and len(result("one")[0]) == 6
    before = result("one")

    def decode_rows(model, tok, prompts, *args, **kw):
        assert not prompts, "decoded twice"
        return iter(())
    monkeypatch.setattr(nt_eval, "decode_rows", decode_rows)
    harness.main()
    assert result("one") == before
    monkeypatch.setattr(sys, "argv", command(here, tmp_path / "one", "--batch_size", "1", "--seed", "1"))
    with pytest.raises(UserError, match="another run .decoding differ."):
        harness.main()


def test_an_aup_of_points_that_lm_eval_graded(here, tmp_path, monkeypatch, capsys):
    """Two tasks at two points of two models; the table has the average of the tasks, each with its own y_max."""
    replies = {q: reply for q, _, reply, *_ in [*GSM8K, *MATH]}
    tasks = f"{here}/gsm8k.yaml,{here}/minerva_math500.yaml"
    for label, nfe in (("base", (8, 10)), ("fast", (2, 10))):
        for point, forwards in zip((0, 5), nfe):
            def decode_rows(model, tok, prompts, *_, **__):
                for i, row in scripted(replies, [])(model, tok, prompts, {}, 1):
                    yield i, row | dict(nfe=forwards)
            monkeypatch.setattr(nt_eval, "decode_rows", decode_rows)
            monkeypatch.setattr(sys, "argv", [
                "tools/harness.py", "--model", str(here / "llada"), "--tasks", tasks, "--num_fewshot", "1", "--protocol",
                "tad", "--points", str(point), "--label", label, "--metric", "exact_match", "--out", str(tmp_path / label / str(point))])
            harness.main()
    assert "minerva_math500: TPF 1, TPF 1.00" in capsys.readouterr().out
    runs = compare.read_runs([tmp_path / "base", tmp_path / "fast"])
    assert {label: [[p["rule"] for p in points] for points in of_label] for label, of_label in runs.items()} == {
        label: [["multiblock 0.5", "TPF 1"]] * 2 for label in ("base", "fast")}
    rows = [line.strip("| ").split(" | ") for line in compare.compare(runs, "none", 3).split("\n## ")[0].splitlines() if "| " in line]
    areas = [float(row[rows[0].index("AUP")].split()[0]) for row in rows[1:]]
    gsm, math = (100 / 3, 100 / 3), (50, 50)  # right by strict-match, by minerva's exact match
    want = [np.mean([nt_eval.area_of([(1, one), (tpf, other)], other) for one, other in (gsm, math)]) for tpf in (1.25, 5)]
    assert areas == pytest.approx(want, abs=0.06)
    with pytest.raises(UserError, match="--metric bleu: gsm8k has "):
        monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--metric", "bleu", "--out", str(tmp_path / "x")])
        harness.main()


def test_the_subtasks_of_a_group_are_one_task(here, tmp_path, monkeypatch):
    """As minerva_math's seven: weighed by their sizes, under the group's name, once beside gsm8k."""
    base = (here / "minerva_math500.yaml").read_text()
    write_jsonl(here / "half.jsonl", [dict(problem=p, solution=s, answer="") for p, s, *_ in MATH[:1]])
    for name, file in (("leaf_one", "half.jsonl"), ("leaf_two", "math.jsonl")):
        (here / f"{name}.yaml").write_text(base.replace("task: minerva_math500", f"task: {name}").replace("math.jsonl", file))
    (here / "inner.yaml").write_text("group: inner\ntask: [leaf_two]\n")
    (here / "grouped.yaml").write_text("group: grouped\ntask: [leaf_one, inner]\nmetadata: {version: 1.0}\n")
    replies = {q: reply for q, _, reply, *_ in [*GSM8K, *MATH]}
    monkeypatch.setattr(nt_eval, "decode_rows", scripted(replies, []))
    monkeypatch.setattr(sys, "argv", [
        "tools/harness.py", "--model", str(here / "llada"), "--tasks", f"grouped,{here}/gsm8k.yaml", "--include_path",
        str(here), "--num_fewshot", "1", "--protocol", "tad", "--metric", "exact_match", "--out", str(tmp_path)])
    harness.main()
    points = {row["key"]: row for row in read_jsonl(tmp_path / "results.jsonl", ours=True)}
    assert points.keys() == {"grouped", "gsm8k"} and points["gsm8k"]["correct"] == [1, 0, 0]
    assert points["grouped"]["ids"] == ["leaf_one-0", "leaf_two-0", "leaf_two-1"]
    assert points["grouped"]["correct"] == [1, 1, 0] and points["grouped"]["tokens"] == [10] * 3
    assert [row["provenance"]["task"] for row in points.values()] == list(points)
    assert {name.name for name in tmp_path.glob("samples-*")} == {f"samples-{leaf}.jsonl" for leaf in (
        "leaf_one", "leaf_two", "gsm8k")}


def test_tasks_that_run_code_ask_for_it_at_import(here, tmp_path, monkeypatch):
    """As mbpp and humaneval, whose code_eval refuses without HF_ALLOW_CODE_EVAL; before a model is loaded."""
    (tmp_path / "utils.py").write_text("import os\nif os.environ.get('HF_ALLOW_CODE_EVAL') != '1':\n"
                                       "    raise ValueError('#####\\nset HF_ALLOW_CODE_EVAL=\"1\"')\ndef text(doc):\n    return 'q'\n")
    (tmp_path / "code.yaml").write_text((here / "gsm8k.yaml").read_text().replace("task: gsm8k", "task: code")
                                        + "doc_to_text: !function utils.text\nunsafe_code: true\n")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    monkeypatch.setattr(nt_eval, "load_both", lambda args: pytest.fail("loaded a model"))
    monkeypatch.setattr(sys, "argv", ["tools/harness.py", "--model", str(here / "llada"), "--tasks", str(tmp_path / "code.yaml")])
    with pytest.raises(UserError, match="code.yaml would run code here: .* --allow_code_execution"):
        harness.main()
    assert list(harness.load_tasks([str(tmp_path / "code.yaml")], None, True).load(None)["tasks"]) == ["code"]


def test_one_point_and_one_protocol_at_a_time(here, monkeypatch):
    for more, match in ((["--thresholds", "0.1", "0.2"], "one point at a time"),
                        (["--protocol", "tabom"], "differs between these tasks")):
        monkeypatch.setattr(sys, "argv", ["tools/harness.py", "--model", str(here / "llada"), "--tasks",
                                          "gsm8k,mbpp", *more])
        with pytest.raises(UserError, match=match):
            harness.main()


def test_tasks_that_cannot_be_run_are_one_line(here, tmp_path):
    with pytest.raises(UserError, match="cannot load gsm9k.yaml.*'gsm9k.yaml' is not .*lm_eval ls tasks"):
        harness.load_tasks(["gsm9k.yaml", str(here / "gsm8k.yaml")], str(tmp_path), False)
    lines = (here / "gsm8k.yaml").read_text()
    (tmp_path / "choices.yaml").write_text(lines + "output_type: multiple_choice\ndoc_to_choice: [a, b]\n")
    with pytest.raises(UserError, match="asks for multiple_choice"):
        harness.load_tasks([str(tmp_path / "choices.yaml")], None, False)
    (tmp_path / "code.yaml").write_text(lines + "unsafe_code: true\n")
    with pytest.raises(UserError, match="--task humaneval"):
        harness.load_tasks([str(tmp_path / "code.yaml")], None, False)
    (tmp_path / "gone.yaml").write_text("task: gone\ndataset_path: json\noutput_type: generate_until\n"
                                        "test_split: test\ndoc_to_text: q\ndoc_to_target: a\n"
                                        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/no.jsonl}}}}\n")
    with pytest.raises(UserError, match="cannot load .*FileNotFound"):
        harness.load_tasks([str(tmp_path / "gone.yaml")], None, False)


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch, here):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match=r"pip install 'lm_eval\[math,ifeval\]'"):
        harness.bridge(nt_model.load(here / "llada"), data.load_tokenizer(here / "llada"), {})
