"""World sizes 1, 2 and 4 (gloo) train the same thing: one launch each, all methods in it (in 4 some, without
accumulation). Gradients of adapters are summed in one bucket; --full and --fsdp shard (FSDP2).
"""
import json
import os
import shutil
import signal
import time

import pytest
import ranks
import torch
from conftest import CONFIGS, ROOT, all_weights, random_model

import model as nt_model

COMMON = ["--data", "tiny", "--gen_len", "16", "--eval_problems", "0", "--max_steps", "3", "--lr", "1e-2",
          "--lr_schedule", "constant", "--warmup_steps", "0", "--batch_size", "8", "--save_every", "50",
          "--lora_dropout", "0", "--lora_r", "8", "--lora_alpha", "8"]
N_BLOCKS, STEPS = 2, 3
IN_FOUR = "tad-lora tad-full t3d-fsdp tabom-lora trims-full trims-lora-empty trims-full-empty".split()
MODELS = {"tad": "shift", "t3d": "block", "tabom": "grouped", "trims": "qk_norm"}  # grouped: tied head
VOCAB = dict(vocab_size=300, mask_token_id=297, eos_token_id=296, pad_token_id=296)  # the tiny tokeniser's


def jobs(root):
    """name -> script, options: every method, adapters and all weights; accumulation; ranks without rows."""
    own = ["--n_problems", "24", "--block_len", "8"]
    methods = {"tad": [*own, "--window", "6", "--trajectories", str(root / "privileged")],
               "t3d": [*own, "--trajectories", str(root / "rollouts")],
               "tabom": [*own, "--trajectories", str(root / "own"), "--lora_targets", "all"],
               "trims": ["--n_problems", "24", "--gen_len", "48"]}
    out = {}
    for name, options in methods.items():
        options = [name, *COMMON, "--micro_batch", "8", "--model", str(root / MODELS[name]), *options]
        out[f"{name}-lora"] = [*options, "--no-full"]
        out[f"{name}-full"] = all_weights(options)
        out[f"{name}-fsdp"] = [*options, "--no-full", "--fsdp", "--micro_batch", "1", "--checkpoint_blocks"]
        accumulated = ["--micro_batch", "1", "--batch_size", "6"]
        if name in ("tad", "trims"):
            out[f"{name}-full-accumulated"] = [*all_weights(options), *accumulated, "--checkpoint_blocks"]
        else:
            out[f"{name}-lora-accumulated"] = [*options, "--no-full", *accumulated]
    for kind, of in (("lora", list), ("full", all_weights)):
        out[f"trims-{kind}-empty"] = [*of(out["trims-lora"]), "--trajectory_share", "0"]
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{world: {name: what the driver recorded}}"""
    root = tmp_path_factory.mktemp("worlds")
    for name in MODELS.values():
        nt_model.save(random_model(**{**CONFIGS[name], **VOCAB, "max_position_embeddings": 512}), root / name)
        nt_model.copy_tokenizer("tiny", root / name)
    seen = {}
    for world in (1, 2, 4):
        folder = root / f"world-{world}"
        folder.mkdir()
        chosen = {name: job for name, job in jobs(root).items() if world < 4 or name in IN_FOUR}
        (root / "jobs.json").write_text(json.dumps(chosen))
        for name in chosen if world == 4 else ():  # four teachers need not be loaded once more
            if name.startswith("trims") and "empty" not in name:
                shutil.copytree(root / f"world-2/{name}/difficulty", folder / name / "difficulty")
                shutil.copy(root / f"world-2/{name}/config.json", folder / name)
        ended = ranks.launch(world, ROOT / "tests/distributed_driver.py", root / "jobs.json", folder,
                             log=root / "log")
        assert ended == [0] * world, (root / "log").read_text()[-3000:]
        seen[world] = {name: torch.load(folder / f"{name}.pt") for name in chosen}
    return seen


def collectives(name, world):
    """What a step must have called: one bucket, and FSDP's reductions of every unit in every micro-batch."""
    n_micro = -(-6 // world) if "accumulated" in name else 1
    return {"reduce": 1, **({"scatter": (N_BLOCKS + 1) * n_micro} if "full" in name else {})}


@pytest.mark.parametrize("name", list(jobs(ROOT)))
def test_worlds_agree(runs, name):
    one = runs[1][name]
    moved = (one["end"] - one["start"]).norm()
    assert one["world"] == 1 and not any(one["calls"]) and moved > 0.1
    for world in (2, 4) if name in runs[4] else (2,):
        many, sharded = runs[world][name], "lora" not in name
        assert many["world"] == world and many["sharded"] == sharded and len(many["calls"]) == STEPS
        for calls in many["calls"]:
            kept = {kind: n for kind, n in calls.items() if kind != "gather"}
            assert ("gather" in calls) == sharded and kept == collectives(name, world)
        assert torch.equal(many["start"], one["start"])
        assert (many["grad"] - one["grad"]).norm() <= 1e-5 * one["grad"].norm()
        assert (many["end"] - one["end"]).norm() <= 1e-3 * moved


def test_accumulation_and_sharding_change_nothing(runs):
    for method in MODELS:
        a, b = runs[1][f"{method}-lora"], runs[2][f"{method}-fsdp"]  # in micro-batches of one
        assert (a["grad"] - b["grad"]).norm() <= 1e-5 * a["grad"].norm()
        assert (a["end"] - b["end"]).norm() <= 1e-3 * (a["end"] - a["start"]).norm()


def test_the_guards_see_what_is_broken(runs):
    """The counts and tolerances above, on records as a broken script would leave them."""
    good = runs[2]["trims-full"]
    silent = {**good, "calls": [{}] * STEPS}  # nothing was summed
    twice = {**good, "calls": [{**c, "reduce": 2} for c in good["calls"]]}  # a reduction per tensor
    half = {**good, "grad": good["grad"] / 2}  # averaged over ranks instead of summed
    unsynced = {**good, "end": good["end"] + 2e-3 * (good["end"] - good["start"])}
    for broken in (silent, twice, half, unsynced):
        with pytest.raises(AssertionError):
            test_worlds_agree({**runs, 2: {**runs[2], "trims-full": broken}}, "trims-full")


HANG = """import datetime, os, signal, cli, run, trims
assert run.STEP_TIMEOUT < datetime.timedelta(minutes=5)
run.STEP_TIMEOUT = datetime.timedelta(seconds=8)
if os.environ["AT"] and os.environ["RANK"] == "1":
    owner = run.Run if hasattr(run.Run, os.environ["AT"]) else run
    setattr(owner, os.environ["AT"], lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
cli.run_cli(trims.main)"""


@pytest.mark.parametrize("full, at", [(False, ""), (True, ""), (True, "save_tensors"), (False, "save_checkpoint")])
def test_a_rank_that_hangs_ends_the_training(tmp_path, full, at):
    """The other one says so within the bound of a step, which is short here. at: inside of what it hangs."""
    nt_model.save(random_model(**{**CONFIGS["qk_norm"], **VOCAB, "max_position_embeddings": 512}),
                  tmp_path / "base")
    nt_model.copy_tokenizer("tiny", tmp_path / "base")
    (tmp_path / "hang.py").write_text(HANG)
    options = ["--model", tmp_path / "base", "--out", tmp_path / "run", "--n_problems", "64",
               "--trajectory_share", "0", "--batch_size", "4", "--epochs", "10000", "--log_every", "1",
               "--eval_problems", "0", "--full" if full else "--no-full", "--save_every", "3" if at else "100"]
    pair = ranks.start(2, tmp_path / "hang.py", *options, log=tmp_path / "said", AT=at)
    try:
        log, end = tmp_path / "run/log.jsonl", time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < 3:
            assert time.monotonic() < end and all(rank.is_alive() for rank in pair)
            time.sleep(0.1)
        if not at:
            os.kill(pair[1].pid, signal.SIGSTOP)
        pair[0].join(100)
        said = (tmp_path / "said").read_text()
        assert pair[0].exitcode in (1, 2), said
        assert "another rank has ended or did not answer" in said or "the files of other ranks are not in" in said, said
        assert "Traceback" not in said
    finally:
        for rank in pair:
            rank.kill()
