"""Collection: decode every problem, grade, append a record each; and a look at what was collected.
    python rollout.py collect gsm8k --model llada --out out/gsm8k --privileged  # the same command continues
    python rollout.py inspect out/tad-tiny/trajectories -n 2  # in the order it was decoded; stats: numbers"""
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cli  # first
import numpy as np
import torch

import grade
from cli import UserError, option, run_cli
from data import (CARRIED, SCHEMA, fitting, load_problems, load_tokenizer, privileged_ids, privileged_prompt,
                  read_trajectories, spread)
from model import ModelOptions, config_of, decoding_defaults, in_blocks, local_weights, n_content
from run import barrier, check_alike, mend_shards, ranks
from sample import Decoding, check_used, load_both, stream


class Shard:
    """This rank's file of rows, the same in every run; FILE.seconds times appends. Rank 0 shows a bar."""
    def __init__(self, folder, rank, n_left, unit, what):
        self.file, self.lock = folder / f"rank{rank}.jsonl", cli.lock(folder / f"lock-{rank}")
        self.bar = cli.progress_bar(None, what, n_left, unit=unit, smoothing=0)
        self.last = time.perf_counter()

    def append(self, rows):
        cli.append_line(self.file, *rows)
        before, self.last = self.last, time.perf_counter()
        cli.append_line(self.file.with_suffix(".seconds"), dict(seconds=round(self.last - before, 4)))
        self.bar.update(len(rows))


def rollout(model, tok, problems, folder, model_name, privileged=False, batch_size=64, allow_code=False,
            graded=True, max_prompt=None, **decoding):
    """Decode the problems that `folder` does not hold yet, on any number of ranks -> the records of all.
    early_stop: as given, else no. privileged: the prompt shows the solution. allow_code: tests may run."""
    settings = vars(Decoding(**{"early_stop": False} | decoding)) | dict(privileged=privileged)
    cfg = in_blocks(model, settings["block_len"]).cfg
    room = cfg.max_len - settings["gen_len"] - privileged * cfg.block_len
    problems = fitting(problems, tok, max_prompt, room, privileged and privileged_prompt)
    rank, world = ranks()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mend_shards(folder.glob("rank*.jsonl"), rank, world)
    done = {r["id"]: r for r in read_trajectories(folder, growing=True)}
    for other in folder.glob("*config.json"):
        raise UserError(f"{folder} holds {other.name}: choose a folder of trajectories, or a new one")
    facts = dict(model=str(model_name), revision=model.revision, weights=local_weights(model_name),
                 decoding=settings, schema=SCHEMA)
    prompts = {p["id"]: {k: p.get(k) for k in ("prompt", "solution", *CARRIED)} |
                        {"answer": p.get("answer", "")} for p in problems}
    for r in done.values():  # none may be of another model, of other settings or prompts
        now, then = settings | facts | prompts.get(r["id"], {}), r["decoding"] | r
        differ = [k for k in now if k != "decoding" and now[k] != then.get(k)]
        if differ:
            raise UserError(f"{folder} holds trajectories of other settings ({', '.join(differ)}): "
                            f"choose another folder or remove it")
    if graded and any(r["correct"] is None for r in done.values()):
        raise UserError(f"{folder} holds trajectories that were collected ungraded: choose another folder")
    left = {i: p for i, p in enumerate(problems) if p["id"] not in done}
    grade.check_gradable([*left.values()] * graded, allow_code)  # said before hours of decoding
    if done and left and rank == 0:
        print(f"{folder} holds {len(done)} trajectories: {len(left)} more are collected")
    todo = {i: p for i, p in left.items() if i % world == rank}  # also right if others append already
    if todo:
        shard = Shard(folder, rank, len(todo), "sample", "collect")
        decode_into(shard, model, tok, todo, facts, batch_size, allow_code)
    barrier()
    records = [r for r in read_trajectories(folder, growing=True) if r["id"] in prompts]
    check_alike(folder, [r["id"] for r in records])
    return records


def finished(folders, cfg, ids):
    """The records of `ids` in several folders that were collected before, whatever their decoding."""
    records = []
    for folder in folders:
        found = read_trajectories(folder)
        if not found or any(r["model"] != cfg.model or len(r["x0"]) != cfg.gen_len for r in found):
            raise UserError(f"{folder} has none of {cfg.model} with gen_len {cfg.gen_len}: collect them")
        cfg.block_len = cfg.block_len or found[0]["decoding"].get("block_len")
        records += [r for r in found if r["id"] in ids and len(r["prompt_ids"]) <= (cfg.max_prompt or np.inf)]
    ids = [r["id"] for r in records]
    if len(set(ids)) < len(ids):
        raise UserError(f"{'+'.join(folders)}: two of these folders hold the same problem: leave one out")
    check_alike(folders, ids)
    return records


def collect(cfg, model, tok, problems, out, **changes):
    """A method's trajectories, a token per forward; cfg.collect_X is field X of Decoding, under `changes`."""
    folder = cfg.trajectories or out / "trajectories"
    if "+" in cfg.trajectories and not Path(folder).exists():  # --trajectories A+B
        cli.refuse_if(True, " ".join(k for k in vars(cfg) if "collect_" in k), "is for collecting")
        return finished(folder.split("+"), cfg, {p["id"] for p in problems})
    how = {key.removeprefix("collect_"): value for key, value in vars(cfg).items()
           if key.startswith("collect_")}
    cfg.block_len = cfg.block_len or model.cfg.block_len or Decoding.block_len  # the model's own
    how["cache"] = how["cache"] or ("exact" if model.cfg.block_len else "none")
    how.update(batch_size=how.pop("batch"), allow_code=cfg.allow_code_execution, gen_len=cfg.gen_len,
               block_len=cfg.block_len, max_prompt=cfg.max_prompt, policy="static", per_step=1)
    return rollout(model, tok, problems, folder, cfg.model, **how | changes)


def decode_into(shard, model, tok, todo, facts, batch_size, allow_code):
    """Decode and grade the problems {number: problem} and append their records to this rank's shard."""
    problems = list(todo.values())
    decoding = dict(facts["decoding"])
    privileged = decoding.pop("privileged")
    cfg = in_blocks(model, decoding["block_len"]).cfg  # privileged prompts are shifted by whole blocks
    prompts = [privileged_ids(tok, cfg, p) if privileged else tok.prompt_ids(p) for p in problems]
    outputs = stream(model, prompts, batch_size, streams=list(todo), **decoding)
    for i, out, n, verdict in with_verdicts(outputs, problems, tok, model.cfg.eos_ids, allow_code):
        p, order, rank = problems[i], out.order, out.rank
        if decoding["early_stop"] and n < len(out.ids):
            order, rank = consecutive_tail(out, n)
        record = dict(
            id=p["id"], source=p["source"], prompt=p["prompt"], prompt_ids=tok.prompt_ids(p).tolist(),
            x0=out.ids.tolist(), order=order.tolist(), rank=rank.tolist(), nfe=out.nfe,
            solution=p["solution"], answer=p.get("answer", ""), correct=verdict and verdict.result(),
            **facts, **{k: p[k] for k in CARRIED if k in p})
        if privileged:
            record["privileged_prompt_ids"] = prompts[i].tolist()
        shard.append([record])
    shard.bar.close()


def with_verdicts(outputs, problems, tok, eos_ids, allow_code):
    """(problem index, Output) as they come -> the same, its tokens, and a Future of `correct` or None."""
    waiting = deque()
    for i, out in outputs:
        n, verdict = out.n_tokens(eos_ids), None
        with suppress(UserError):  # ungraded: it has no answer or tests, or they may not run
            verdict = grade.submit(problems[i], tok.decode(out.ids[:n].tolist()), allow_code)
        waiting.append((i, out, n, verdict))
        while waiting and (len(waiting) > 64 or not waiting[0][3] or waiting[0][3].done()):
            yield waiting.popleft()
    yield from waiting


def collection_seconds(folder):
    """Wall time that a folder's trajectories took: the slowest rank's; 0 where nothing is known."""
    ranks = [cli.read_jsonl(file, ours=True, seconds=float) for file in Path(folder).glob("*.seconds")]
    return max((sum(row["seconds"] for row in rows) for rows in ranks), default=0.0)


def consecutive_tail(out, n):
    """Orders of the EOS tail that early stopping left out: behind the last forward, left to right."""
    order, L = out.order.clone(), len(out.order)
    order[n + 1:] = out.nfe + torch.arange(L - n - 1)
    rank = (order * L + out.rank).argsort().argsort()
    return order, rank


def only_correct(records):
    """The records whose answer is right. Raises UserError if there is none."""
    kept = [r for r in records if r["correct"]]
    print(f"{len(kept)} of {len(records)} trajectories are correct")
    if not kept:
        raise UserError("no trajectory is correct: nothing to train on; check --data")
    return kept


@dataclass
class Collect(ModelOptions):
    """decode problems into a folder of trajectories: one token per forward, unless told otherwise"""
    path: str = option("tiny", positional=True)  # data, see python data.py --help
    out: str = option()  # folder to collect into
    n: int | None = None  # the first n only
    split: Literal["train", "dev", "test"] = "train"  # of a data set
    max_prompt: int | None = None  # leave out problems with a longer prompt, tokens
    privileged: bool = False  # show the model the solution, as TAD does
    batch_size: int = 64  # problems decoded at once per rank
    allow_code_execution: bool = False  # run the tests of code problems
    ungraded: bool = False  # leave ungraded what cannot be graded: code, problems without an answer


@dataclass
class Stats(ModelOptions):
    """lengths, share correct, samples per hour"""
    path: str = option(positional=True)  # a folder or .jsonl of trajectories
    n: int | None = None  # the first n only
    model: str = ""  # whose tokens these are [the trajectories' own]


@dataclass
class Inspect(Stats):
    """trajectories in the order they were decoded"""
    n: int = 3  # how many


def collect_command(args, given):
    ranks()  # an error before a model is loaded
    problems = load_problems(args.path, args.split, args.n)
    grade.check_gradable(problems * (not args.ungraded), args.allow_code_execution)  # before anything long
    defaults = decoding_defaults(config_of(args.model, args.revision))
    decoding = {"policy": "static", "per_step": 1, **defaults, **given}
    check_used(Decoding(**decoding))  # before weights are loaded
    model, tok = load_both(args)
    records = rollout(model, tok, problems, args.out, args.model, args.privileged, args.batch_size,
                      args.allow_code_execution, not args.ungraded, args.max_prompt, **decoding)
    known = [r["correct"] for r in records if r["correct"] is not None]
    print(f"{args.out} holds {len(records)} of {len(problems)} problems, "
          f"{sum(known)} of {len(known)} right")  # on every rank, since none waits for the others


def records_asked_for(args):
    """The records of a folder or of one .jsonl; args then names their own model, unless it names another."""
    records = read_trajectories(args.path)
    if not records:
        raise UserError(f"{args.path} holds no trajectories: give a folder or a .jsonl of them")
    args.model = args.model or records[0]["model"]
    args.revision = args.revision or records[0].get("revision")
    return records


def inspect_command(args):
    records = records_asked_for(args)
    tok = load_tokenizer(args.model, args.revision)
    for r in records[:args.n]:
        words = [tok.decode([i]) or "∅" for i in r["x0"]]
        print(f"{r['id']} correct={r['correct']} nfe={r['nfe']}\n  {r['prompt']}\n  {' '.join(words)}")
        print("  order of reveal: " + " ".join(f"{words[i]}@{i}" for i in np.argsort(r["rank"])))


def stats_command(args):
    records = records_asked_for(args)
    seconds = 0 if args.n else collection_seconds(args.path)
    records = records[:args.n]
    eos_ids = config_of(args.model, args.revision).eos_ids
    known = [r["correct"] for r in records if r["correct"] is not None]
    tokens = [n_content(r["x0"], eos_ids) for r in records]
    print(f"{'trajectories':<16} {len(records)} of {records[0]['model']}, length {len(records[0]['x0'])}")
    print(f"{'correct':<16}",
          f"{np.mean(known):.1%} of {len(known)} graded" if known else "not graded")
    spread("prompt tokens", [len(r["prompt_ids"]) for r in records])
    spread("response tokens", tokens)
    spread("forwards (nfe)", [r["nfe"] for r in records])
    print(f"{'tokens/forward':<16} {sum(tokens) / sum(r['nfe'] for r in records):.2f}")
    if seconds:
        print(f"{'collected in':<16} {seconds:.0f} s: {3600 * len(records) / seconds:.0f} samples/h")


COMMANDS = {"collect": (collect_command, Collect, Decoding), "inspect": (inspect_command, Inspect),
            "stats": (stats_command, Stats)}

if __name__ == "__main__":
    run_cli(lambda: cli.run_command(__doc__, COMMANDS))
