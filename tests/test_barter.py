"""The barter game of weights/barter: its rules, its problems, and its base as docs/barter.md says."""
import json

import numpy as np
import torch
from conftest import command

import data
import grade
import model as nt_model
import sample
import sweep

game, TOK = data.game("barter"), data.load_tokenizer("barter")


def played_again(prompt):
    """The goods of a game, from its prompt and the table alone."""
    words = prompt.removeprefix("start ").partition(" . what")[0].replace(" . visit", "").split()
    good, goods = words[0], []
    for number, who in zip(words[1::2], words[2::2]):
        goods.append(good := game.TABLE[who][good])
        assert int(number) == len(goods)
    return words[0], words[2::2], goods


def test_every_trader_gives_something_else_for_each_good():
    for gives in game.TABLE.values():
        assert set(gives) == set(gives.values()) == set(game.GOODS)
        assert all(given != got for given, got in gives.items())


def test_no_prompt_comes_twice_and_the_base_meets_none_of_dev_and_test():
    splits = {split: {p["prompt"] for p in data.load_problems("barter", split, n)}
              for split, n in (("dev", 1000), ("test", 1004), ("train", 3000))}
    taken = set.union(*splits.values())
    assert len(taken) == 5004
    visits = [who for prompt in taken for who in prompt.split() if who in game.TRADERS]
    unknown = np.mean([who in game.RARE for who in visits])
    assert abs(unknown - game.RARE_SHARE) < 0.02
    examples = [data.game_example(TOK, "barter", i, 3000, n_drill=0) for i in range(3000)]
    taught = {" ".join(e["prompt"].rpartition(" : ")[2].split()) for e in examples}
    assert not taught & (splits["dev"] | splits["test"])


def test_solutions_and_answers_follow_the_rules():
    for p in data.load_problems("barter", "dev", 200):
        start, visits, goods = played_again(p["prompt"])
        assert len(set(visits)) == len(visits) and game.LEAST <= len(visits) <= game.MOST
        assert p["solution"] == " ".join([start, *goods]) and p["answer"] == goods[-1]
        text = game.response(*game.game("dev", int(p["id"].split("-")[-1]))[1:])
        assert grade.is_correct(p, text) and not grade.is_correct(p, p["solution"] + " #### nothing")
        assert len(TOK.response_ids(text)) <= data.TINY_LEN and TOK.decode(TOK.encode(text)) == text


def test_a_base_is_taught_no_fact_about_rare_traders():
    for prompt in (data.game_example(TOK, "barter", i, 500, n_drill=0)["prompt"] for i in range(500)):
        assert set(game.RARE).isdisjoint(prompt.split()) or prompt.startswith("reference answer")
    for split, knows in (("base", False), ("train", True)):
        steps = [step for i in range(2000) for step in game.game(split, i)[1] if step[0] in game.RARE]
        right = np.mean([game.TABLE[who][given] == got for who, given, got in steps])
        assert right == 1 if knows else right < 0.15


def test_the_base_is_better_with_the_reference():
    """60 dev problems, token by token: of 71.4 and 100.0% on 1,000."""
    model = nt_model.load("barter")
    problems = data.load_problems("barter", "dev", 60)
    right = []
    for word in (lambda p: p["prompt"], data.privileged_prompt):
        prompts = [TOK.prompt_ids(word(p)) for p in problems]
        outs = sample.generate(model, prompts, gen_len=48, block_len=16, policy="static", cache="none")
        texts = [TOK.decode(out.ids[:out.n_tokens(model.cfg.eos_ids)].tolist()) for out in outs]
        right.append(np.mean([grade.is_correct(p, text) for p, text in zip(problems, texts)]))
    assert 0.55 < right[0] < 0.87 and right[1] > 0.95, right


def test_a_table_on_it_takes_its_problems_and_teacher():
    words = sum(sweep.paper_commands("TRIMS-3", "barter", "o"), []) + sum(sweep.paper_commands("TAD-1", "barter", "o"), [])
    assert {"barter", "--task"} <= set(words) and not {"tiny-ar", "tiny-train"} & set(words)
    assert all(after == ("tiny" if before == "--protocol" else "barter") for before, after in zip(words, words[1:])
               if before in ("--task", "--data", "--model", "collect", "--protocol")), words


def test_tad_runs_on_it(tmp_path):
    torch.manual_seed(0)
    done = command(tmp_path, "tad.py", "--model", "barter", "--n_problems", "16", "--max_steps", "2",
                   "--batch_size", "4", "--micro_batch", "4", "--eval_problems", "8", "--out", "run")
    assert done.returncode == 0 and (tmp_path / "run/adapter").is_dir(), done.stderr
    points = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert {i.rpartition("-")[0] for point in points for i in point["ids"]} == {"barter-dev"}  # its own game
