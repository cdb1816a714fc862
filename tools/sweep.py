"""The papers' tables, and every method with its ablations on the tiny model. The same command continues.
    python tools/sweep.py paper TAD-4 --model llada   # the commands of a table or figure: docs/papers.md
    python tools/sweep.py       # the tiny comparison of docs/results.md; --only TAD T3D: some of its rows"""
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import compare  # first: it puts the folder above on the path
import cli
import data
import eval as nt_eval
import lora
import model as nt_model
import rollout
import t3d
from cli import UserError, option, read_json, read_jsonl, run_cli

COMMON = "--max_steps 200 --batch_size 16 --micro_batch 16 --lr 1e-3 --lr_schedule tail --warmup_steps 10"
BATCH = 51  # problems decoded at once: 251 nearly fill five such batches
N_TRAJECTORIES = 1000


def block_of(table):
    """The commands under a heading of docs/papers-*.md: a block of bash."""
    pages = [page.read_text("utf-8") for page in sorted((nt_model.HERE / "docs").glob("papers-*.md"))]
    found = dict(re.findall(r"^## (\S+)[^`]*```bash\n(.*?)^```", "\n".join(pages), re.M | re.S))
    if table not in found:
        raise UserError(f"no table {table!r} in docs/papers-*.md: there are {', '.join(found)}")
    return found[table]


METHODS = {task: dict(re.findall(r"# (.+)\n(?:python )?([^#\n]*)", block_of(task))) for task in data.GAMES}
GAME = "--task={0} --data={0} collect={0} --teacher={0}-ar --protocol=tiny --gen_len=48"
RANKED = set("tad.py t3d.py tabom.py trims.py curve collect".split())  # what torchrun may start
FEW = "--max_steps 2 --batch_size 4 --micro_batch 4 --eval_problems 0"
QUICK = {"tools/sweep.py": "--quick", "tools/harness.py": "--limit 8"}


def paper_commands(table, model, out, quick=False):
    """The commands of a table, lists of words: bash puts in a family and $OUT and unrolls the loops."""
    echo = "python() { printf '%q ' \"$@\"; echo; }\n" + block_of(table)
    family = nt_model.family_of(model)  # what a block asks for
    task = model if model in data.GAMES else "tiny"
    settings = {"MODEL": family, "OUT": "@OUT"}
    own = nt_model.pairs(GAME.format(task)) if family == "tiny" else {}
    said = subprocess.check_output(["bash", "-euc", echo], env=os.environ | settings, text=True)
    for script, *words in map(shlex.split, said.splitlines()):
        words = [model if (before, word) == ("--model", family) else
                 word.replace("@OUT", str(out)) if "@OUT" in word else own.get(before, word)
                 for before, word in zip([script, *words], words)]
        if quick and "--model" in words:
            words += f"{QUICK.get(script, '--n_problems 8')} {FEW * (script in RANKED)}".split()
        yield [script, *words]


def run_script(words, launch=()):
    """A script in a process of its own, which is told to end, and waited for, where this one is."""
    child = subprocess.Popen([sys.executable, *launch, nt_model.HERE / words[0], *words[1:]])
    try:
        child.wait()
    finally:
        child.terminate()
        child.wait()
    if child.returncode:
        raise UserError(f"{shlex.join(words)} ended with {child.returncode}; its message is above")


def paper_command(args):
    """Each on all GPUs that it can use; done.jsonl names those that have ended."""
    if args.table in METHODS:
        raise UserError(f"{args.table} is the comparison: python tools/sweep.py --task {args.table}")
    root = Path(args.out or f"out/papers/{args.table}-{Path(args.model).name}{'-quick' * args.quick}")
    done, gpus = root / "done.jsonl", torch.cuda.device_count()
    ended = read_jsonl(done, ours=True, mend=True) if done.exists() else []
    commands = list(paper_commands(args.table, args.model, root, args.quick))
    family, cfg = nt_model.family_of(args.model), None
    for words in commands:  # said before hours of training
        told = re.search(r"--protocol (\S+)(?:.* --points)?([\d ]*)", " ".join(words))
        if told:
            protocol = nt_eval.protocol_of(told[1], family, points=list(map(int, told[2].split())))
            for rule in protocol["rules"] * (not args.dry_run):
                cfg = cfg or nt_model.config_of(args.model)
                nt_eval.sample.check_prompts(cfg, [], nt_eval.decoding_of(protocol | rule))
    weights = nt_model.local_weights(args.model)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    for words in commands:
        print(shlex.join(["python", *words]))  # before what the script says: run_cli flushes every line
        row = dict(words=words, weights=weights)
        if args.dry_run or row in ended:
            continue
        run_script(words, torchrun * (gpus > 1 and not RANKED.isdisjoint(words[:2])))
        root.mkdir(parents=True, exist_ok=True)
        cli.append_line(done, row)


def command(label, seed, folder, task="tiny", lr=None):
    """-> the words of a row's command: the script of its method, and options; the last of a name counts."""
    script, _, options = METHODS[task][label].partition(" ")
    options += f" --lr {lr}" * bool(lr)
    own = f"--model {task} --eval_problems 0 --seed {seed} --out $OUT/{folder.name}"
    words = f"{script} {COMMON} {options} {own}".split()
    return [word.replace("$OUT", str(folder.parent)) for word in words]


def prepare(labels, model, tok, root, task="tiny"):
    """What several of these runs share, before the first one -> the own trajectories, for TDS."""
    problems, records = data.load_problems(task, "train", N_TRAJECTORIES), {}
    asked_for = " ".join(["trajectories-own", *map(METHODS[task].get, labels)])
    for name in ("own", "privileged", "rollouts"):  # token by token, as the scripts collect them
        if f"trajectories-{name}" in asked_for:
            records[name] = rollout.rollout(
                model, tok, problems, root / f"trajectories-{name}", task, privileged=name == "privileged",
                temperature=t3d.Config.collect_temperature if name == "rollouts" else 0.0,
                policy="static", per_step=1, **data.TINY_DECODING)
    return records["own"]


def costs(folder):
    """Seconds of training and of collecting, from the run's own log and its trajectories."""
    config = read_json(folder / "config.json")
    sources = [config.get("trajectories") or config["data"], folder / "difficulty"]  # TRIMS scores instead
    return dict(train_s=sum(row["seconds"] for row in read_jsonl(folder / "log.jsonl", True, seconds=float)),
                collect_s=sum(map(rollout.collection_seconds, sources)))


def evaluate(label, folder, tok, problems, records, task="tiny"):
    """One run -> results.jsonl in its folder: the points of the protocol, TDS, and what the run cost."""
    model, cost = nt_model.load(task).requires_grad_(False), {}  # as under adapters: one graph for all
    if METHODS[task][label]:
        lora.load(model, folder / "adapter")
        cost = costs(folder)
    cost["tds"] = float(np.nanmean(nt_eval.mean_of(nt_eval.tds, model, records, label)))
    protocol = nt_eval.protocol_of(f"{task}-table", "tiny")
    points = nt_eval.curve(model, tok, problems, protocol, label, BATCH)
    nt_eval.write_results([(label, [point | {"run": cost} for point in points])], folder)


@dataclass
class PaperOptions:
    """run the commands of a table or figure of a paper, or print them"""
    table: str = option(positional=True)  # TAD-4, TABOM-fig2, ...: a heading of docs/papers-*.md
    model: str = "tiny"  # preset name, hub id or directory; tiny: its own task instead of theirs
    out: str = ""  # directory of the runs [out/papers/TABLE-MODEL]
    quick: bool = False  # two steps on a few problems
    dry_run: bool = False  # print the commands and stop


@dataclass
class Options:
    seeds: int = 4  # runs of every method
    n: int = 251  # problems per seed
    split: Literal["dev", "test"] = "test"  # what they are of
    only: list[str] | None = option(None, choices=lambda: METHODS["tiny"])  # some of the rows; base always is
    task: str = option("tiny", choices=data.GAMES)  # and its base
    lr: float | None = None  # learning rate of every row [its own]
    out: str = "out/sweep"  # directory of the runs, compare.md, compare.png and comparison.jsonl.gz


def main():
    if sys.argv[1:2] == ["paper"]:
        return cli.run_command(__doc__, {"paper": (paper_command, PaperOptions)})
    args = cli.parse(__doc__, Options)
    root, rows = Path(args.out), METHODS[args.task]
    ending = f"-lr{args.lr}" * bool(args.lr)  # these rows have folders of their own
    labels = [label for label in rows if label in {"base", *(args.only or rows)}]
    jobs = [(label, seed, root / f"{label.lower().replace(': ', '-').replace(' ', '_')}-{seed}{ending}")
            for seed in range(args.seeds) for label in labels]
    every, left = data.load_problems(args.task, args.split, args.seeds * args.n), []
    problems = [every[seed * args.n:(seed + 1) * args.n] for seed in range(args.seeds)]
    for label, seed, folder in jobs:
        results = folder / "results.jsonl"
        if not results.exists():
            left.append((label, seed, folder))
        elif nt_eval.read_points(folder)[0]["ids"] != [p["id"] for p in problems[seed]]:
            raise UserError(f"{results} is of other problems: repeat its --n, or another --out")
    if left:
        tok, model = data.load_tokenizer(args.task), nt_model.load(args.task).requires_grad_(False)
        own = prepare({label for label, *_ in left}, model, tok, root, args.task)
    for label, seed, folder in cli.progress_bar(left, "sweep", unit="run"):
        if rows[label]:
            run_script(command(label, seed, folder, args.task, args.lr))
        evaluate(label, folder, tok, problems[seed], own[:32], args.task)
    folders = [folder for *_, folder in jobs]
    compare.pack(folders, root / "comparison.jsonl.gz")
    control = "SFT-SD" if "SFT-SD" in labels else "base"
    compare.runs_command(compare.RunsOptions(folders, control, out=root))


if __name__ == "__main__":
    run_cli(main)
