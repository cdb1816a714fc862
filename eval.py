"""Evaluation: accuracy against tokens per forward (TPF), as curves over decoding settings.

    python eval.py curve --model tiny --n 500                          # the base model
    python eval.py curve --model tiny --adapter out/tad-tiny/adapter --label TAD --out out/tad-eval
    python eval.py curve --model llada --task gsm8k --protocol tad     # or math500, humaneval, my.jsonl
    python eval.py lm_eval --model dream --tasks gsm8k_cot_zeroshot --protocol tad --apply_chat_template
    torchrun --nproc_per_node=8 eval.py curve ...                      # problems are split over the ranks
    python eval.py protocols                                           # the papers' decoding settings
    python eval.py caches --n 200                                      # what the caches cost
    python eval.py nll --n 40                                          # TRIMS Fig. 7
    python eval.py tds --trajectories out/tabom-tiny/trajectories      # TABOM Fig. 2
    python eval.py compare out/tad-eval-* --base base --control SFT    # one table and one picture
                                                                       # over runs and seeds

Definitions, used everywhere:
    acc     share of problems whose final answer is right, percent; +- is the binomial standard error
    nfe     forwards of the model spent on a sample while it was unfinished, cache refreshes included
    tokens  response ids before the first EOS
    TPF     sum of tokens / sum of nfe over the problems
    tok/s   sum of tokens / wall time of decoding; s/sample: that time / problems; ms/forward: that time /
            forwards of the batch. They hang on device, dtype, batch size and response length: printed beside
    AUP     (d3LLM; TAD Eq. 26) points (rho_i = TPF, y_i = acc) sorted by rho, those with y < y_1 - 5 dropped:
            rho_1 y_1 + sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2,
            W(y) = min(exp(-alpha (1 - y / y_max)), 1), alpha = 3. y_max is the best accuracy of any compared
            model on the task: AUP changes with it, so it is always shown.
    TDS     (TABOM Eq. 10, 11; tds) at each forward of a trajectory, the variance of the predictive entropies
            of what is still masked, in nats^2; its mean over trajectories and forwards
"""
import argparse
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import grade
import lora
import model as nt_model
import sample
from layers import for_decoding
from model import UserError, run_cli
from sample import generate


# A protocol fixes everything about decoding; `rules` are the points of its curve, the paper's own first.
# "family" and "task" hold what differs between models and benchmarks.
def at(*thresholds, **settings):
    """One rule per threshold."""
    return [dict(threshold=t, **settings) for t in thresholds]


def dream_steps(n):
    """TABOM on Dream: as many steps as tokens (Table 8), and half as many (Table 4)."""
    return dict(gen_len=n, rules=[dict(steps=n), dict(steps=n // 2)])


MULTIBLOCK = dict(gen_len=256, block_len=32, policy="multiblock", block_add=0.1, decoded=0.95, cache="none",
                  temperature=0.0, early_stop=True)
FAST_DLLM = dict(gen_len=256, block_len=32, policy="threshold", cache="none", temperature=0.0)
PROTOCOLS = {
    "tiny": dict(**data.TINY_DECODING, rules=[
        dict(policy="static", per_step=1), *at(0.97, 0.95, 0.93, 0.9, 0.8, 0.7, 0.5, policy="threshold")]),
    "tiny-thresholds": dict(**data.TINY_DECODING,  # without the slow token-by-token point
                            rules=at(0.97, 0.95, 0.93, 0.9, 0.8, policy="threshold")),
    "tiny-table": dict(**data.TINY_DECODING, compiled=True, sync_every=1, rules=[  # sweep.py
        *(dict(policy="static", per_step=k) for k in (1, 2, 4)), *at(0.95, 0.9, policy="threshold")]),
    "tiny-static": dict(gen_len=data.TINY_LEN, cache="none", policy="static", rules=[
        *(dict(block_len=data.TINY_BLOCK, per_step=k) for k in (1, 2, 4, 8)),
        dict(block_len=data.TINY_LEN, per_step=data.TINY_LEN)]),  # the last one: all at once
    # no paper's: a curve for any model, and for your own problems
    "thresholds": dict(**FAST_DLLM, rules=at(0.9, 0.95, 0.8, 0.7),
                       family=dict(sdar=dict(block_len=4, cache="exact"), other={})),
    # TAD, section 4.1 and Table 8: entropy 0.5. The other points of its curves are not published, ours are
    # below it; nor are the cache (its H200 figures: none) and whether it stops at EOS (d3LLM's code can)
    "tad": dict(**MULTIBLOCK, rules=at(0.5, 0.4, 0.3, 0.2, 0.1)),
    # TAD's scripts instead of its paper
    "tad-code": dict(**MULTIBLOCK, family=dict(
        llada=dict(block_add=0.5, decoded=0.5, rules=at(0.5, 0.3, 0.1)),
        dream=dict(rules=at(0.4, 0.2, 0.1)))),
    # d3LLM's evaluation scripts; cache_delay and refresh are those of its cached variant (--cache prefix)
    "d3llm": dict(**MULTIBLOCK, family=dict(
        llada=dict(cache_delay=2, refresh=3, rules=at(0.5, 0.3, 0.1)),
        dream=dict(cache_delay=1, rules=at(0.4, 0.2, 0.1),
                   task=dict(humaneval=dict(rules=at(0.5, 0.3, 0.1)), other={})))),
    # TRIMS, section 4.1: Fast-dLLM's sampler (0.9, 256, 32; it goes on behind EOS). The other points of its
    # curves and its cache are not published
    "trims": dict(**FAST_DLLM, early_stop=False, rules=at(0.9, 0.95, 0.8, 0.7, 0.6, 0.5)),
    # TABOM, Table 8, the samplers of Dream and LLaDA. For other tasks than these four nothing is published:
    # GSM8K's settings
    "tabom": dict(cache="none", early_stop=False, family=dict(
        dream=dict(policy="dream", score="entropy", temperature=0.1, top_p=0.9, task=dict(
            gsm8k=dream_steps(256), math500=dream_steps(512), mbpp=dream_steps(1024),
            humaneval=dream_steps(768), other=dream_steps(256))),
        llada=dict(policy="static", temperature=0.0, rules=[dict(per_step=1)], task=dict(
            gsm8k=dict(gen_len=512, block_len=8), math500=dict(gen_len=512, block_len=64),
            mbpp=dict(gen_len=256, block_len=256), humaneval=dict(gen_len=512, block_len=512),
            other=dict(gen_len=512, block_len=8))))),
    # T3D: full decoding (Table 2), 2 and 4 tokens per step in blocks of 4 and 8 (Table 1), dynamic (Table 3)
    "t3d": dict(gen_len=2000, temperature=0.1, early_stop=True, family=dict(sdar=dict(cache="exact")), rules=[
        *(dict(policy="static", block_len=b, per_step=k, name=f"block {b}: {k} per forward")
          for b, k in ((4, 1), (4, 2), (4, 4), (8, 2), (8, 4))),
        dict(policy="threshold", block_len=4, threshold=0.9)]),
}


def protocol_of(name, family, task="", **own):
    """PROTOCOLS[name] for a model family and a task: a dict of settings and `rules`. own: what replaces them.
    Raises UserError if it has no settings for the family or they make no sense.
    """
    chosen = dict(PROTOCOLS[name])
    for key, value in (("family", family), ("task", known_task(task) or "other")):
        options = chosen.pop(key, None)
        if options and value not in options and "other" not in options:
            raise UserError(f"protocol {name} has no settings for {key} {value}: it is for "
                            f"{', '.join(options)}")
        chosen.update(options.get(value, options.get("other")) if options else {})
    chosen.update(own)
    chosen["rules"] = [{k: v for k, v in rule.items() if k not in own} for rule in chosen["rules"]]
    for rule in chosen["rules"]:
        decoding_of({**chosen, **rule})
    return chosen


HOW = ("compiled", "sync_every", "int8")  # of the decoder: how it computes, not what


def decoding_of(settings):
    """The settings of a protocol and a rule -> sample.Decoding."""
    other = (*HOW, "progress", "rules", "name")
    return sample.Decoding(**{k: v for k, v in settings.items() if k not in other})


def known_task(task):
    """A task's name here or in lm_eval -> its benchmark's in PROTOCOLS and published.json, or None."""
    name = re.split(r"[=:]", str(task))[0].removeprefix("minerva_").removesuffix("_instruct")
    name = {"gsm8k_cot": "gsm8k", "gsm8k_cot_zeroshot": "gsm8k"}.get(name, name)
    return name if name in ("gsm8k", "math", "math500", "humaneval", "mbpp", "ifeval") else None


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
def rule_name(settings):
    if settings.get("name"):
        return settings["name"]
    if settings["policy"] in ("static", "dream"):
        s = decoding_of(settings)
        steps = s.steps or (s.gen_len if s.policy == "dream" else 0)
        return f"{s.block_len / steps if steps else s.per_step:g} per forward"  # dream has one block
    return f"{settings['policy']} {settings['threshold']:g}"


@torch.no_grad()
def decode_rows(model, tok, prompts, settings, batch_size, streams=None, progress=False):
    """Decode prompts (list of (P,) int64) and yield (prompt index, Output, row) as they finish. row: response
    (text), tokens, nfe, and the seconds and forwards of the batch since the row before: they add up to the
    wall time of decoding. An Output comes from the device, so that its work is done when the clock is read.
    """
    if not prompts:
        return
    began, forwards, s = time.perf_counter(), 0, decoding_of(settings)
    sample.check_prompts(model.cfg, prompts, s)
    how = {k: settings[k] for k in HOW if k in settings}
    batch = sample.Batch(sample.in_blocks(model, s.block_len), [p.cpu() for p in prompts], s, batch_size,
                         range(len(prompts)) if streams is None else streams, **how)
    for i, out in sample.decode(batch, progress):
        n, now = out.n_tokens(model.cfg.eos_ids), time.perf_counter()
        yield i, out, dict(response=tok.decode(out.ids[:n].tolist()), tokens=n, nfe=out.nfe,
                           seconds=now - began, forwards=batch.forwards - forwards)
        began, forwards = time.perf_counter(), batch.forwards


def decode_and_grade(model, tok, problems, settings, batch_size, allow_code=False):
    """-> lists of Output, tokens, responses (text), correct (0 or 1), and the seconds of decoding."""
    prompts = [tok.prompt_ids(p["prompt"]) for p in problems]
    done = decode_rows(model, tok, prompts, settings, batch_size, progress=settings.get("progress", False))
    done = sorted(done, key=lambda row: row[0])
    outs, rows = [out for _, out, _ in done], [row for *_, row in done]
    responses = [row["response"] for row in rows]
    correct = [int(x) for x in grade.grade_all(problems, responses, allow_code)]
    return outs, [row["tokens"] for row in rows], responses, correct, sum(row["seconds"] for row in rows)


def warm_up(model, tok, prompts, settings, batch_size):
    """What the clock must not see. Where there is something to compile: a batch of the shapes to come."""
    n = batch_size if settings.get("compiled") or model.embed.weight.is_cuda else 1
    list(decode_rows(model, tok, sorted(prompts, key=len)[-n:], settings, batch_size))


def wall_seconds(rows):
    """Of decoding: the ranks, a shard of rows each, decode at the same time."""
    shards = Counter()
    for row in rows:
        shards[row.get("shard")] += row["seconds"]
    return max(shards.values())


def point_of(model, problems, rows, correct, settings, label, batch_size):
    """One decoding rule's result: a dict of totals and per-problem lists. rows: in the order of problems."""
    weight = model.embed.weight
    return dict(label=label, rule=rule_name(settings), settings=settings, ids=[p["id"] for p in problems],
                correct=[int(x) for x in correct], tokens=[row["tokens"] for row in rows],
                nfe=[row["nfe"] for row in rows], responses=[row["response"] for row in rows],
                seconds=wall_seconds(rows), device=device_name(),
                dtype=str(weight.dtype).removeprefix("torch."),
                ms_per_forward=1000 * sum(r["seconds"] for r in rows) / sum(r["forwards"] for r in rows),
                batch_size=batch_size, ranks=len({row.get("shard") for row in rows}))


def measure(model, tok, problems, settings, label, batch_size=64, allow_code=False):
    """Decode and grade all problems under one decoding rule -> a point, see point_of."""
    prompts = [tok.prompt_ids(p["prompt"]) for p in problems]
    rows = {i: row for i, _, row in decode_rows(model, tok, prompts, settings, batch_size)}
    rows = [rows[i] for i in range(len(problems))]
    correct = grade.grade_all(problems, [row["response"] for row in rows], allow_code)
    return point_of(model, problems, rows, correct, settings, label, batch_size)


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


# -------------------------------------------------------------- measurement that can be interrupted and split
def join_ranks():
    """(rank, world size): torchrun's, or (0, 1). The ranks only exchange words, so gloo does on GPUs too."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # one may wait long for another's decoding
    return rank, world


def barrier(world):
    if world > 1:
        dist.barrier()


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def checksum(files):
    """Of the content of files, in the order of their names."""
    total = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()[:16]


def made_of(args, model):
    """The facts about a model that decide what it answers. Files of a hub id are what its revision says."""
    folder = nt_model.checkpoint_dir(args.model, args.revision)
    adapter = args.adapter and checksum(Path(args.adapter).glob("adapter_*"))
    ours = [nt_model.HERE / f"{name}.py" for name in ("model", "sample", "layers", "lora", "data", "grade")]
    return dict(model=str(args.model), revision=model.revision,
                weights=None if model.revision else checksum(folder.glob("*.safetensors")), adapter=adapter,
                dtype=str(model.embed.weight.dtype).removeprefix("torch."), code=checksum(ours),
                torch=torch.__version__, math_verify=version("math-verify"), lm_eval=version("lm_eval"),
                device=device_name())


def open_folder(out, config, rank):
    """Make the folder of a run. One that holds another run's results is refused: the fields that differ are
    named. Rules are no part of a run: a folder may get more of them.
    """
    file = out / "config.json"
    if not file.exists() and (out / "results.jsonl").exists():
        raise UserError(f"{out} holds results already: choose another --out or remove it")
    then = nt_model.read_json(file) if file.exists() else config
    if then != config:
        differ = [k for k in {**config, **then} if config.get(k) != then.get(k)]
        raise UserError(f"{out} holds results of another run ({', '.join(differ)} differ): choose another "
                        f"--out or remove it")
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        nt_model.write_whole(file, json.dumps(config, indent=1) + "\n")


def append(file, row):
    """One line of a .jsonl, on the disk when this returns."""
    with open(file, "ab", buffering=0) as f:
        f.write((json.dumps(row) + "\n").encode())
        os.fsync(f.fileno())


def read_rows(out, name):
    """{id: row} of all ranks' unfinished business under this name."""
    return {row["id"]: {**row, "shard": shard.name} for shard in sorted(out.glob(f"{name}.rank*.jsonl"))
            for row in data.read_jsonl(shard, tolerant=True)}


def finish_rows(model, tok, prompts, ids, out, name, settings, batch_size, streams, rank=0):
    """Decode prompts and append a row each, under its id, to this rank's shard: a kill loses at most the rows
    being decoded.
    """
    shard = out / f"{name}.rank{rank}.jsonl"
    data.drop_torn_line(shard)
    warm_up(model, tok, prompts, settings, batch_size)
    for i, _, row in decode_rows(model, tok, prompts, settings, batch_size, streams, progress=rank == 0):
        append(shard, {"id": ids[i], **row})


def resumable_curve(model, tok, problems, protocol, label, out, config, batch_size, rank=0, world=1,
                    allow_code=False):
    """curve(), written to `out` as it goes: a point per line of results.jsonl, its key a hash of all that it
    hangs on; a point that is there is not computed again. Problems are split over the ranks; rank 0 grades.
    """
    open_folder(out, config, rank)
    prompts, keys = {p["id"]: tok.prompt_ids(p["prompt"]) for p in problems}, []
    common, facts = {k: v for k, v in protocol.items() if k != "rules"}, provenance(**config)
    for rule in tqdm(protocol["rules"], unit="rule", desc=f"evaluate {label}", disable=rank > 0):
        settings = {**common, **rule}
        settings.update(vars(decoding_of(settings)))  # defaults are settings too
        keys.append(digest([config, settings]))
        name, file = f"rows-{keys[-1]}", out / "results.jsonl"
        done = read_rows(out, name)
        todo = [i for i, p in enumerate(problems) if p["id"] not in done][rank::world]
        written = file.exists() and any(p["key"] == keys[-1] for p in data.read_jsonl(file, tolerant=True))
        barrier(world)  # all have read what there is
        if written:
            continue
        ids = [problems[i]["id"] for i in todo]
        finish_rows(model, tok, [prompts[i] for i in ids], ids, out, name, settings, batch_size, todo, rank)
        barrier(world)
        if rank == 0:
            rows = read_rows(out, name)
            rows = [rows[p["id"]] for p in problems]
            correct = grade.grade_all(problems, [row["response"] for row in rows], allow_code, progress=True)
            data.drop_torn_line(file)
            append(file, {**point_of(model, problems, rows, correct, settings, label, batch_size),
                          "key": keys[-1], "provenance": facts})
        barrier(world)
    for shard in out.glob("rows-*.jsonl") if rank == 0 else ():
        if shard.name.split(".")[0][5:] in keys:
            shard.unlink()
    points = {p["key"]: p for p in data.read_jsonl(out / "results.jsonl", tolerant=True)}
    return [points[key] for key in keys]


# ---------------------------------------------------------------------------------------------------- reports
def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def provenance(**facts):
    """What a number needs to be traced and made again; facts: of the model, the data, the protocol."""
    def git(*args):
        run = subprocess.run(["git", *args], capture_output=True, text=True, cwd=nt_model.HERE)
        return run.stdout.strip() if run.returncode == 0 else None

    return dict(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), commit=git("rev-parse", "HEAD"),
                dirty=bool(git("status", "--porcelain", "--untracked-files=no")),
                transformers=version("transformers"), python=platform.python_version(),
                **{"torch": torch.__version__, "device": device_name(), **facts})


def report(curves, out):
    """curves: [(label, points), ...]. Prints the table; writes results.jsonl and curve.png into `out`."""
    out = Path(out)
    write_results(curves, out)
    print(table(curves))
    plot({"accuracy against parallelism": curves}, out / "curve.png")
    print(f"written: {out / 'results.jsonl'}, {out / 'curve.png'}")


def write_results(curves, out):
    """results.jsonl, a line per point: written under another name and renamed, so whole or absent."""
    out.mkdir(parents=True, exist_ok=True)
    facts = provenance()
    lines = [json.dumps({**point, "provenance": facts}) for _, points in curves for point in points]
    nt_model.write_whole(out / "results.jsonl", "\n".join(lines) + "\n")


def area_of(points, y_max):
    """AUP of a curve's points, without the warning; NaN where nobody solves anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return aup([(tpf(p), accuracy(p)[0]) for p in points], y_max) if y_max > 0 else math.nan


def table(curves, y_max=None):
    """curves: [(label, points), ...]; y_max in percent [the best accuracy among them] -> text."""
    y_max = best_accuracy(curves) if y_max is None else y_max
    lines = [f"{'model':<10} {'decoding rule':<22} {'accuracy %':>13} {'TPF':>6} {'forwards':>9} "
             f"{'tok/s':>8} {'s/sample':>9} {'ms/forward':>10}"]
    for label, points in curves:
        for p in points:
            acc, se = accuracy(p)
            lines.append(f"{label:<10} {p['rule']:<22} {acc:6.1f} +- {se:3.1f} {tpf(p):6.2f} "
                         f"{np.mean(p['nfe']):9.1f} {sum(p['tokens']) / p['seconds']:8.1f} "
                         f"{p['seconds'] / len(p['correct']):9.4f} {p.get('ms_per_forward', math.nan):10.2f}")
    for label, points in curves:
        lines.append(f"AUP {label}: {area_of(points, y_max):.1f}   "
                     f"(y_max {y_max:.1f}, {len(points[0]['correct'])} problems)")
    where = sorted({f"{p['device']}, {p['dtype']}, batch {p['batch_size']}"
                    + (f" on each of {p['ranks']} ranks" if p["ranks"] > 1 else "")
                    + f", up to {p['settings'].get('gen_len', 256)} tokens"
                    for _, points in curves for p in points if "device" in p})
    return "\n".join(lines + [f"speed: {place}" for place in where])


def plot(panels, path):
    """panels: {title: curves}, side by side; in each one line per model: accuracy (with standard errors)
    against TPF.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {path}: drawing needs matplotlib (pip install 'nanotraj[plot]')")
        return
    fig, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.2), dpi=140, sharey=True,
                             squeeze=False)
    for ax, (title, curves) in zip(axes[0], panels.items()):
        for label, points in curves:
            points = sorted(points, key=tpf)
            ys = [accuracy(p) for p in points]
            ax.errorbar([tpf(p) for p in points], [y for y, _ in ys], [e for _, e in ys], label=label,
                        marker="o", markersize=4, capsize=2, linewidth=1.5)
        ax.set_xlabel("tokens per forward (TPF)")
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy, %")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, -1].legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def compare_caches(model, tok, problems, rule, batch_size=64, allow_code=False):
    """How approximate each cache is: a table of accuracy, forwards, the share of problems with an unchanged
    response, and order agreement (the share of positions revealed by the same forward), against cache none.
    """
    caches = ["none", "prefix", "dual", "vicinity"] + ["exact"] * bool(model.cfg.block_len)
    outs = {}
    lines = ["| cache | accuracy, % | forwards | TPF | same response, % | order agreement, % |",
             "|---|---|---|---|---|---|"]
    for cache in caches:
        settings = {**rule, "cache": cache, "progress": True}
        outs[cache], n, _, correct, _ = decode_and_grade(model, tok, problems, settings, batch_size,
                                                         allow_code)
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
    """TDS of a model on trajectories -> its mean over the steps, and that of every step (T,); nats^2."""
    model = for_decoding(model.eval())
    rows = [tds(model, r) for r in tqdm(records, unit="trajectory", desc=f"TDS {label}")]
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        grid[i, :len(row)] = row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NaN where no trajectory has two masks left
        curve = np.nanmean(grid, 0)  # Eq. 11
        return float(np.nanmean(curve)), curve


def report_tds(models, records, out):
    """Mean TDS of each (label, model) on the same trajectories: printed, and drawn per step as tds.png."""
    curves = {}
    for label, model in models:
        mean, curves[label] = mean_tds(model, records, label)
        print(f"TDS {label}: {mean:.4f} nats^2, mean over the steps of {len(records)} trajectories")
    Path(out).mkdir(parents=True, exist_ok=True)
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
PAIRED = COLUMNS[:6]  # whose differences from the control are printed


def read_runs(folders):
    """results.jsonl of every folder -> {label: [points of run 1, points of run 2, ...]}. Runs of one number
    must have the same problems under every label; a label with a single run has those of all.
    """
    runs = {}
    for folder in folders:
        by_label = {}
        for point in data.read_jsonl(Path(folder) / "results.jsonl", tolerant=True):
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
        row["AUP"] = aup(pairs, y_max) if y_max > 0 else np.nan
    return np.array(list(row.values()), dtype=float)


def compare(runs, base, control, n_boot=1000, seed=0, y_max=None):
    """Table of every label's mean over runs and, paired, its ratio to base and difference from control.

    Intervals are 95% bootstrap percentiles, in the table half their width. A replicate draws problems (the
    same for every model) and, for models with several runs, run numbers (the same for every such model).
    Where every run has problems of its own, that counts their spread twice: the intervals are then too wide.
    """
    y_max = y_max or best_accuracy([(None, filter(on_curve, points))
                                    for rs in runs.values() for points in rs])
    sets = {tuple(points[0]["ids"]) for rs in runs.values() for points in rs}
    draws = {label: [] for label in runs}
    for b in tqdm(range(n_boot + 1), unit="replicate", desc="bootstrap"):
        rng = np.random.default_rng([seed, b])
        picks = {ids: rng.integers(len(ids), size=len(ids)) if b else slice(None) for ids in sorted(sets)}
        for label, rs in runs.items():
            turn = np.random.default_rng([seed, b, 1])  # the same runs of every label
            which = turn.integers(len(rs), size=len(rs)) if b else range(len(rs))
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
            for j, name in enumerate(PAIRED):
                d = draws[label][:, j] - draws[control][:, j]
                if np.isnan(d).any():  # the protocol lacks this rule
                    continue
                spread = d[1:].std()
                lines.append(f"{name}, {label} - {control}: {text(d)}"
                             + (f", {d[0] / spread:.1f} standard errors" if spread else ""))
    return "\n".join(lines)


def pooled(rs, keep):
    """The points of a label's runs as one: every point with the problems of all runs, run after run."""
    return [{**p, **{k: sum((run[i][k] for run in rs), []) for k in ("correct", "tokens", "nfe")}}
            for i, p in enumerate(rs[0]) if keep(p)]


def report_comparison(folders, base, control, out, y_max=None):
    """Print the table of several result folders, write compare.md and compare.png into `out`. A label with a
    colon ("TAD: near only") is an ablation: in the table, not in the picture.
    """
    runs, out = read_runs(folders), Path(out)
    if base not in runs:
        raise UserError(f"no run is labelled {base!r} (--base): there are {', '.join(runs)}")
    out.mkdir(parents=True, exist_ok=True)
    text = compare(runs, base, control, y_max=y_max)
    (out / "compare.md").write_text(text + "\n")
    rules = {"thresholds, and token by token": on_curve,
             "a fixed number of tokens per forward": lambda p: p["rule"].endswith("per forward")}
    panels = {title: [(label, pooled(rs, keep)) for label, rs in runs.items() if ":" not in label]
              for title, keep in rules.items()}
    plot({title: curves for title, curves in panels.items() if all(len(points) > 1 for _, points in curves)},
         out / "compare.png")
    print(f"{text}\nwritten: {out / 'compare.md'}, {out / 'compare.png'}")


# ----------------------------------------------------------------------- published numbers, for the same task
def published(task, family):
    """The papers' rows for a benchmark and a model family -> [{method, model, source, setting, made_by, and
    acc, tpf, aup, tok_s where the table has them}]. They are from published.json, nothing in it was run here.
    """
    rows = []
    for t in nt_model.read_json(nt_model.HERE / "published.json"):
        columns = [(i, c.split()[1]) for i, c in enumerate(t["columns"], 1) if c.split()[0] == task]
        if t["family"] == family and columns:
            about = {k: t[k] for k in ("model", "source", "setting", "made_by")}
            rows += [dict(about, method=row[0], **{k: row[i] for i, k in columns if row[i] is not None})
                     for row in t["rows"]]
    return rows


def published_text(task, family, protocol, made_with):
    """The rows to stand beside a run of this protocol made with own | lm_eval; "" if none."""
    rows = [r for r in published(known_task(task), family) if "acc" in r]
    if not rows:
        return ""
    lines = [f"published, not run here ({known_task(task)}):",
             f"{'method':<40} {'accuracy %':>10} {'TPF':>6} {'AUP':>6} {'tok/s':>7}  model, source"]
    for r in rows:
        cells = [f"{r[k]:.{d}f}" if k in r else "-"
                 for k, d in (("acc", 2), ("tpf", 2), ("aup", 1), ("tok_s", 1))]
        lines.append("{:<40} {:>10} {:>6} {:>6} {:>7}".format(r["method"], *cells)
                     + f"  {r['model']}, {r['source']}")
    for *made_by, source, setting in dict.fromkeys((*r["made_by"], r["source"], r["setting"]) for r in rows):
        same = ("the same protocol, but for options given here," if made_by == [protocol, made_with] else
                "not the same protocol")
        lines.append(f"{same} as this run's ({protocol}, {made_with}): {source}: {setting}")
    return "\n".join(lines)


def contamination(task):
    """A warning where a benchmark and training data overlap, else ""."""
    known = data.contamination("prm12k", known_task(task) or "")
    return known and (f"warning: TAD and TABOM train on PRM12K. {known}. "
                      f"Report math500 (lm_eval: minerva_math500) instead")


def print_beside(tasks, family, protocol, made_with):
    """What belongs beside a run's numbers."""
    for task in tasks:
        for text in (contamination(task), published_text(task, family, protocol, made_with)):
            if text:
                print(text)


# ---------------------------------------------------------------------------------------------------- lm_eval
def harness():
    """The package lm_eval, an optional extra."""
    try:
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError:
        raise UserError("this needs lm_eval: pip install 'nanotraj[eval]'") from None
    return lm_eval


class Rendered(str):
    """A chat as lm_eval passes it on: its text, and the pieces that say which special tokens in it are real.
    Everything else that looks like one is text.
    """
    pieces = ()


def render(chat, turns, answer=""):
    """[(role, text), ...] in a family's template -> Rendered. answer: how the reply already begins."""
    if chat.system and turns[0][0] != "system":
        turns = [("system", chat.system), *turns]
    if len(turns) > 1 and "{role}" not in chat.turn:
        raise UserError("the tiny model's template has a single turn: use --no-fewshot_as_multiturn, and no "
                        "system text")
    pieces = data.turn_pieces(chat, turns)
    if answer:
        last, special = pieces[-1]
        pieces = [*pieces[:-1], (last + answer, False)] if not special else [*pieces, (answer, False)]
    text = Rendered("".join(piece for piece, _ in pieces))
    text.pieces = pieces
    return text


def context_id(context):
    return hashlib.sha256(context.encode()).hexdigest()


def cut(text, until):
    """The text before the first of the stop strings."""
    stops = [until] if isinstance(until, str) else until or []
    return text[:min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def lm(model, tok, settings, batch_size=32, out=None, rank=0, world=1):
    """The model as an lm_eval LM for generative tasks: simple_evaluate(model=lm(...), tasks=[...]).

    settings: of a protocol and a rule; they win over what a task asks for (lm.asked: max_gen_toks ...).
    out: folder that finished responses are kept in, so that the same call continues; needed by several ranks.
    lm.rows: {context_id-repeat: row}, see decode_rows.

    Under torchrun every rank sees all requests, as lm_eval's rank 0 of 1, and decodes its share of them: were
    lm_eval to split the documents itself, their random few-shots would hang on the number of ranks.
    """
    LM = harness().api.model.LM

    class MaskedDiffusion(LM):
        tokenizer_name = f"nanotraj-{model.cfg.family}"

        def __init__(self):
            super().__init__()
            self.rows, self.chats, self.asked = {}, False, set()

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            self.chats = True
            turns = [(m["role"], m["content"]) for m in chat_history]
            return render(tok.chat, *((turns,) if add_generation_prompt else (turns[:-1], turns[-1][1])))

        def prompt_ids(self, context):
            if self.chats and not isinstance(context, Rendered):
                raise UserError(f"a task changed its rendered chat, so that its special tokens are lost: "
                                f"{context[-60:]!r}; run it without --apply_chat_template")
            return tok.ids_of(context.pieces if self.chats else [(context, False)])

        def generate_until(self, requests):
            ids, seen = [], Counter()
            for r in requests:
                context = context_id(r.args[0])  # a prompt that comes again is decoded again only if sampled
                ids.append(f"{context}-{seen[context] if settings.get('temperature') else 0}")
                seen[context] += 1
                self.asked |= {f"{k} {r.args[1][k]}" for k in ("max_gen_toks", "temperature", "top_p")
                               if r.args[1].get(k)}
            done = read_rows(out, "responses") if out else {}
            todo = {i: r.args[0] for i, r in zip(ids, requests) if i not in done}
            mine = list(todo)[rank::world]
            prompts = [self.prompt_ids(todo[i]) for i in mine]
            streams = [int(i[:8], 16) + int(i.split("-")[1]) for i in mine]  # the same on any rank
            barrier(world)  # all have read what there is
            if out:
                finish_rows(model, tok, prompts, mine, out, "responses", settings, batch_size, streams, rank)
                barrier(world)
                done = read_rows(out, "responses")
            else:
                rows = decode_rows(model, tok, prompts, settings, batch_size, streams, progress=True)
                done = {mine[i]: row for i, _, row in rows}
            self.rows.update((i, done[i]) for i in ids)
            return [cut(self.rows[i]["response"], r.args[1].get("until")) for i, r in zip(ids, requests)]

        def loglikelihood(self, requests):
            raise UserError("a masked diffusion model has no exact log-likelihoods: choose generative tasks "
                            "(output_type generate_until)")

        loglikelihood_rolling = loglikelihood

    return MaskedDiffusion()


def load_tasks(names, include_path, allow_code):
    """Names of lm_eval's tasks, groups or tags, or YAML files -> its tasks, and its manager."""
    own = all(map(os.path.isfile, names))  # then its thousands need not be read
    manager = harness().tasks.TaskManager(include_path=include_path, include_defaults=not own)
    unknown = [n for n in names if n not in manager.all_tasks and not os.path.isfile(n)]
    if unknown:
        raise UserError(f"lm_eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them, "
                        f"--include_path adds a directory of your own")
    try:
        loaded = manager.load(names)
    except Exception as e:  # a hub that cannot be reached, a package the task needs, a broken YAML
        why = next((line.strip() for line in str(e).splitlines() if re.search(r"\w", line)), "no message")
        raise UserError(f"lm_eval cannot load {', '.join(names)} ({type(e).__name__}: {why})") from None
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE != "generate_until":
            raise UserError(f"task {name} asks for {task.OUTPUT_TYPE}, not for text: a masked diffusion "
                            f"model has no exact log-likelihoods")
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise UserError(f"task {name} runs the model's code, in this process: `eval.py curve --task "
                            f"humaneval` contains it; --allow_code_execution insists")
    groups = [g for name, g in loaded["groups"].items() if name in names]
    inside = {name for g in groups for name in (t.task_name for t in g.get_all_tasks())}
    return groups + [t for name, t in loaded["tasks"].items() if name not in inside], manager


def evaluate_tasks(args, model, tok, protocol, label, config, rank, world):
    """`eval.py lm_eval`: -> lm_eval.json and samples-<task>.jsonl in the folder, and the scores in print."""
    out = Path(args.out or f"out/lm_eval-{label}-{'-'.join(Path(t).stem for t in args.tasks)[:60]}")
    tasks, manager = load_tasks(args.tasks, args.include_path, args.allow_code_execution)
    open_folder(out, config, rank)
    settings = {**protocol, **protocol["rules"][0]}
    bridge = lm(model.eval(), tok, settings, args.batch_size, out, rank, world)
    results = harness().simple_evaluate(
        model=bridge, tasks=tasks, task_manager=manager, num_fewshot=args.num_fewshot, limit=args.limit,
        apply_chat_template=args.apply_chat_template, system_instruction=args.system_instruction,
        fewshot_as_multiturn=args.fewshot_as_multiturn, confirm_run_unsafe_code=args.allow_code_execution)
    if rank > 0:
        return
    samples, _ = results.pop("samples"), results.pop("pretty_env_info", None)
    for name, rows in samples.items():
        for row in rows:
            first = bridge.rows[context_id(row["arguments"][0][0]) + "-0"]
            row["tokens"], row["nfe"] = first["tokens"], first["nfe"]
        rows.sort(key=lambda row: (row["doc_id"], row["filter"]))
        lines = [json.dumps(row, default=str) + "\n" for row in rows]
        nt_model.write_whole(out / f"samples-{name}.jsonl", "".join(lines))
    tokens, nfe = (sum(row[k] for row in bridge.rows.values()) for k in ("tokens", "nfe"))
    seconds = wall_seconds(bridge.rows.values())
    speed = dict(tokens=tokens, nfe=nfe, tpf=tokens / nfe, seconds=seconds, tok_per_s=tokens / seconds)
    facts = provenance(**config)
    nt_model.write_whole(out / "lm_eval.json",
                json.dumps(dict(results, speed=speed, provenance=facts), indent=1, default=str) + "\n")
    print(harness().utils.make_table(results))
    print(f"{rule_name(settings)}: TPF {tokens / nfe:.2f}, {tokens / seconds:.1f} tok/s over "
          f"{len(bridge.rows)} prompts (batch {args.batch_size}, {world} rank(s), up to "
          f"{settings['gen_len']} tokens)")
    if bridge.asked:
        print(f"the tasks ask for {', '.join(sorted(bridge.asked))}; the protocol decides: gen_len "
              f"{settings['gen_len']}, temperature {settings.get('temperature', 0.0)}")
    print_beside(list(samples), model.cfg.family, args.protocol, "lm_eval")
    print(f"written: {out / 'lm_eval.json'}, {out / 'samples-*.jsonl'}")


# ----------------------------------------------------------------------------------------------- command line
def print_protocols():
    """Every protocol, for each family and task that it tells apart."""
    def show(name, entry, indent="  "):
        inner = {k: entry[k] for k in ("family", "task") if k in entry}
        fixed = {k: v for k, v in entry.items() if k not in ("rules", *inner)}
        print(f"{indent}{name}: " + " ".join(f"{k}={v}" for k, v in fixed.items()))
        for i, rule in enumerate(entry.get("rules", [])):
            print(f"{indent}    point {i}: " + " ".join(f"{k}={v}" for k, v in rule.items()))
        for options in inner.values():
            for key, value in options.items():
                show(key, value, indent + "  ")
    print("settings of sample.Decoding (python sample.py --help explains them); point 0 is the paper's own")
    for name, entry in PROTOCOLS.items():
        show(name, entry)


def parser():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="what", required=True)
    sub.add_parser("protocols", help="print the decoding settings behind --protocol")
    c = sub.add_parser("curve", help="accuracy and TPF of one model over the rules of a protocol")
    c.add_argument("--y_max", type=float, help="of AUP, percent [the best accuracy of this curve]")
    e = sub.add_parser("lm_eval", help="tasks of lm_eval (extra `eval`), with the first rule of a protocol")
    e.add_argument("--tasks", required=True, type=lambda s: s.split(","),
                   help="lm_eval's names or YAML files, with commas")
    e.add_argument("--include_path", help="directory with task YAMLs of your own")
    e.add_argument("--num_fewshot", type=int, help="instead of the task's")
    e.add_argument("--limit", type=int, help="only the first problems of each task")
    e.add_argument("--apply_chat_template", action="store_true", help="one chat per problem, not plain text")
    e.add_argument("--fewshot_as_multiturn", action=argparse.BooleanOptionalAction, default=True,
                   help="with a chat template: few-shots are turns of their own [yes]")
    e.add_argument("--system_instruction", help="system text")
    for p in (c, e):
        p.add_argument("--protocol", choices=list(PROTOCOLS), help="[tiny for the tiny model, or thresholds]")
        p.add_argument("--points", type=int, nargs="+",
                       help="which points of the protocol, from 0 [curve: all; lm_eval: 0]")
        p.add_argument("--thresholds", type=float, nargs="+", help="the points, instead of the protocol's")
        p.add_argument("--cache", choices=["none", "prefix", "dual", "vicinity", "exact"],
                       help="instead of the protocol's")
        p.add_argument("--seed", type=int, default=0, help="of sampling, where the temperature is not 0 [0]")
        p.add_argument("--label", help="name in tables and plots; default: base, or the run's directory")
        p.add_argument("--out", help="directory of the results [out/eval-... or out/lm_eval-...]")
        p.add_argument("--allow_code_execution", action="store_true",
                       help="run the programs that the model writes (README: what contains them)")
    t = sub.add_parser("nll", help="an AR teacher's NLL of what each forward has revealed (TRIMS Fig. 7)")
    t.add_argument("--teacher", default="tiny-ar", help="hub id or directory of a causal LM")
    t.add_argument("--out", default="out", help="directory of trajectory_nll.png")
    d = sub.add_parser("tds", help="how much the entropies of masked tokens differ (TABOM Eq. 10, 11)")
    d.add_argument("--trajectories", required=True, help="folder that rollout or a method collected")
    d.add_argument("--n", type=int, default=64, help="how many of them [64]")
    d.add_argument("--out", default="out", help="directory of tds.png")
    k = sub.add_parser("caches", help="what each cache costs against cache none, at one threshold")
    k.add_argument("--allow_code_execution", action="store_true", help="as for curve")
    k.add_argument("--threshold", type=float, default=0.9, help="confidence; above 1: one token per forward")
    for p in (c, k, t):
        p.add_argument("--task", default="tiny", help="tiny, gsm8k, math500, humaneval, mbpp (data.py list "
                       "has all), or a .jsonl with prompt and answer [tiny]")
        p.add_argument("--split", default="test", choices=["train", "dev", "test"], help="of the task [test]")
        p.add_argument("--n", "--n_problems", type=int,  # torchrun takes --n for one of its own options
                       help="number of problems [500 of tiny, else all]")
    for p in (c, e, k, t, d):
        p.add_argument("--model", default="tiny", help="preset name, hub id or directory")
        p.add_argument("--revision", help="commit, branch or tag of a hub id")
        p.add_argument("--adapter", help="directory of a LoRA adapter")
    for p in (c, e, k, t):
        p.add_argument("--gen_len", type=int, help="response length, instead of the protocol's")
        p.add_argument("--block_len", type=int, help="block size, instead of the protocol's")
        p.add_argument("--batch_size", type=int, default=64, help="problems decoded at once, per rank [64]")
    m = sub.add_parser("compare", help="one table and one picture over several results folders")
    m.add_argument("folders", nargs="+")
    m.add_argument("--base", default="base", help="label the AUP ratios refer to")
    m.add_argument("--control", default="SFT", help="label the differences refer to")
    m.add_argument("--y_max", type=float, help="of AUP, percent [the best accuracy of all of them]")
    m.add_argument("--out", default="out/compare")
    return ap


def evaluate_curve(args, model, tok, problems, protocol, label, config, rank, world):
    """`eval.py curve`: -> results.jsonl, summary.json and curve.png in the folder, and the table in print."""
    task = re.sub(r"\W+", "-", Path(re.split("[=:]", args.task)[0]).stem)
    name = Path(args.model).name
    out = Path(args.out or f"out/eval-{label}-{name}-{task}-{args.protocol}-{args.split}-{len(problems)}")
    points = resumable_curve(model, tok, problems, protocol, label, out, config, args.batch_size, rank, world,
                             args.allow_code_execution)
    if rank > 0:
        return
    y_max = args.y_max or best_accuracy([(label, points)])
    print(table([(label, points)], y_max))
    plot({"accuracy against parallelism": [(label, points)]}, out / "curve.png")
    rows = [dict(rule=p["rule"], acc=accuracy(p)[0], se=accuracy(p)[1], tpf=tpf(p),
                 nfe=float(np.mean(p["nfe"])), tok_per_s=sum(p["tokens"]) / p["seconds"],
                 s_per_sample=p["seconds"] / len(problems), ms_per_forward=p["ms_per_forward"])
            for p in points]
    area = area_of(points, y_max)
    nt_model.write_whole(out / "summary.json", json.dumps(dict(
        label=label, task=args.task, protocol=args.protocol, n=len(problems), y_max=y_max, alpha=3.0,
        y_max_from="--y_max" if args.y_max else "the best of these points",
        aup=None if math.isnan(area) else area, points=rows), indent=1) + "\n")
    print_beside([args.task], model.cfg.family, args.protocol, "own")
    print(f"written: {out / 'results.jsonl'}, {out / 'summary.json'}, {out / 'curve.png'}")


def main():
    args = parser().parse_args()
    if args.what == "protocols":
        return print_protocols()
    for name in ("n", "batch_size", "limit", "y_max"):
        if getattr(args, name, None) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be above 0")
    if args.what == "compare":
        return report_comparison(args.folders, args.base, args.control, args.out, args.y_max)
    own = {k: getattr(args, k) for k in ("cache", "gen_len", "block_len", "seed")
           if getattr(args, k, None) is not None}
    family = nt_model.family_of(args.model, args.revision)
    usual = "tiny" if family == "tiny" else "thresholds"
    if args.what in ("nll", "caches"):
        plain = {k: v for k, v in protocol_of(usual, family, args.task, **own).items() if k != "rules"}
    if args.what in ("curve", "lm_eval"):
        args.protocol = args.protocol or usual
        tasks = [args.task] if args.what == "curve" else args.tasks
        protocol, *others = (protocol_of(args.protocol, family, task, **own) for task in tasks)
        if any(other != protocol for other in others):
            raise UserError(f"protocol {args.protocol} differs between these tasks: run them one at a time")
        protocol["rules"] = choose_rules(protocol["rules"], args)
        trained = Path(args.adapter or args.model).resolve()  # out/RUN/adapter or out/RUN/model
        label = args.label or (trained.parent.name if trained.is_dir() else "base")
    if args.what == "tds":
        records = data.read_trajectories(args.trajectories)[:args.n]
        if not records:
            raise UserError(f"{args.trajectories} holds no trajectory")
    elif args.what != "lm_eval":
        problems = data.load_problems(args.task, args.split, args.n or (500 if args.task == "tiny" else None))
        check_problems(problems, args)
    elif len(args.points or args.thresholds or [0]) > 1:
        raise UserError("lm_eval takes one point at a time: a single --points or --thresholds")
    rank, world = join_ranks()
    model = nt_model.load(args.model, *nt_model.default_device(), args.revision)
    tok = data.load_tokenizer(args.model, args.revision)
    if args.adapter:
        lora.load(model, args.adapter)
    if args.what == "tds":
        return report_tds([(args.adapter or args.model, model)], records, args.out)
    if args.what == "nll":
        teacher = nt_model.load_teacher(args.teacher, *nt_model.default_device())
        settings = {k: plain[k] for k in ("gen_len", "block_len", "cache")}
        teacher_tok = data.load_teacher_tokenizer(args.teacher)
        models = [(args.adapter or args.model, model)]
        return report_trajectory_nll(models, teacher, teacher_tok, tok, problems, settings, args.out)
    if args.what == "caches":
        rule = dict(plain, policy="threshold", threshold=args.threshold)
        print(compare_caches(model, tok, problems, rule, args.batch_size, args.allow_code_execution))
        return
    config = dict(made_of(args, model), protocol=args.protocol, batch_size=args.batch_size, label=label)
    if args.what == "curve":
        config.update(task=args.task, problems=digest(problems), **own)
        return evaluate_curve(args, model, tok, problems, protocol, label, config, rank, world)
    first = decoding_of({**protocol, **protocol["rules"][0]})
    config.update(chat=args.apply_chat_template, decoding=vars(first))
    evaluate_tasks(args, model, tok, protocol, label, config, rank, world)


def choose_rules(rules, args):
    """--points, --thresholds: which points of a protocol."""
    if args.points:
        if not all(0 <= i < len(rules) for i in args.points):
            raise UserError(f"--points {args.points}: protocol {args.protocol} has 0 to {len(rules) - 1}")
        rules = [rules[i] for i in args.points]
    if args.thresholds:
        takes = [rule for rule in rules if "threshold" in rule]
        if not takes:
            raise UserError(f"--thresholds: no chosen point of protocol {args.protocol} has one")
        if not all(math.isfinite(t) and t >= 0 for t in args.thresholds):
            raise UserError(f"--thresholds {args.thresholds}: finite numbers from 0 on")
        rules = [{**takes[0], "threshold": t} for t in dict.fromkeys(args.thresholds)]
    return rules


def check_problems(problems, args):
    """Before anything is loaded or decoded."""
    if not problems:
        raise UserError(f"{args.task} has no problem to evaluate")
    for p in problems if args.what in ("curve", "caches") else ():
        grade.check_gradable(p, args.allow_code_execution)


if __name__ == "__main__":
    run_cli(main)
