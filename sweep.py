"""Every method, its ablations and its baselines on the tiny model, side by side: one table, one picture.

    python sweep.py                        # 4 seeds; interrupted, the same command continues
    python sweep.py --only TAD T3D         # some of the rows
    python sweep.py --dry_run              # the training commands, to run one by hand

All runs have the same number of steps, batch, learning rate and schedule (COMMON) and the adapter rank of the
tiny presets: the rows differ in their data, in what is masked and in the loss. Nothing is tuned. Each is
trained by its own script, as a user would; trajectories are collected, and TRIMS's examples scored, once for
all. Seed s trains with --seed s and is evaluated on test problems of its own, --n of them: 4 seeds see 4 n
problems.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as nt_eval
import lora
import model as nt_model
import t3d
import trims
from model import UserError, run_cli

COMMON = "--max_steps 200 --batch_size 16 --micro_batch 16 --lr 1e-3 --lr_schedule tail --warmup_steps 10"
BATCH = 51  # problems decoded at once: 251 nearly fill five such batches
N_TRAJECTORIES = 1000
PROBLEMS = f"--n_problems {N_TRAJECTORIES} --trajectories"
PRIVILEGED, OWN, ROLLOUTS = (f"{PROBLEMS} {{root}}/trajectories-{name}"
                             for name in ("privileged", "own", "rollouts"))
SFT = "--trajectory_share 0"
METHODS = {  # label -> script and its options; a label with a colon is an ablation
    "base": None,
    "SFT-GT": f"trims.py {SFT}",
    "SFT-SD": f"trims.py {SFT} --data {{root}}/trajectories-own",
    "SFT-SD privileged": f"trims.py {SFT} --data {{root}}/trajectories-privileged",  # TAD's responses
    "Naive TD": f"t3d.py --loss naive_td --lam 0 {ROLLOUTS}",
    "dInfer-like": f"tabom.py --segment two_steps --lam 0 {OWN}",
    "TRIMS": "trims.py",
    "TRIMS: easy first": "trims.py --ordering ascending",
    "TRIMS: random order": "trims.py --ordering random",
    "TAD": f"tad.py --window auto-quality {PRIVILEGED}",
    "TAD: speed": f"tad.py --window auto-speed {PRIVILEGED}",
    "TAD: near only": f"tad.py --window auto-quality --distant none {PRIVILEGED}",
    "TAD: distant only": f"tad.py --window auto-quality --near none {PRIVILEGED}",
    "T3D": f"t3d.py {ROLLOUTS}",
    "T3D: no DDO": f"t3d.py --loss naive_td {ROLLOUTS}",
    "T3D: no path": f"t3d.py --lam 0 {ROLLOUTS}",
    "T3D: no random tokens": f"t3d.py --rand_p 0 {ROLLOUTS}",
    "TABOM": f"tabom.py {OWN}",
    "TABOM: no ranking": f"tabom.py --lam 0 {OWN}",
    "TABOM: global window": f"tabom.py --window 0 {OWN}",
}


def command(label, seed, root):
    """The training command of one run, as a list of words without the interpreter."""
    own = f"--eval_problems 0 --seed {seed} --out {run_folder(label, seed, root)}"
    return f"{METHODS[label].format(root=root)} {COMMON} {own}".split()


def run_folder(label, seed, root):
    return root / f"{label.lower().replace(': ', '-').replace(' ', '_')}-{seed}"


def collect(name, model, tok, root):
    """The trajectories that several scripts train on: token by token, as the scripts collect them."""
    return data.rollout(model, tok, data.load_problems("tiny", "train", N_TRAJECTORIES),
                        root / f"trajectories-{name}", "tiny", privileged=name == "privileged",
                        temperature=t3d.Config.collect_temperature if name == "rollouts" else 0.0,
                        policy="static", per_step=1, **data.TINY_DECODING)


def score(tok, root):
    """The teacher's scores of the examples that every TRIMS run trains on, into root/difficulty."""
    cfg = trims.Config(**trims.PRESETS["tiny"])
    trims.score_examples(trims.load_examples(cfg, tok), tok, cfg, root, 0, 1, "cpu", torch.float32)


def prepare(labels, model, tok, root):
    """What several of these runs share, before the first one -> the own trajectories, for TDS."""
    own = collect("own", model, tok, root)
    for name in ("privileged", "rollouts"):
        if any(f"trajectories-{name}" in (METHODS[label] or "") for label in labels):
            collect(name, model, tok, root)
    if any(label.startswith("TRIMS") for label in labels):
        score(tok, root)
    return own


def train(label, seed, root):
    """Run the method's script unless it is finished; the script itself continues what was interrupted."""
    script, *options = command(label, seed, root)
    scores = run_folder(label, seed, root) / "difficulty"
    if label.startswith("TRIMS") and not (scores.is_symlink() or scores.exists()):
        scores.parent.mkdir(exist_ok=True)
        scores.symlink_to("../difficulty")
    done = subprocess.run([sys.executable, str(nt_model.HERE / script), *options])
    if done.returncode:
        raise UserError(f"{label}, seed {seed}: {script} ended with {done.returncode}; its message is above")


def finished(label, seed, root, problems):
    """Whether the run has its results. Raises UserError if they are on other problems."""
    folder = run_folder(label, seed, root)
    if not (folder / "results.jsonl").exists():
        return False
    if data.read_jsonl(folder / "results.jsonl")[0]["ids"] != [p["id"] for p in problems]:
        raise UserError(f"{folder} has results on other problems: repeat its --n, or another --out")
    return True


def costs(label, seed, root):
    """Seconds of training and of collecting, from the run's own log and its trajectories."""
    folder = run_folder(label, seed, root)
    log = data.read_jsonl(folder / "log.jsonl")
    config = nt_model.read_json(folder / "config.json")
    sources = [config.get("trajectories") or config["data"], folder / "difficulty"]  # TRIMS scores instead
    return dict(train_s=sum(row["seconds"] for row in log),
                collect_s=sum(map(data.collection_seconds, sources)))


def evaluate(label, seed, root, tok, problems, records):
    """One run -> results.jsonl in its folder: the points of the protocol, TDS, and what the run cost."""
    folder = run_folder(label, seed, root)
    model, run = nt_model.load("tiny").requires_grad_(False), {}  # as under adapters: one graph for all
    if METHODS[label]:
        lora.load(model, folder / "adapter")
        run = costs(label, seed, root)
    run["tds"] = nt_eval.mean_tds(model, records, label)[0]
    points = nt_eval.curve(model, tok, problems, nt_eval.PROTOCOLS["tiny-table"], label, BATCH)
    nt_eval.write_results([(label, [{**p, "run": run} for p in points])], folder)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seeds", type=int, default=4, help="runs of every method")
    ap.add_argument("--n", type=int, default=251, help="test problems per seed")
    ap.add_argument("--only", nargs="+", metavar="LABEL", help=f"of: {', '.join(METHODS)}; base always is")
    ap.add_argument("--out", default="out/sweep", help="directory of the runs, compare.md and compare.png")
    ap.add_argument("--dry_run", action="store_true", help="print the training commands and stop")
    args = ap.parse_args()
    root, labels = Path(args.out), [x for x in METHODS if x == "base" or x in (args.only or METHODS)]
    unknown = sorted(set(args.only or []) - set(METHODS))
    if unknown or args.seeds < 1 or args.n < 1:
        raise UserError(f"--only {unknown}: unknown; --help lists the labels" if unknown else
                        f"--seeds {args.seeds}, --n {args.n}: at least 1 each")
    jobs = [(label, seed) for seed in range(args.seeds) for label in labels]
    if args.dry_run:
        for label, seed in jobs:
            print("python", *(command(label, seed, root) if METHODS[label] else ["(base: no training)"]))
        return
    problems = data.load_problems("tiny", "test", args.seeds * args.n)
    problems = [problems[seed * args.n:(seed + 1) * args.n] for seed in range(args.seeds)]
    left = [(label, seed) for label, seed in jobs if not finished(label, seed, root, problems[seed])]
    if left:
        root.mkdir(parents=True, exist_ok=True)
        tok, model = data.load_tokenizer("tiny"), nt_model.load("tiny").requires_grad_(False)
        own = prepare({label for label, _ in left}, model, tok, root)
        # compile what the runs will share, so that tokens per second are those of decoding
        nt_eval.curve(model, tok, problems[0][:BATCH], nt_eval.PROTOCOLS["tiny-table"], "warm-up", BATCH)
    for label, seed in tqdm(left, unit="run", desc="sweep", initial=len(jobs) - len(left), total=len(jobs)):
        began = time.perf_counter()
        if METHODS[label]:
            train(label, seed, root)
        evaluate(label, seed, root, tok, problems[seed], own[:32])
        print(f"{label}, seed {seed}: {time.perf_counter() - began:.0f} s")
    folders = [run_folder(label, seed, root) for label in labels for seed in range(args.seeds)]
    nt_eval.report_comparison(folders, "base", "SFT-SD", root)


if __name__ == "__main__":
    run_cli(main)
