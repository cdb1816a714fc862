import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from conftest import random_model

import cli
import data
import grade
import rollout as collection
from model import UserError
from sample import Output

TOK, game = data.load_tokenizer("tiny"), data.game("tiny")


# ---------------------------------------------------------------------------------------------- the tiny task
def test_every_solution_follows_the_rules():
    """Play each game independently of the generator: every step names its swap and the right cup."""
    for p in data.load_problems("tiny", "dev", 200):
        words = p["prompt"].split()
        ball, visited = words[2], []
        swaps = [(words[i + 1], words[i + 2]) for i, w in enumerate(words) if w == "swap"]
        steps = p["solution"].split(" #### ")[0].removesuffix(" .").split(" . ")
        assert len(steps) == len(swaps) == game.N_SWAPS
        for step, (x, y) in zip(steps, swaps):
            ball = y if ball == x else x if ball == y else ball
            visited.append(ball)
            cups = [w for w in step.split() if w in game.CUPS]
            assert step in [phrase.format(r=ball).removesuffix(" .") for phrase in game.PHRASES]
            assert cups == [ball]
        assert p["answer"] == " ".join(visited) and grade.is_correct(p, p["solution"])
        assert len(TOK.encode(p["solution"])) <= data.TINY_LEN


def test_splits_are_disjoint_and_deterministic():
    splits = {s: data.load_problems("tiny", s, 500) for s in data.AVOIDED}
    prompts = {s: {p["prompt"] for p in ps} for s, ps in splits.items()}
    assert all(len(prompts[s]) == 500 for s in splits)
    assert not prompts["train"] & prompts["dev"] and not prompts["train"] & prompts["test"]
    assert not prompts["dev"] & prompts["test"]
    assert data.load_problems("tiny", "test", 500) == splits["test"]


def test_training_examples_avoid_held_out_prompts(monkeypatch):
    data.avoided.cache_clear()  # another test may have kept it small
    for name in ("tiny", "barter"):
        def drawn():
            example = data.game_example(data.load_tokenizer(name), name, 20, 50, n_drill=5)
            return example["prompt"].rpartition(" : ")[2], example["id"]  # the solution may stand before it
        prompts = [data.game(name).example(index, 5)[0] for index in (20, 70, 120)]
        dev, test = ({p["prompt"] for p in data.load_problems(name, split, 1000)} for split in ("dev", "test"))
        assert dev | test <= data.avoided(name, "train") and dev <= data.avoided(name, "test")
        assert drawn() == (prompts[0], 20)
        with monkeypatch.context() as m:
            m.setattr(data, "avoided", lambda *_: set(prompts[:2]))  # the one that takes its place as well
            assert drawn() == (prompts[2], 120)


def test_drills_hide_results_and_the_answer_that_repeats_them():
    seen = set()
    for i in range(40):
        example = data.game_example(TOK, "tiny", i, 40, n_drill=40)
        results = game.game("train", i)[1]
        words = [TOK.decode([t]) for t in example["x0"]]
        hidden = [at for at, m in enumerate(example["masked"]) if m]
        answer = range(game.STEP * game.N_SWAPS + 1, (game.STEP + 1) * game.N_SWAPS + 1)
        assert [words[at] for at in answer] == results and set(answer) <= set(hidden)
        in_steps = [at for at in hidden if at not in answer]
        assert [words[at] for at in in_steps] == [results[at // game.STEP] for at in in_steps]
        seen.update(at // game.STEP for at in in_steps)
    assert seen == set(range(game.N_SWAPS))


def test_privileged_share():
    long = sum(len(data.game_example(TOK, "tiny", i, 400)["prompt_ids"]) > 60 for i in range(400))
    assert 35 <= long <= 90


# ------------------------------------------------------------------------------------------------- tokeniser
def test_tokenizer_round_trip_and_special_look_alikes():
    text = data.load_problems("tiny", "dev", 1)[0]["prompt"]
    ids = TOK.encode(text)
    assert TOK.decode(ids) == text and len(ids) == len(text.split())  # one token per word
    for odd in ("<mask> <eos>", "héllo wörld 你好 🙂", "ann  bob\ttabs\nlines", "1234"):
        ids = TOK.encode(odd)
        assert TOK.decode(ids) == odd and max(ids) < TOK.eos_id - 2  # bytes, never a special id
    prompt = TOK.prompt_ids("ann")
    assert prompt.dtype == torch.int64 and prompt.tolist() == [294, *TOK.encode("ann"), 295]


# ---------------------------------------------------------------------------------------- states and records
def test_order_rebuilds_every_state():
    """A canvas decoded step by step, and the same canvases rebuilt from order alone."""
    x0, order = torch.tensor([5, 6, 7, 8]), torch.tensor([1, 0, 2, 0])
    M = 9
    states = [[M, M, M, M], [M, 6, M, 8], [5, 6, M, 8], [5, 6, 7, 8]]
    for t, want in enumerate(states):
        xt, masked = data.state_at(x0, order, t, M)
        assert xt.tolist() == want and masked.tolist() == [w == M for w in want]


def test_responses_are_aligned():
    inputs, cols = data.response_inputs(SimpleNamespace(pad_id=0, block_len=0), [[1, 2, 3], [4]],
                                        torch.tensor([[7, 8], [9, 9]]))
    ids, valid = inputs["ids"], inputs["valid"]
    assert cols.tolist() == [[3, 4]] * 2
    assert ids.tolist() == [[1, 2, 3, 7, 8], [0, 0, 4, 9, 9]]
    assert valid.tolist() == [[True] * 5, [False, False, True, True, True]]


def test_consecutive_tail_by_hand():
    # content 2 tokens, EOS at 2, two filled positions; 3 forwards
    out = Output(torch.tensor([1, 2, 38, 38, 38]), torch.tensor([0, 2, 1, 2, 2]),
                 torch.tensor([0, 2, 1, 3, 4]), torch.ones(5), 3)
    order, rank = collection.consecutive_tail(out, 2)
    assert order.tolist() == [0, 2, 1, 3, 4] and rank.tolist() == [0, 2, 1, 3, 4]


VOCAB = dict(vocab_size=298, mask_token_id=297, eos_token_id=296, pad_token_id=296)


def rollout(folder, n=6, model=None, **kw):
    problems = data.load_problems("tiny", "train", n)
    settings = dict(gen_len=8, block_len=4, policy="static", per_step=2, cache="none", batch_size=4)
    model = model or random_model(**VOCAB)
    return collection.rollout(model, TOK, problems, folder, "random", **{**settings, **kw})


@pytest.mark.parametrize("change", [
    dict(nfe=0), dict(nfe=-1), dict(x0=[], order=[], rank=[]), dict(order=[0]), dict(rank=[0] * 8), dict(x0=[-1] * 8), dict(x0=[True] * 8)])
def test_a_record_that_no_decoding_left_is_refused(tmp_path, change):
    (record, *_) = rollout(tmp_path / "a", 1)
    (tmp_path / "b.jsonl").write_text(json.dumps(record | change) + "\n")
    with pytest.raises(data.UserError, match="record 1 is inconsistent"):
        data.read_trajectories(tmp_path / "b.jsonl")


def test_record_round_trip(tmp_path):
    """What rollout writes is what generate returned;
    both prompts are kept; every intermediate state is exact.
    """
    from sample import generate
    model, problems = random_model(**VOCAB), data.load_problems("tiny", "train", 3)
    records = rollout(tmp_path, 3, model, privileged=True)
    assert [set(data.RECORD_FIELDS) <= set(r) for r in records] == [True] * 3
    for r, p in zip(sorted(records, key=lambda r: int(r["id"].split("-")[-1])), problems):
        assert r["prompt_ids"] == TOK.prompt_ids(p["prompt"]).tolist() and r["answer"] == p["answer"]
        assert r["privileged_prompt_ids"] == TOK.prompt_ids(data.privileged_prompt(p)).tolist()
        out = generate(model, [torch.tensor(r["privileged_prompt_ids"])], gen_len=8, block_len=4,
                       policy="static", per_step=2, cache="none", early_stop=False)[0]
        assert (r["x0"], r["order"], r["rank"], r["nfe"]) == (
            out.ids.tolist(), out.order.tolist(), out.rank.tolist(), out.nfe)
    again = rollout(tmp_path, 3, model, privileged=True)
    assert again == records and len((tmp_path / "rank0.jsonl").read_text().splitlines()) == 3


def test_torn_line_is_dropped_and_collected_again(tmp_path):
    whole = rollout(tmp_path / "a", early_stop=True)
    rollout(tmp_path / "b", early_stop=True)
    shard = tmp_path / "b/rank0.jsonl"
    raw = shard.read_bytes()
    for cut in (raw.rfind(b"\n", 0, -1) + 40, raw.find(b"\n") + 1, 10, 0):
        shard.write_bytes(raw[:cut])
        assert rollout(tmp_path / "b", early_stop=True) == whole
        ids = [json.loads(line)["id"] for line in shard.read_text().splitlines()]
        assert len(ids) == len(set(ids)) == 6


def test_ranks_share_the_work(tmp_path, monkeypatch):
    single = rollout(tmp_path / "one")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        rollout(tmp_path / "two")
    shards = [len((tmp_path / f"two/rank{r}.jsonl").read_text().splitlines()) for r in (0, 1)]
    assert shards == [3, 3] and data.read_trajectories(tmp_path / "two") == single
    for rank in (0, 1, 2):  # another world size repeats nothing
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert rollout(tmp_path / "two") == single
    assert not (tmp_path / "two/rank2.jsonl").exists()


def test_other_settings_are_refused(tmp_path):
    rollout(tmp_path)
    with pytest.raises(UserError, match="per_step"):
        rollout(tmp_path, per_step=1)


def test_sigkill_during_collection(tmp_path):
    """Killed at moments of all kinds and rerun,
    the collection ends with the uninterrupted set and repeats nothing.
    """
    whole, folder = rollout(tmp_path / "whole", 40, batch_size=2), tmp_path / "killed"
    code = tmp_path / "collect.py"
    code.write_text(f"import test_data\ntest_data.rollout({str(folder)!r}, 40, batch_size=2)\n")
    rng, kills = np.random.default_rng(0), 0
    for _ in range(4):
        shard = folder / "rank0.jsonl"
        before = shard.stat().st_size if shard.exists() else 0
        [run] = ranks.start(1, code, log=tmp_path / "said")
        deadline = time.time() + 120
        while time.time() < deadline and run.is_alive():
            if shard.exists() and shard.stat().st_size > before:
                time.sleep(rng.random() * 0.02)
                break
            time.sleep(0.001)
        kills += run.is_alive()
        run.kill()
        run.join()
    assert kills >= 2
    assert rollout(folder, 40, batch_size=2) == whole
    ids = [json.loads(line)["id"] for line in (folder / "rank0.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 40


# ------------------------------------------------------------------------------------------------- bad input
def test_malformed_trajectories(tmp_path):
    rollout(tmp_path, 3)
    shard = tmp_path / "rank0.jsonl"
    lines = shard.read_text().splitlines()
    good = json.loads(lines[1])
    del good["crc"]
    bad = [("{not json", "line 2 is not valid JSON"), (cli.line_of({"id": "x"}), "source is absent"),
           (lines[1].replace('"nfe": 4', '"nfe": 5'), "line 2 .* damaged .not as it was written"),
           (cli.line_of({**good, "schema": 99}), "schema 99"), (json.dumps([1]), "not an object")]
    bad += [(cli.line_of({**good, **change}), "inconsistent") for change in (
        dict(rank=[0] * 8), dict(order=[0.5] * 8), dict(x0=[*good["x0"][1:], "7"]), dict(x0=good["x0"][1:]),
        dict(prompt_ids=[-1]), dict(prompt_ids=[[1]]))]
    bad += [(cli.line_of({**good, key: value}), f"{key} is .* of another type") for key, value in (
        ("x0", None), ("decoding", None), ("correct", "no"), ("prompt", 3), ("nfe", "4"))]
    bad.append((json.dumps(good), "not as it was written"))  # not behind a line with a checksum
    for text, words in bad:
        shard.write_text("\n".join([lines[0], text.strip(), lines[2]]) + "\n")
        with pytest.raises(UserError, match=words):
            data.read_trajectories(tmp_path)


def test_local_files(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "ann ?", "answer": "bob", "solution": "#### bob"}\n'
                    '{"prompt": "x", "answer": 3}\n')
    problems = data.load_problems(str(file))
    assert [p["id"] for p in problems] == ["mine-0", "mine-1"] and problems[1]["answer"] == 3
    with pytest.raises(UserError, match="no solution"):
        data.privileged_prompt(problems[1])
    file.write_text('{"prompt": "ann ?"}\n')
    with pytest.raises(UserError, match="problem mine-0: grader final, but no answer"):  # it can be trained on
        grade.check_gradable(data.load_problems(str(file)), False)
    file.write_text("")
    with pytest.raises(UserError, match="empty"):
        data.load_problems(str(file))
    with pytest.raises(UserError, match="no data"):
        data.load_problems("nowhere.jsonl")


@pytest.mark.parametrize("text, answer, right", [
    ("ann hands it to bob . #### bob", "bob", True), ("#### bob", "bob", True), ("#### bob .", "bob", True),
    ("#### ann #### bob", "bob", True), ("bob", "bob", False), ("", "bob", False),
    ("#### bobby", "bob", False), ("#### bob ann", "bob", False),
    ("#### bob ann", "bob ann", True), ("#### 3", 3, True)])
def test_grading(text, answer, right):
    assert grade.is_correct({"answer": answer}, text) is right
