"""Evaluation: accuracy against tokens per forward (TPF), as curves over decoding settings.
    python eval.py curve --adapter out/tad-tiny/adapter --label TAD --n 500      # without --adapter: the base
    torchrun --nproc_per_node=8 eval.py curve --model llada --task gsm8k --protocol tad     # or my.jsonl"""
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

import cli  # first
import numpy as np
import torch

import data
import grade
import model as nt_model
import recipes
import sample
from cli import UserError, append_line, option, read_jsonl, run_cli, write_whole
from layers import for_decoding
from run import agreed, ranks, read_shards
from sample import AdaptedModel, load_both
from teacher import check_length, load_teacher, load_teacher_tokenizer, token_nll

PROTOCOLS = tomllib.loads(cli.read_text(nt_model.HERE / "assets/protocols.toml"))  # see there
for _name, _settings in PROTOCOLS.items():
    if "like" in _settings:
        PROTOCOLS[_name] = PROTOCOLS[_settings.pop("like")] | _settings
Y_MAX = cli.read_object(nt_model.HERE / "assets/aup_points.json")["y_max"]  # {family: {task: percent}}
COUNTS = ("correct", "tokens", "nfe")  # per problem
ANCHOR = dict(policy="entropy", threshold=0.0, name="TPF 1")  # token by token
METHODS = "TAD|T3D|TABOM|TRIMS|SFT|SFT-SD|SFT-SD privileged|Naive TD|dInfer|".split("|")
COLORS = {"base": "black"} | {name: f"C{i}" for i, name in enumerate(METHODS)}  # of the longest in a label


def protocol_of(name, family, task="", points=None, thresholds=None, **own):
    """PROTOCOLS[name] for a family and a task, under `own` settings; `rules`: its points, or `thresholds`."""
    chosen = {}
    for part in (name, f"{name}/{family}", f"{name}/{family}/{known_task(task)}"):
        chosen |= PROTOCOLS.get(part, {})
    rules = chosen.pop("rules", []) + [dict(threshold=value) for value in chosen.pop("thresholds", ())]
    if not rules:
        others = sorted({key.split("/")[1] for key in PROTOCOLS if key.startswith(f"{name}/")})
        raise UserError(f"protocol {name} has no settings for family {family}: it is for {', '.join(others)}")
    anchored = chosen.pop("anchor", False) and not {"policy", "threshold"} & own.keys()
    for given in own:  # a name tells what its rule says
        rules = [{k: r[k] for k in r if given not in r or k not in (given, "name")} for r in rules]
    rules += [ANCHOR] * anchored
    if points:
        if max(points) >= len(rules):
            raise UserError(f"--points {points}: protocol {name} has 0 to {len(rules) - 1}")
        rules = [rules[i] for i in points]
    if thresholds:
        policy = sample.POLICIES[own.get("policy", "threshold")]
        if "threshold" not in policy.reads or not any("threshold" in rule for rule in rules):
            raise UserError(f"--thresholds: no chosen point of protocol {name} has one")
        rules = [dict(threshold=value) for value in thresholds]
    rules = {rule_name(chosen | own | rule): rule for rule in rules}  # what is out of range is refused
    return chosen | own | {"rules": [*rules.values()]}


def decoding_of(settings):
    others = "compiled rules name prompt".split()
    return sample.Decoding(**{k: settings[k] for k in settings if k not in others})


def wording(problem, protocol):
    """The user turn of a problem under a protocol: text."""
    template = protocol.get("prompt", "{prompt}")
    return re.sub(r"{(question|prompt)}", lambda m: problem.get(m[1], problem["prompt"]), template)


def known_task(task):
    """A task's name here or in lm_eval -> its benchmark's in PROTOCOLS, or None."""
    names = "gsm8k|math|math500|humaneval|mbpp|ifeval"
    known = re.match(f"(?:minerva_)?({names})(_cot|_cot_zeroshot|_instruct|_boxed)?([=:]|$)", task)
    return known and known[1]


def area_of(pairs, y_max):
    """AUP (docs/evaluation.md) of [(tpf, accuracy), ...], in percent; NaN of no points and where all fail."""
    if not pairs or y_max <= 0:
        return math.nan
    x, y = np.array(sorted(pairs)).T
    kept = y >= y[0] - 5
    x, y = x[kept], y[kept]
    weighted = y * np.minimum(np.exp(-3 * (1 - y / y_max)), 1)
    return float(x[0] * y[0] + np.trapezoid(weighted, x))


def accuracy(point):
    """Accuracy and its binomial standard error, both in percent."""
    p = float(np.mean(point["correct"]))
    return 100 * p, 100 * math.sqrt(p * (1 - p) / len(point["correct"]))


def tpf(point):
    return np.sum(point["tokens"]) / np.sum(point["nfe"])


def rho(point):
    """TPF as AUP takes it: the published curves write 1 for their token-by-token run."""
    return 1.0 if point["rule"] == ANCHOR["name"] else tpf(point)


def anchor_warning(curves):
    """A line that names the curves without a point near TPF 1, whose AUP is no published one; or ''."""
    labels = ", ".join(dict.fromkeys(label for label, kept in curves if min(map(rho, kept), default=1) > 1.1))
    return labels and (f"warning: the curve of {labels} has no token-by-token point, with which published "
                       f"ones begin: its AUP is overrated\n")


def rule_name(settings):
    s = decoding_of(settings)
    name = f"{s.block_len / s.steps if s.steps else s.per_step:g} per forward"  # dream has one block
    if s.policy not in ("static", "dream"):
        name = re.sub(r"\.0$", "", f"{s.policy} {s.threshold}")  # exact: of rules of one name one is left
    return settings.get("name", name)


def decode_rows(model, tok, prompts, settings, batch_size, streams=None, progress=False):
    """Decode prompts (list of (P,) int64) and yield (prompt index, row) as they finish."""
    if not prompts:
        return
    began, forwards = time.perf_counter(), 0
    batch = sample.Batch(model, prompts, decoding_of(settings), batch_size, streams, settings.get("compiled"))
    for i, out in sample.decode(batch, progress):
        now = time.perf_counter()  # time and forwards: of the batch since the row before, up to its end
        spent = dict(seconds=now - began, forwards=batch.forwards - forwards)
        yield i, sample.response_of(out, tok, model.cfg.eos_ids) | spent
        began, forwards = time.perf_counter(), batch.forwards


def wall_seconds(rows):
    """Of decoding: the ranks, a shard of rows each, decode at the same time."""
    shards = Counter()
    for row in rows:
        shards[row.get("shard")] += row["seconds"]
    return max(shards.values())


def decode_by_id(model, tok, prompts, settings, batch_size, kept, name):
    """Prompts {id: (P,) int64} -> {id: row of decode_rows} of all ranks; shards `name` of kept hold them."""
    done = kept.rows(name) if kept else {}
    left = [i for i in prompts if i not in done]
    if kept:  # what the clock must not see: where something is compiled, a batch of the shapes to come
        left = left[kept.rank::kept.world]
        n = batch_size if settings.get("compiled") or model.embed.weight.is_cuda else 1
        longest = sorted(map(prompts.get, left), key=len)[-n:]
        list(decode_rows(model, tok, longest, settings, batch_size))
    work = list(map(prompts.get, left))
    streams = [zlib.crc32(i.encode()) for i in left]  # of random numbers, the same on any rank
    for number, row in decode_rows(model, tok, work, settings, batch_size, streams, progress=True):
        done[left[number]] = row
        if kept:
            append_line(kept.out / f"{name}.rank{kept.rank}.jsonl", dict(id=left[number], **row))
    return kept.rows(name) if kept else done


def curve(model, tok, problems, protocol, label, batch_size=64, allow_code=False, kept=None):
    """Decode and grade under each rule of a protocol -> points; kept: a Kept folder, which gets them."""
    model.eval()
    points = []
    prompts = {p["id"]: tok.prompt_ids(p | dict(prompt=wording(p, protocol))) for p in problems}
    for rule in cli.progress_bar(protocol["rules"], f"evaluate {label}"):
        settings = protocol | rule
        settings |= vars(decoding_of(settings))
        del settings["rules"]
        key = kept and digest([kept.config, settings])
        if kept and key in kept.points:
            points.append(kept.points[key])
            continue
        rows = decode_by_id(model, tok, prompts, settings, batch_size, kept, f"rows-{key}")
        if kept and kept.rank:
            continue
        rows = list(map(rows.get, prompts))
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        correct = grade.grade_all(problems, columns["response"], allow_code)
        point = dict(
            label=label, rule=rule_name(settings), settings=settings,
            ids=list(prompts), correct=list(map(int, correct)), tokens=columns["tokens"],
            nfe=columns["nfe"], responses=columns["response"], seconds=wall_seconds(rows),
            ms_per_forward=1000 * sum(columns["seconds"]) / sum(columns["forwards"]),
            device=device_name(), dtype=str(model.embed.weight.dtype)[6:], batch_size=batch_size,
            ranks=len({row.get("shard") for row in rows}))
        if kept:
            point.update(key=key, provenance=provenance(**kept.config))
            append_line(kept.results, point)
            for shard in kept.out.glob(f"rows-{key}.*"):
                shard.unlink()
        points.append(point)
    return points


class Kept:
    """A folder of results of one config: all that they depend on but the decoding rule; ranks share it."""
    def __init__(self, out, config):
        self.out, self.config = Path(out), config
        self.rank, self.world = ranks()
        if self.world > 1:  # the ranks only exchange words, so gloo does on GPUs too; 7 days: of waiting
            torch.distributed.init_process_group("gloo", None, timedelta(7), self.world, self.rank)
        self.results, file = self.out / "results.jsonl", self.out / "config.json"
        then = cli.read_object(file) if file.exists() or self.results.exists() else config
        differ = ", ".join(k for k in config | then if config.get(k) != then.get(k))
        if differ:
            raise UserError(f"{out} holds results already, of another run ({differ} differ): choose another "
                            f"--out or remove it")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock, rows = cli.lock(self.out / f"lock-{self.rank}"), []
        if self.rank == 0:
            write_whole(file, json.dumps(config, indent=1) + "\n")
            rows = read_jsonl(self.results, True, True, sealed=True, key=str) if self.results.exists() else []
        self.points = agreed({row["key"]: row for row in rows})  # key: a hash of all that it depends on

    def rows(self, name):
        """{id: row} of the shards that all ranks wrote under a name, when all have come here."""
        return read_shards(self.out, f"{name}.rank*.jsonl", "id", self.rank, self.world, seconds=float)


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def versions(*packages):
    """{package: its version, or None where it is not installed}."""
    return {name: next((found.version for found in metadata.distributions(name=name)), None)
            for name in packages}


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def made_of(args, model, **others):
    """What results depend on but for the decoding rule. Files of a hub id are what its revision says."""
    return dict(
        model=str(args.model), revision=model.revision,
        weights=nt_model.local_weights(args.model), adapter=nt_model.local_weights(args.adapter),
        dtype=str(model.embed.weight.dtype)[6:], device=device_name(),
        label=args.label, protocol=args.protocol, batch_size=args.batch_size,
        **versions("torch", "math-verify", "lm_eval"), **others)


def provenance(**facts):
    """What a number needs to be traced and made again; facts: of the model, the data, the protocol."""
    describe = "git describe --always --dirty --abbrev=40 --exclude='*'"
    done = subprocess.run(describe, shell=True, capture_output=True, text=True, cwd=nt_model.HERE)
    return dict(
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        commit=done.stdout.strip() or None,  # "-dirty" behind it: with changes of one's own
        python=platform.python_version(),
        **{"device": device_name()} | versions("torch", "transformers") | facts)


def write_results(curves, out, task=""):
    out.mkdir(parents=True, exist_ok=True)
    facts = provenance(task=task)
    lines = [cli.line_of(point | {"provenance": facts}) for _, points in curves for point in points]
    write_whole(out / "results.jsonl", "".join(lines))


def read_points(source):
    """The points of a folder and those in it, or of a file that pack() wrote, which names their folders."""
    source, rows = Path(source), []
    for file in [source] if source.is_file() else sorted(source.rglob("results.jsonl")):
        if not re.search(r"(^|/)overwritten-\d+/", str(file.relative_to(source))):  # by --overwrite
            rows += read_jsonl(file, True, sealed=True, label=str, rule=str)
    if not rows:
        raise UserError(f"{source} has no results: make them, or correct the path")
    for row in rows:
        row["task"] = row.get("provenance", {}).get("task", "")
        row.setdefault("folder", f"{source.name} {row['task']}")
    return rows


def show(curves, out):
    """Print a table of curves and draw them as curve.png; y_max of AUP is the best accuracy here."""
    y_max = max(accuracy(point)[0] for _, points in curves for point in points)
    print("model      decoding rule             accuracy %    TPF  forwards    tok/s  s/sample ms/forward")
    for label, points in curves:
        for point in points:
            acc, error = accuracy(point)
            n, seconds = len(point["correct"]), point["seconds"]
            print(f"{label:<10} {point['rule']:<22} {acc:6.1f} +- {error:3.1f} {tpf(point):6.2f} "
                  f"{sum(point['nfe']) / n:9.1f} {sum(point['tokens']) / seconds:8.1f} {seconds / n:9.4f} "
                  f"{point['ms_per_forward']:10.2f}")
    for label, points in curves:
        area = area_of([(rho(p), accuracy(p)[0]) for p in points], y_max)
        print(f"AUP {label}: {area:.1f}   (y_max {y_max:.1f}, {len(points[0]['correct'])} problems)")
    place = "speed: {device}, {dtype}, batch {batch_size}, {ranks} rank(s), up to {settings[gen_len]} tokens"
    places = {place.format(**point) for _, points in curves for point in points}
    print(anchor_warning(curves) + "\n".join(sorted(places)))
    plot({"accuracy against parallelism": curves}, out / "curve.png")


def draw(panels, x, y, path):
    """panels: {title: {label: [(x, y) or (x, y, error)]}}, side by side -> a PNG. No y: one per panel."""
    try:
        os.environ["MPLBACKEND"] = "agg"  # no window, and not a notebook's
        from matplotlib import pyplot as plt  # slow to import
    except ImportError:
        print(f"no {path}: drawing needs matplotlib: pip install matplotlib")
        return
    plt.rcParams["text.parse_math"] = False  # a $ in a label is one
    fig, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels) + 1.8, 4.2), dpi=140,
                             sharey=bool(y), squeeze=False, layout="constrained")
    for ax, (title, lines) in zip(axes[0], panels.items()):
        used = Counter()
        for label, points in lines.items():
            name = max((name for name in COLORS if name.lower() in label.lower()), key=len)
            n = used[name]
            color = COLORS[name] if name else plt.cm.Dark2(n % 7)
            used[name] += 1
            xs, ys, *errors = zip(*points)
            ax.errorbar(xs, ys, *errors, label=data.whole(label), color=color, marker="o", capsize=2,
                        linestyle="- -- : -.".split()[n % 4], markersize=4 if errors else 2)
        ax.set(xlabel=x, title=title, ylim=(0, None))
        ax.grid(alpha=0.3)
    axes[0, 0].set(ylabel=y)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    fig.savefig(path)
    plt.close(fig)
    print(f"written: {path}")


def plot(panels, path):
    """panels: {title: curves}; a line per model: accuracy, with standard errors, against TPF."""
    drawn = {title: {label: [(rho(p), *accuracy(p)) for p in sorted(points, key=rho)]
                     for label, points in curves}
             for title, curves in panels.items()}
    draw(drawn, "tokens per forward (TPF)", "accuracy, %", path)


def closing(r, model, tok, label):
    """The curves of base and trained model on an embedded task."""
    if r.rank or not r.evaluates:
        return
    problems = data.load_problems(r.cfg.data, "dev", r.cfg.eval_problems)
    models = ("base", r.load()), (label, model)
    curves = [(name, curve(m, tok, problems, protocol_of("tiny", "tiny"), name)) for name, m in models]
    write_results(curves, r.out, r.cfg.data)
    show(curves, r.out)
    print(f"written: {r.out / 'results.jsonl'}")


def mean_by_step(rows):
    """The mean of rows (T_i,) of several lengths, step by step: (T,); NaN where no row has a value."""
    padded = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), padding_value=math.nan)
    return padded.nanmean(1).numpy()


def report(lines, x, y, path):
    """Draw lines {label: values (T,)} over those of before, which a .jsonl beside the PNG keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, every = path.with_suffix(".jsonl"), {}
    for row in read_jsonl(kept, True, sealed=True, label=str, values=list) if kept.exists() else ():
        every[row["label"]] = row["values"]
    every |= {label: [*map(float, values)] for label, values in lines.items()}
    write_whole(kept, "".join(cli.line_of(dict(label=label, values=every[label])) for label in every))
    draw({"": {label: enumerate(values) for label, values in every.items()}}, x, y, path)


def report_by_step(label, values, what, unit, path, x="forward"):
    """values (T,), one per forward: their mean is printed, and they are drawn over those of before."""
    known = values[~np.isnan(values)]
    if not len(known):
        raise UserError(f"{what} {label}: no value: the responses are too short, or the weights hold NaN")
    print(f"{what} {label}: {known.mean():.4f} {unit}, mean over the {x}s; {known[-1]:.4f} at the end")
    report({label: values}, x, f"{what}, {unit}", path)


def along_trajectory(model, record, steps):
    """At each of the steps (N,), of what is masked: log p of its id, forwards to its reveal, all log p."""
    x0 = torch.tensor(record["x0"])
    order = torch.tensor(record["order"])
    block_len = record["decoding"].get("block_len", model.cfg.block_len)
    model = nt_model.in_blocks(model, block_len)
    for some in steps.split(16):
        xt, masked = data.state_at(x0, order, some[:, None], model.cfg.mask_id)  # (16, L)
        masked[:, nt_model.n_content(x0, model.cfg.eos_ids):] = False
        prompts = [record["prompt_ids"]] * len(some)
        hidden = data.hidden_rows(model, prompts, xt, masked.nonzero(as_tuple=True))
        for t, here, h in zip(some, masked, hidden.split(masked.sum(1).tolist())):
            logp = model.head(h).float().log_softmax(-1)
            yield logp.gather(1, x0[here, None].to(h.device))[:, 0], order[here] - t, logp


@torch.no_grad()
def tds(model, record):
    """TDS at each forward of a record's trajectory: (T,) fp32 numpy; NaN with fewer than two tokens left."""
    variances = []
    for *_, logp in along_trajectory(model, record, torch.arange(max(record["order"]) + 1)):
        entropy = -(logp.exp() * logp).sum(-1)
        variances.append(float(entropy.var(unbiased=False)) if len(entropy) > 1 else np.nan)
    return np.array(variances, np.float32)


def mean_of(measure, model, records, label):
    """tds or masked_ce of a model, the mean over records: (T,)."""
    model = for_decoding(model.eval())
    bar = cli.progress_bar(records, f"{measure.__name__} {label}", unit="trajectory")
    return mean_by_step([measure(model, record) for record in bar])  # Eq. 11


@torch.no_grad()
def confidence_decay(model, records):
    """TAD Fig. 3(b): mean p(x0_i | prompt, x_t) by order_i - t, at 8 states of 64 records: (T,) or NaN."""
    offsets, values = [], []
    seen = Counter()  # the first of every data set, then the second of every one
    mixed = sorted(records, key=lambda r: seen.update([r["source"]]) or seen[r["source"]])
    for r in mixed[:64]:
        steps = torch.linspace(0, max(r["order"]), 8).long().unique()
        for right, offset, _ in along_trajectory(model, r, steps):
            offsets.append(offset)
            values.append(right.double().exp().cpu())
    offsets = torch.cat(offsets)
    return (offsets.bincount(torch.cat(values)) / offsets.bincount()).numpy()


@torch.no_grad()
def masked_ce(model, record):
    """Mean -log p of a record's tokens where 0, 1, ... 10 tenths of them are masked at random: (11,)."""
    n = nt_model.n_content(record["x0"], model.cfg.eos_ids)
    order = np.zeros(len(record["x0"]), int)
    order[:n] = 1 + np.random.default_rng(0).permutation(n)
    steps = 1 + n - (n * torch.arange(1, 11) + 9) // 10
    states = along_trajectory(model, record | {"order": order}, steps)
    return [math.nan, *(-right.mean() for right, *_ in states)]


def trajectory_nll(teacher, teacher_tok, tok, problem, out, eos_ids):
    """The teacher's NLL per token of the text revealed up to each forward of an Output: (nfe,) fp32 numpy."""
    n = out.n_tokens(eos_ids)
    head, means = teacher_tok.prompt_ids(problem).tolist(), []
    for forward in range(out.nfe):
        revealed = out.ids[:n][out.order[:n] <= forward].tolist()
        text = b"".join(map(tok.bytes_of, revealed)).decode(errors="replace")
        ids = head + teacher_tok.encode(text)
        check_length(teacher, f"problem {problem['id']} and its response", ids)
        nll = token_nll(teacher, torch.tensor([ids], device=teacher.device))
        means.append(float(nll[0, len(head):].mean()))
    return np.array(means, np.float32)


@dataclass
class ProblemOptions(AdaptedModel):
    task: str = "tiny"  # tiny, barter, gsm8k, ... (docs/data.md), or a .jsonl with prompt and answer
    split: Literal["train", "dev", "test"] = "test"  # of the task
    n: int | None = None  # number of problems [500 of a game, else all]
    max_prompt: int | None = None  # leave out problems with a longer prompt, tokens
    batch_size: int = 64  # problems decoded at once, per rank
    allow_code_execution: bool = False  # run the programs that the model writes, see docs/code-runner.md


@dataclass
class ProtocolOptions:
    protocol: str = option("", choices=[x for x in PROTOCOLS if "/" not in x])  # of assets/protocols.toml
    points: list[int] | None = None  # which points of the protocol, from 0 [all; of lm_eval: 0]
    thresholds: list[float] | None = None  # the points, instead of the protocol's
    label: str = ""  # name in tables and plots [base, or the run's directory]
    out: str = ""  # directory of the results [out/eval-... or out/lm_eval-...]


@dataclass
class CurveOptions(ProblemOptions, ProtocolOptions):
    """accuracy and TPF over the rules of a protocol; options of decoding replace what the protocol says"""


@dataclass
class NllOptions(ProblemOptions):
    """an AR teacher's NLL of what each forward has revealed (TRIMS Fig. 7)"""
    teacher: str = option()  # hub id or directory of a causal LM; tiny-ar, barter-ar
    out: str = "out"  # directory of trajectory_nll.png


@dataclass
class LogOptions:
    """loss and speed of training runs, drawn from their log.jsonl"""
    runs: list[str] = option(positional=True)  # their folders; the first gets log.png


@dataclass
class TdsOptions(AdaptedModel):
    """how much the entropies of masked tokens differ (TABOM Eq. 10, 11)"""
    trajectories: str = option()  # folder that rollout or a method collected
    n: int = 64  # how many of them
    ce: bool = False  # instead: cross-entropy of them and of the solutions over mask ratios (TABOM Fig. 3)
    out: str = "out"  # directory of tds.png or ce.png


def problems_of(args):
    return data.load_problems(args.task, args.split, args.n or (500 if args.task in data.GAMES else None))


def settle(args, tasks, given):
    """The protocol of curve or lm_eval; given: options of Decoding. Fills in args.protocol and args.label."""
    ranks()  # an error before a model is loaded
    family = nt_model.family_of(args.model, args.revision)
    args.protocol = args.protocol or ("tiny" if family == "tiny" else "thresholds")
    trained = Path(args.adapter or args.model).absolute()
    named = Path(re.sub("/(adapter|model)$", "", str(trained))).name  # out/RUN/adapter
    args.label = args.label or (named if trained.is_dir() else "base")
    if args.protocol == "thresholds":  # a block-causal model decodes in blocks of its own
        given = nt_model.decoding_defaults(nt_model.config_of(args.model, args.revision)) | given
    protocol, *others = (protocol_of(args.protocol, family, task, args.points, args.thresholds, **given)
                         for task in tasks)
    if "math" in map(known_task, tasks):
        cli.say(f"warning: TAD and TABOM train on PRM12K. {recipes.IN_MATH} (lm_eval: minerva_math500)")
    if any(other != protocol for other in others):
        raise UserError(f"protocol {args.protocol} differs between these tasks: run them one at a time")
    return protocol


def curve_command(args, given):
    """results.jsonl and curve.png in the folder, and the table in print."""
    protocol = settle(args, [args.task], given)
    sample.check_used(*(decoding_of(protocol | rule) for rule in protocol["rules"]))
    problems = problems_of(args)
    grade.check_gradable(problems, args.allow_code_execution)  # before anything is loaded or decoded
    model, tok = load_both(args)
    room = model.cfg.max_len - decoding_of(protocol).gen_len
    problems = data.fitting(problems, tok, args.max_prompt, room, lambda p: wording(p, protocol))
    config = made_of(args, model, task=args.task, problems=digest(problems), decoding=given)
    task = re.sub(r"\W+", "-", Path(re.split("[=:]", args.task)[0]).stem)
    name = f"{args.label}-{Path(args.model).name}-{task}-{args.protocol}-{args.split}-{len(problems)}"
    kept = Kept(args.out or f"out/eval-{name}", config)
    points = curve(
        model, tok, problems, protocol, args.label, args.batch_size, args.allow_code_execution, kept)
    if kept.rank:
        return
    show([(args.label, points)], kept.out)
    print(f"written: {kept.results}")


def nll_command(args, given):
    problems = problems_of(args)
    teacher_tok = load_teacher_tokenizer(args.teacher)
    for problem in problems:
        teacher_tok.prompt_ids(problem)  # an error before anything is decoded
    model, tok = load_both(args)
    teacher = load_teacher(args.teacher, *nt_model.default_device())
    label = args.adapter or args.model
    settings = dict(cache="none", policy="static", per_step=1, early_stop=False)
    settings |= nt_model.decoding_defaults(model.cfg) | given
    s = decoding_of(settings)
    sample.check_used(s)
    problems = data.fitting(problems, tok, args.max_prompt, model.cfg.max_len - s.gen_len)
    outs = sample.generate(model.eval(), [tok.prompt_ids(p) for p in problems], args.batch_size, **settings)
    bar = cli.progress_bar(problems, f"teacher NLL {label}", unit="decoding")
    rows = [trajectory_nll(teacher, teacher_tok, tok, *pair, model.cfg.eos_ids) for pair in zip(bar, outs)]
    path = Path(args.out) / "trajectory_nll.png"
    report_by_step(label, mean_by_step(rows), "teacher NLL", "nats per token", path)


def tds_command(args):
    records = [r for r in data.read_trajectories(args.trajectories) if r["solution"] or not args.ce][:args.n]
    if not records:
        raise UserError(f"{args.trajectories} holds no trajectory; --ce wants solutions")
    model, tok = load_both(args)
    label = args.adapter or args.model
    if any(tok.prompt_ids(r).tolist() != r["prompt_ids"] or max(r["x0"]) >= model.cfg.vocab_size
           for r in records):
        raise UserError(f"{args.trajectories} has ids of another model than {args.model}: give its own")
    if not args.ce:
        values = mean_of(tds, model, records, label)
        return report_by_step(label, values, "TDS", "nats^2", Path(args.out) / "tds.png")
    path = Path(args.out) / "ce.png"
    for what in ("own text", "solutions"):
        values = mean_of(masked_ce, model, records, what)
        report_by_step(f"{what}, {label}", values, "cross-entropy", "nats", path, "masked tenth")
        for r in records:
            r["x0"] = tok.response_ids(r["solution"], len(r["x0"]))


def log_command(args):
    panels = {"loss": {}, "tok_per_s": {}}
    path = Path(args.runs[0]) / "log.png"
    for run in args.runs:
        rows = read_jsonl(Path(run) / "log.jsonl", True, growing=True, step=int, loss=float, tok_per_s=float)
        if not rows:
            raise UserError(f"{run}/log.jsonl is empty: its first line comes after --log_every steps")
        for key, lines in panels.items():
            lines[run] = [(row["step"], row[key]) for row in rows]
    draw(panels, "step", "", path)


COMMANDS = {
    "curve": (curve_command, CurveOptions, sample.Decoding),
    "nll": (nll_command, NllOptions, sample.Decoding),
    "tds": (tds_command, TdsOptions),
    "log": (log_command, LogOptions)
}

if __name__ == "__main__":
    run_cli(lambda: cli.run_command(__doc__, COMMANDS))
