"""Evaluation: accuracy against tokens per forward (TPF), as curves over decoding settings.

    python eval.py curve --model tiny --n 500                          # the base model
    python eval.py curve --model tiny --adapter out/tad-tiny/adapter --label TAD --out out/tad-eval
    python eval.py caches --n 200                                      # what the caches cost
    python eval.py nll --n 40                                          # TRIMS Fig. 7
    python eval.py compare out/tad-eval-* --base base --control SFT    # one table and one picture
                                                                       # over runs and seeds

Definitions, used everywhere:
    acc     share of problems whose final answer is right, percent; +- is the binomial standard error
    nfe     forwards of the model spent on a sample while it was unfinished, cache refreshes included
    tokens  response ids before the first EOS
    TPF     sum of tokens / sum of nfe over the problems
    AUP     (d3LLM; TAD Eq. 26) points (rho_i = TPF, y_i = acc) sorted by rho, those with y < y_1 - 5 dropped:
            rho_1 y_1 + sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2,
            W(y) = min(exp(-alpha (1 - y / y_max)), 1), alpha = 3. y_max is the best accuracy of any compared
            model on the task: AUP changes with it, so it is always shown.
"""
import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import grade
import lora
import model as nt_model
from model import UserError, run_cli
from sample import generate

# A protocol fixes everything about decoding; `rules` are the points of its curve.
PROTOCOLS = {
    "tiny": dict(**data.TINY_DECODING, rules=[
        dict(policy="static", per_step=1), *(dict(policy="threshold", threshold=t)
                                             for t in (0.97, 0.95, 0.93, 0.9, 0.8, 0.7, 0.5))]),
    "tiny-thresholds": dict(**data.TINY_DECODING, rules=[  # without the slow token-by-token point
        dict(policy="threshold", threshold=t) for t in (0.97, 0.95, 0.93, 0.9, 0.8)]),
    "tiny-table": dict(**data.TINY_DECODING, compiled=True, sync_every=1, rules=[  # sweep.py
        *(dict(policy="static", per_step=k) for k in (1, 2, 4)),
        *(dict(policy="threshold", threshold=t) for t in (0.95, 0.9, 0.8))]),
    "tiny-static": dict(gen_len=data.TINY_LEN, cache="none", policy="static", rules=[
        *(dict(block_len=data.TINY_BLOCK, per_step=k) for k in (1, 2, 4, 8)),
        dict(block_len=data.TINY_LEN, per_step=data.TINY_LEN)]),  # the last one: all at once
}


def aup(pairs, y_max, alpha=3.0):
    """Accuracy under parallelism.
    pairs: [(tpf, accuracy in percent), ...]; y_max in percent -> float. TAD Eq. 26.
    """
    if not pairs or y_max <= 0:
        raise UserError(f"AUP needs at least one point and a positive y_max, "
                        f"got {len(pairs)} points, y_max {y_max}")
    pairs = sorted(pairs)
    kept = [(x, y) for x, y in pairs if y >= pairs[0][1] - 5]
    if kept[-1] != pairs[-1]:
        warnings.warn(f"AUP: the curve ends below y_1 - 5; "
                      f"clipped at TPF {kept[-1][0]:.2f} of {pairs[-1][0]:.2f}")

    def weighted(y):
        return y * min(math.exp(-alpha * (1 - y / y_max)), 1)

    area = kept[0][0] * kept[0][1]
    for (x0, y0), (x1, y1) in zip(kept, kept[1:]):
        area += (x1 - x0) * (weighted(y1) + weighted(y0)) / 2
    return area


# ------------------------------------------------------------------------------------------------ measurement
def rule_name(rule):
    if rule["policy"] == "static":
        return f"{rule.get('per_step', 1)} per forward"
    return f"{rule['policy']} {rule['threshold']:g}"


def decode_and_grade(model, tok, problems, settings, batch_size):
    """-> lists of Output, tokens, responses (text), correct (0 or 1), and the seconds of decoding."""
    prompts = [tok.prompt_ids(p["prompt"]) for p in problems]
    began = time.perf_counter()
    outs = generate(model, prompts, batch_size, **settings)
    seconds = time.perf_counter() - began
    tokens = [out.n_tokens(model.cfg.eos_ids) for out in outs]
    responses = [tok.decode(out.ids[:n].tolist()) for out, n in zip(outs, tokens)]
    correct = [int(grade.is_correct(p, r)) for p, r in zip(problems, responses)]
    return outs, tokens, responses, correct, seconds


def measure(model, tok, problems, settings, label, batch_size=64):
    """Decode and grade all problems under one decoding rule
    -> a point: a dict of totals and per-problem lists.
    """
    outs, tokens, responses, correct, seconds = decode_and_grade(model, tok, problems, settings, batch_size)
    return dict(label=label, rule=rule_name(settings), settings=settings, ids=[p["id"] for p in problems],
                correct=correct, tokens=tokens, nfe=[out.nfe for out in outs], responses=responses,
                seconds=seconds)


def curve(model, tok, problems, protocol, label, batch_size=64):
    """One point per decoding rule of the protocol."""
    if not problems:
        raise UserError("there is no problem to evaluate: the data is empty")
    common = {k: v for k, v in protocol.items() if k != "rules"}
    model.eval()
    return [measure(model, tok, problems, {**common, **rule}, label, batch_size)
            for rule in tqdm(protocol["rules"], unit="rule", desc=f"evaluate {label}")]


def accuracy(point):
    """Accuracy and its binomial standard error, both in percent."""
    n, p = len(point["correct"]), float(np.mean(point["correct"]))
    return 100 * p, 100 * math.sqrt(p * (1 - p) / n)


def tpf(point):
    return sum(point["tokens"]) / sum(point["nfe"])


def best_accuracy(curves):
    return max(accuracy(point)[0] for _, points in curves for point in points)


# ---------------------------------------------------------------------------------------------------- reports
def provenance():
    def git(*args):
        run = subprocess.run(["git", *args], capture_output=True, text=True, cwd=nt_model.HERE)
        return run.stdout.strip() if run.returncode == 0 else None
    return dict(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), commit=git("rev-parse", "HEAD"),
                torch=torch.__version__, python=platform.python_version(),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine())


def report(curves, out):
    """curves: [(label, points), ...]. Prints the table; writes results.jsonl and curve.png into `out`."""
    out = Path(out)
    write_results(curves, out)
    print(table(curves))
    plot(curves, out / "curve.png")
    print(f"written: {out / 'results.jsonl'}, {out / 'curve.png'}")


def write_results(curves, out):
    """results.jsonl, a line per point: written under another name and renamed, so whole or absent."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**point, "provenance": provenance()}) for _, points in curves for point in points]
    (out / "results.jsonl.tmp").write_text("\n".join(lines) + "\n")
    os.replace(out / "results.jsonl.tmp", out / "results.jsonl")


def table(curves):
    y_max = best_accuracy(curves)
    lines = [f"{'model':<10} {'decoding rule':<16} {'accuracy %':>13} "
             f"{'TPF':>6} {'forwards':>9} {'ms/sample':>10}"]
    for label, points in curves:
        for p in points:
            acc, se = accuracy(p)
            n = len(p["correct"])
            lines.append(f"{label:<10} {p['rule']:<16} {acc:6.1f} +- {se:3.1f} {tpf(p):6.2f} "
                         f"{np.mean(p['nfe']):9.1f} {1000 * p['seconds'] / n:10.1f}")
    for label, points in curves:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            area = aup([(tpf(p), accuracy(p)[0]) for p in points], y_max)
        lines.append(f"AUP {label}: {area:.1f}   (y_max {y_max:.1f}, {len(points[0]['correct'])} problems)")
    return "\n".join(lines)


def plot(curves, path, title="accuracy against parallelism"):
    """One line per model: accuracy (with standard errors) against TPF."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {path}: drawing needs matplotlib (pip install 'nanotraj[plot]')")
        return
    fig, ax = plt.subplots(figsize=(6.4, 4.2), dpi=140)
    for label, points in curves:
        points = sorted(points, key=tpf)
        ys = [accuracy(p) for p in points]
        ax.errorbar([tpf(p) for p in points], [y for y, _ in ys], [e for _, e in ys], label=label, marker="o",
                    markersize=4, capsize=2, linewidth=1.5)
    ax.set_xlabel("tokens per forward (TPF)")
    ax.set_ylabel("accuracy, %")
    ax.set_ylim(bottom=0)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def compare_caches(model, tok, problems, rule, batch_size=64):
    """How approximate each cache is: a table of accuracy, forwards, the share of problems with an unchanged
    response, and order agreement (the share of positions revealed by the same forward), against cache none.
    """
    caches = ["none", "prefix", "dual", "vicinity"] + ["exact"] * bool(model.cfg.block_len)
    outs = {}
    lines = ["| cache | accuracy, % | forwards | TPF | same response, % | order agreement, % |",
             "|---|---|---|---|---|---|"]
    for cache in caches:
        settings = {**rule, "cache": cache, "progress": True}
        outs[cache], n, _, correct, _ = decode_and_grade(model, tok, problems, settings, batch_size)
        pairs, nfe = list(zip(outs[cache], outs["none"])), sum(out.nfe for out in outs[cache])
        same = np.mean([torch.equal(a.ids, b.ids) for a, b in pairs])
        order = np.mean([(a.order == b.order).float().mean().item() for a, b in pairs])
        lines.append(f"| {cache} | {100 * np.mean(correct):.1f} | {nfe / len(n):.1f} | {sum(n) / nfe:.2f} "
                     f"| {100 * same:.1f} | {100 * order:.1f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- TDS (TABOM Eq. 10 and 11)
@torch.no_grad()
def tds(model, record):
    """Variance of predictive entropies along a record's own trajectory: (T,) fp32 numpy, nats^2.

    Step t: population variance over the still masked positions before the first EOS of the finished response;
    NaN where fewer than two are masked.
    """
    x0, order = torch.tensor(record["x0"]), torch.tensor(record["order"])
    n = nt_model.n_content(x0, model.cfg.eos_ids)
    xt, masked = data.state_at(x0[None], order[None], torch.arange(int(order.max()) + 1)[:, None],
                               model.cfg.mask_id)
    ids, valid = data.collate([record["prompt_ids"]] * len(xt), xt, model.cfg.pad_id)
    dev, curve = model.embed.weight.device, []
    for states in torch.arange(len(xt)).split(16):  # a few states at a time, the head on masked rows only
        hidden = model.hidden(ids[states].to(dev), valid[states].to(dev))[:, -len(x0):][:, :n]
        for h, m in zip(hidden, masked[states, :n].to(dev)):
            logp = model.head(h[m]).float().log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            curve.append(float(entropy.var(unbiased=False)) if len(entropy) > 1 else np.nan)
    return np.array(curve, dtype=np.float32)


def mean_tds(model, records, label=""):
    """TDS of a model on trajectories -> its mean over all steps, and the mean of every step (T,); nats^2."""
    model.eval()
    rows = [tds(model, r) for r in tqdm(records, unit="trajectory", desc=f"TDS {label}")]
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        grid[i, :len(row)] = row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NaN where no trajectory has two masks left
        return float(np.nanmean(grid)), np.nanmean(grid, 0)


def report_tds(models, records, out):
    """Mean TDS of each (label, model) on the same trajectories: printed, and drawn per step as tds.png."""
    curves = {}
    for label, model in models:
        mean, curves[label] = mean_tds(model, records, label)
        print(f"TDS {label}: {mean:.4f} nats^2, mean over the steps of {len(records)} training trajectories")
    plot_per_forward(curves, "variance of predictive entropy, nats$^2$", Path(out) / "tds.png")


def plot_per_forward(curves, what, path):
    """{label: values per forward} -> a PNG; nothing without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    fig, ax = plt.subplots(figsize=(6.4, 3.6), dpi=140)
    for label, values in curves.items():
        ax.plot(values, label=label)
    ax.set_xlabel("forward")
    ax.set_ylabel(what)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


# ------------------------------------------------------------ the teacher's NLL along decoding (TRIMS Fig. 7)
def trajectory_nll(teacher, teacher_tok, tok, prompt, out, eos_ids):
    """At each forward of a decoding, the AR teacher's NLL per token of what is revealed so far, in text order
    and with the masks taken out: (nfe,) fp32 numpy; NaN while nothing is. prompt: text; out: Output.
    """
    n, head = out.n_tokens(eos_ids), teacher_tok.prompt_ids(prompt)
    dev, curve = next(teacher.parameters()).device, []
    for t in range(out.nfe):
        shown = out.ids[:n][out.order[:n] <= t].tolist()
        text = b"".join(tok.bytes_of(i) for i in shown).decode(errors="replace")
        ids = torch.tensor(teacher_tok.encode(text), dtype=torch.long) if shown else head[:0]
        nll = nt_model.token_nll(teacher, torch.cat([head, ids])[None].to(dev))[0, len(head):]
        curve.append(float(nll.mean()))
    return np.array(curve, dtype=np.float32)


def report_trajectory_nll(models, teacher, teacher_tok, tok, problems, settings, out):
    """Fig. 7 for each (label, model): token-by-token decodings of the problems, scored by one teacher."""
    curves = {}
    for label, model in models:
        model.eval()
        prompts = [tok.prompt_ids(p["prompt"]) for p in problems]
        outs = generate(model, prompts, 64, policy="static", per_step=1, early_stop=False, **settings)
        bar = tqdm(list(zip(problems, outs)), unit="decoding", desc=f"teacher NLL {label}")
        rows = np.array([trajectory_nll(teacher, teacher_tok, tok, p["prompt"], o, model.cfg.eos_ids)
                         for p, o in bar])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NaN where nothing is revealed
            curves[label] = np.nanmean(rows, 0)
        print(f"teacher NLL {label}: {np.nanmean(curves[label]):.4f} nats per token, mean over the forwards; "
              f"{curves[label][-1]:.4f} at the end")
    plot_per_forward(curves, "teacher NLL, nats per token", Path(out) / "trajectory_nll.png")


# ----------------------------------------------------------------------------------------- comparison of runs
# what `compare` says of a run; a column that no run has is left out
COLUMNS = ("token by token, %", "2 per forward, %", "4 per forward, %", "at 0.9, %", "TPF at 0.9", "AUP",
           "TDS, nats^2", "tok/s at 0.9", "training, min", "collecting, min")


def read_runs(folders):
    """results.jsonl of every folder -> {label: [points of run 1, points of run 2, ...]}. Runs of one number
    must have the same problems under every label; a label with a single run has those of all.
    """
    runs = {}
    for folder in folders:
        by_label = {}
        for point in data.read_jsonl(Path(folder) / "results.jsonl"):
            by_label.setdefault(point["label"], []).append(point)
        for label, points in by_label.items():
            runs.setdefault(label, []).append(points)
    most = max(runs.values(), key=len)
    for label, rs in runs.items():
        for i, points in enumerate(most):
            mine = rs[min(i, len(rs) - 1)] if len(rs) == 1 or i < len(rs) else points
            if {tuple(p["ids"]) for p in mine} != {tuple(most[i][0]["ids"])}:
                raise UserError(f"run {i + 1} of {label!r} was not evaluated on the same problems as the "
                                f"others: a paired comparison needs that")
    return runs


def on_curve(point):
    """The points that AUP and the picture take: the thresholds, and token by token."""
    return point["rule"] == "1 per forward" or not point["rule"].endswith("per forward")


def summarize(points, y_max, pick=slice(None)):
    """A run on the problems `pick` (an index array) -> the values of COLUMNS, NaN where it has none."""
    row, pairs, names = dict.fromkeys(COLUMNS, np.nan), [], {f"{k} per forward": k for k in (1, 2, 4)}
    for p in points:
        correct, tokens, nfe = (np.asarray(p[k])[pick] for k in ("correct", "tokens", "nfe"))
        acc, tpf = 100 * correct.mean(), tokens.sum() / nfe.sum()
        if on_curve(p):
            pairs.append((tpf, acc))
        if p["rule"] in names:
            row[COLUMNS[(1, 2, 4).index(names[p["rule"]])]] = acc
        if p["rule"] == "threshold 0.9":
            row.update({"at 0.9, %": acc, "TPF at 0.9": tpf, "tok/s at 0.9": sum(p["tokens"]) / p["seconds"]})
    run = points[0].get("run", {})
    row.update({"TDS, nats^2": run.get("tds", np.nan), "training, min": run.get("train_s", np.nan) / 60,
                "collecting, min": run.get("collect_s", np.nan) / 60})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row["AUP"] = aup(pairs, y_max)
    return np.array(list(row.values()), dtype=float)


def compare(runs, base, control, n_boot=1000, seed=0):
    """Table of every label's mean over runs and, paired, its ratio to base and difference from control.

    Intervals are 95% bootstrap percentiles, in the table half their width. A replicate draws problems (the
    same for every model) and, for models with several runs, run numbers (the same for every such model).
    """
    y_max = best_accuracy([(None, filter(on_curve, points)) for rs in runs.values() for points in rs])
    sets = {tuple(points[0]["ids"]) for rs in runs.values() for points in rs}
    draws = {label: [] for label in runs}
    for b in tqdm(range(n_boot + 1), unit="replicate", desc="bootstrap"):
        rng = np.random.default_rng([seed, b])
        picks = {ids: rng.integers(len(ids), size=len(ids)) if b else slice(None) for ids in sorted(sets)}
        for label, rs in runs.items():
            which = np.random.default_rng([seed, b]).integers(len(rs), size=len(rs)) if b else range(len(rs))
            rows = [summarize(rs[i], y_max, picks[tuple(rs[i][0]["ids"])]) for i in which]
            draws[label].append(np.mean(rows, 0))
    draws = {label: np.array(rows) for label, rows in draws.items()}  # (replicates, columns)
    shown = [j for j in range(len(COLUMNS)) if any(not np.isnan(d[0, j]) for d in draws.values())]

    def cell(rows):
        if np.isnan(rows[0]):
            return "–"
        lo, hi = np.percentile(rows[1:], [2.5, 97.5])
        digits = 1 if rows[0] >= 10 else 2
        return f"{rows[0]:.{digits}f} ± {(hi - lo) / 2:.{digits}f}"

    def text(rows):
        lo, hi = np.percentile(rows[1:], [2.5, 97.5])
        return f"{rows[0]:.2f} [{lo:.2f}, {hi:.2f}]"

    n = sum(map(len, sets))
    lines = [f"{n} problems, y_max {y_max:.2f}; ± is half of a 95% bootstrap interval over problems and runs",
             "", "| model | runs | " + " | ".join(COLUMNS[j] for j in shown) + " |",
             "|---" * (2 + len(shown)) + "|"]
    for label, rs in runs.items():
        lines.append(f"| {label} | {len(rs)} | " + " | ".join(cell(draws[label][:, j]) for j in shown) + " |")
    lines.append("")
    areas = {label: d[:, COLUMNS.index("AUP")] for label, d in draws.items()}
    for label in runs:
        if base in runs and label != base:
            lines.append(f"AUP {label} / {base}: {text(areas[label] / areas[base])}")
        if control in runs and label not in (base, control):
            for name in ("AUP", "TPF at 0.9", "at 0.9, %"):
                d = draws[label][:, COLUMNS.index(name)] - draws[control][:, COLUMNS.index(name)]
                spread = d[1:].std()
                lines.append(f"{name}, {label} - {control}: {text(d)}"
                             + (f", {d[0] / spread:.1f} standard errors" if spread else ""))
    return "\n".join(lines)


def pooled(rs):
    """The points of a label's runs as one: every point with the problems of all runs, run after run."""
    return [{**p, **{k: sum((run[i][k] for run in rs), []) for k in ("correct", "tokens", "nfe")}}
            for i, p in enumerate(rs[0]) if on_curve(p)]


def report_comparison(folders, base, control, out):
    """Print the table of several result folders, write compare.md and compare.png into `out`. A label with a
    colon ("TAD: near only") is an ablation: in the table, not in the picture.
    """
    runs, out = read_runs(folders), Path(out)
    if base not in runs:
        raise UserError(f"no run is labelled {base!r} (--base): there are {', '.join(runs)}")
    out.mkdir(parents=True, exist_ok=True)
    text = compare(runs, base, control)
    (out / "compare.md").write_text(text + "\n")
    plot([(label, pooled(rs)) for label, rs in runs.items() if ":" not in label], out / "compare.png")
    print(f"{text}\nwritten: {out / 'compare.md'}, {out / 'compare.png'}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="what", required=True)
    c = sub.add_parser("curve", help="accuracy and TPF of one model over the rules of a protocol")
    c.add_argument("--protocol", default="tiny", choices=list(PROTOCOLS))
    c.add_argument("--cache", choices=["none", "prefix", "dual"], help="instead of the protocol's")
    c.add_argument("--label", help="name in tables and plots; default: base, or the run's directory")
    c.add_argument("--out", help="directory of results.jsonl and curve.png [out/eval-<label>-<split>-<n>]")
    t = sub.add_parser("nll", help="an AR teacher's NLL of what each forward has revealed (TRIMS Fig. 7)")
    t.add_argument("--teacher", default="tiny-ar", help="hub id or directory of a causal LM")
    t.add_argument("--out", default="out", help="directory of trajectory_nll.png")
    k = sub.add_parser("caches", help="what each cache costs against cache none, at one threshold")
    k.add_argument("--threshold", type=float, default=0.9, help="confidence; above 1: one token per forward")
    for p in (c, k, t):
        p.add_argument("--model", default="tiny", help="preset name, hub id or directory")
        p.add_argument("--revision", help="commit, branch or tag of a hub id")
        p.add_argument("--adapter", help="directory of a LoRA adapter")
        p.add_argument("--task", default="tiny", help="tiny, or a .jsonl with prompt and answer")
        p.add_argument("--split", default="test", choices=["dev", "test"], help="of the tiny task")
        p.add_argument("--n", type=int, default=500, help="number of problems")
        p.add_argument("--gen_len", type=int, help="response length, instead of the protocol's")
        p.add_argument("--block_len", type=int, help="block size, instead of the protocol's")
        p.add_argument("--batch_size", type=int, default=64)
    m = sub.add_parser("compare", help="one table and one picture over several results folders")
    m.add_argument("folders", nargs="+")
    m.add_argument("--base", default="base", help="label the AUP ratios refer to")
    m.add_argument("--control", default="SFT", help="label the differences refer to")
    m.add_argument("--out", default="out/compare")
    args = ap.parse_args()
    if args.what == "compare":
        return report_comparison(args.folders, args.base, args.control, args.out)
    if args.n < 1:
        raise UserError(f"--n is {args.n}: at least one problem is needed")
    own = {k: getattr(args, k) for k in ("cache", "gen_len", "block_len") if getattr(args, k, None)}
    if args.what == "curve":
        trained = Path(args.adapter or args.model).resolve()  # out/RUN/adapter or out/RUN/model
        label = args.label or (trained.parent.name if trained.is_dir() else "base")
        out = Path(args.out or f"out/eval-{label}-{args.split}-{args.n}")
        if (out / "results.jsonl").exists():
            raise UserError(f"{out} holds results already: choose another --out or remove it")
    model = nt_model.load(args.model, *nt_model.default_device(), args.revision)
    tok = data.load_tokenizer(args.model, args.revision)
    if args.adapter:
        lora.load(model, args.adapter)
    problems = data.load_problems(args.task, args.split, args.n)
    if args.what == "nll":
        teacher = nt_model.load_teacher(args.teacher, *nt_model.default_device())
        settings = {**data.TINY_DECODING, **own}
        teacher_tok = data.load_teacher_tokenizer(args.teacher)
        models = [(args.adapter or args.model, model)]
        return report_trajectory_nll(models, teacher, teacher_tok, tok, problems, settings, args.out)
    if args.what == "caches":
        rule = dict(data.TINY_DECODING, policy="threshold", threshold=args.threshold, **own)
        print(compare_caches(model, tok, problems, rule, args.batch_size))
        return
    protocol = {**PROTOCOLS[args.protocol], **own}
    report([(label, curve(model, tok, problems, protocol, label, args.batch_size))], out)


if __name__ == "__main__":
    run_cli(main)
