"""Every method, its ablations and its baselines on the tiny model, side by side: one table, one picture.

    python tools/sweep.py                    # 4 seeds; interrupted, the same command continues
    python tools/sweep.py --only TAD T3D     # some of the rows
    python tools/sweep.py --dry_run          # the training commands, to run one by hand

All runs share COMMON and the adapter rank of the tiny presets: the rows differ in their data, in what is
masked and in the loss. Nothing is tuned. Trajectories are collected, and TRIMS's examples scored, once for
all. Seed s has --n test problems of its own. comparison.jsonl.gz keeps the results for tools/compare.py.
"""
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import compare  # first: it puts the folder above on the path
import cli
import data
import eval as nt_eval
import lora
import model as nt_model
import rollout
import t3d
from cli import UserError, read_json, read_jsonl, run_cli

COMMON = "--max_steps 200 --batch_size 16 --micro_batch 16 --lr 1e-3 --lr_schedule tail --warmup_steps 10"
BATCH = 51  # problems decoded at once: 251 nearly fill five such batches
N_TRAJECTORIES = 1000
SHARED = f"--n_problems {N_TRAJECTORIES} --trajectories {{root}}/trajectories"  # -own, -privileged, -rollouts
SFT = "--trajectory_share 0"
METHODS = {  # label -> script and its options; a label with a colon is an ablation
    "base": "",
    "SFT-GT": f"trims.py {SFT}",
    "SFT-SD": f"trims.py {SFT} --data {{root}}/trajectories-own",
    "SFT-SD privileged": f"trims.py {SFT} --data {{root}}/trajectories-privileged",  # TAD's responses
    "Naive TD": f"t3d.py --loss naive_td --lam 0 {SHARED}-rollouts",
    "dInfer-like": f"tabom.py --segment two_steps --lam 0 {SHARED}-own",
    "TRIMS": "trims.py",
    "TRIMS: easy first": "trims.py --ordering ascending",
    "TRIMS: random order": "trims.py --ordering random",
    "TAD": f"tad.py --window auto-quality {SHARED}-privileged",
    "TAD: speed": f"tad.py --window auto-speed {SHARED}-privileged",
    "TAD: near only": f"tad.py --window auto-quality --distant none {SHARED}-privileged",
    "TAD: distant only": f"tad.py --window auto-quality --near none {SHARED}-privileged",
    "T3D": f"t3d.py {SHARED}-rollouts",
    "T3D: no DDO": f"t3d.py --loss naive_td {SHARED}-rollouts",
    "T3D: no path": f"t3d.py --lam 0 {SHARED}-rollouts",
    "T3D: no random tokens": f"t3d.py --rand_p 0 {SHARED}-rollouts",
    "TABOM": f"tabom.py {SHARED}-own",
    "TABOM: no ranking": f"tabom.py --lam 0 {SHARED}-own",
    "TABOM: global window": f"tabom.py --window 0 {SHARED}-own",
}


def command(label, seed, folder):
    own = f"--eval_problems 0 --seed {seed} --out {folder}"
    return f"{METHODS[label].format(root=folder.parent)} {COMMON} {own}".split()


def prepare(labels, model, tok, root):
    """What several of these runs share, before the first one -> the own trajectories, for TDS."""
    problems, records = data.load_problems("tiny", "train", N_TRAJECTORIES), {}
    asked_for = " ".join(["trajectories-own", *map(METHODS.get, labels)])
    for name in ("own", "privileged", "rollouts"):  # token by token, as the scripts collect them
        if f"trajectories-{name}" in asked_for:
            records[name] = rollout.rollout(
                model, tok, problems, root / f"trajectories-{name}", "tiny", privileged=name == "privileged",
                temperature=t3d.Config.collect_temperature if name == "rollouts" else 0.0,
                policy="static", per_step=1, **data.TINY_DECODING)
    return records["own"]


def train(label, seed, folder):
    """Run the method's script, which continues what was interrupted and says so where it is finished."""
    script, *options = command(label, seed, folder)
    if label.startswith("TRIMS"):  # the first of them scores for all
        folder.mkdir(exist_ok=True)
        (folder.parent / "difficulty").mkdir(exist_ok=True)
        with suppress(FileExistsError):
            (folder / "difficulty").symlink_to("../difficulty")
    done = subprocess.run([sys.executable, str(nt_model.HERE / script), *options])
    if done.returncode:
        raise UserError(f"{label}, seed {seed}: {script} ended with {done.returncode}; its message is above")


def costs(folder):
    """Seconds of training and of collecting, from the run's own log and its trajectories."""
    config = read_json(folder / "config.json")
    sources = [config.get("trajectories") or config["data"], folder / "difficulty"]  # TRIMS scores instead
    return dict(train_s=sum(row["seconds"] for row in read_jsonl(folder / "log.jsonl")),
                collect_s=sum(map(rollout.collection_seconds, sources)))


def evaluate(label, folder, tok, problems, records):
    """One run -> results.jsonl in its folder: the points of the protocol, TDS, and what the run cost."""
    model, cost = nt_model.load("tiny").requires_grad_(False), {}  # as under adapters: one graph for all
    if METHODS[label]:
        lora.load(model, folder / "adapter")
        cost = costs(folder)
    cost["tds"] = float(np.nanmean(nt_eval.mean_tds(model, records, label)))
    points = nt_eval.curve(model, tok, problems, nt_eval.PROTOCOLS["tiny-table"], label, BATCH)
    nt_eval.write_results([(label, [{**point, "run": cost} for point in points])], folder)


@dataclass
class Options:
    seeds: int = 4  # runs of every method
    n: int = 251  # test problems per seed
    only: list[str] | None = None  # some labels of METHODS; base always is
    out: str = "out/sweep"  # directory of the runs, compare.md, compare.png and comparison.jsonl.gz
    dry_run: bool = False  # print the training commands and stop


def main():
    args = cli.parse(__doc__, Options)
    unknown = sorted(set(args.only or []) - set(METHODS))
    if unknown:
        raise UserError(f"--only {unknown}: unknown; there are {', '.join(METHODS)}")
    root = Path(args.out)
    labels = [label for label in METHODS if label == "base" or label in (args.only or METHODS)]
    names = {label: label.lower().replace(": ", "-").replace(" ", "_") for label in labels}
    jobs = [(label, seed, root / f"{names[label]}-{seed}") for seed in range(args.seeds) for label in labels]
    if args.dry_run:
        for label, *run in jobs:
            print("python", *command(label, *run) if METHODS[label] else ["(base: no training)"])
        return
    every, left = data.load_problems("tiny", "test", args.seeds * args.n), []
    problems = [every[seed * args.n:(seed + 1) * args.n] for seed in range(args.seeds)]
    for label, seed, folder in jobs:
        results = folder / "results.jsonl"
        if not results.exists():
            left.append((label, seed, folder))
        elif read_jsonl(results)[0]["ids"] != [p["id"] for p in problems[seed]]:
            raise UserError(f"{results} is of other problems: repeat its --n, or another --out")
    if left:
        tok, model = data.load_tokenizer("tiny"), nt_model.load("tiny").requires_grad_(False)
        own = prepare({label for label, *_ in left}, model, tok, root)
        # compile what the runs will share, so that tokens per second are those of decoding
        nt_eval.curve(model, tok, problems[0][:BATCH], nt_eval.PROTOCOLS["tiny-table"], "warm-up", BATCH)
    done = len(jobs) - len(left)
    for label, seed, folder in cli.progress_bar(left, "sweep", len(jobs), unit="run", initial=done):
        if METHODS[label]:
            train(label, seed, folder)
        evaluate(label, folder, tok, problems[seed], own[:32])
    folders = [root / f"{names[label]}-{seed}" for label in labels for seed in range(args.seeds)]
    compare.pack(folders, root / "comparison.jsonl.gz")
    compare.runs_command(compare.RunsOptions(folders, control="SFT-SD", out=root))


if __name__ == "__main__":
    run_cli(main)
