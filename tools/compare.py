"""One table and one picture over several runs and seeds; and the papers' numbers to stand beside yours.

    python tools/compare.py runs out/tad-eval-* --base base --control SFT
    python tools/compare.py runs assets/comparison.jsonl.gz --control SFT-SD     # docs/results.md
    python tools/compare.py published gsm8k --model llada

A run is a folder with the results.jsonl of eval.py or tools/sweep.py; a .jsonl.gz of sweep.py holds many.
"""
import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import eval as nt_eval  # noqa: E402
import model as nt_model  # noqa: E402
from cli import UserError, option, read_json, read_jsonl, run_cli  # noqa: E402

# what is said of a run; a column that no run has is left out
COLUMNS = ("token by token, %", "2 per forward, %", "4 per forward, %", "at 0.9, %", "TPF at 0.9", "AUP",
           "TDS, nats^2", "tok/s at 0.9", "training, min", "collecting, min")
ACCURACY_AT = dict(zip(("1 per forward", "2 per forward", "4 per forward", "threshold 0.9"), COLUMNS))
COUNTS = ("correct", "tokens", "nfe")  # per problem


def read_points(source):
    """The points of a folder, or of a file that pack() wrote, which names their folders."""
    source = Path(source)
    rows = read_jsonl(source / "results.jsonl" if source.is_dir() else source, tolerant=True)
    return [{"folder": source.name, **row} for row in rows]


def pack(folders, file):
    """The results of run folders in one compressed file: the points without their responses."""
    lines = []
    for point in sum(map(read_points, folders), []):
        point.pop("responses", None)
        lines.append(json.dumps(point) + "\n")
    Path(file).write_bytes(gzip.compress("".join(lines).encode(), mtime=0))  # equal results, equal bytes


def read_runs(sources):
    """Folders and packed files -> {label: [points of run 1, points of run 2, ...]}. Runs of one number must
    have the same problems under every label; a label with a single run has those of all.
    """
    grouped, runs = {}, {}
    for number, source in enumerate(sources):
        for point in read_points(source):
            point.update((key, np.array(point[key])) for key in COUNTS)
            grouped.setdefault((number, point["folder"], point["label"]), []).append(point)
    for (*_, label), points in grouped.items():
        runs.setdefault(label, []).append(points)
    most = max(runs.values(), key=len)
    for label, of_label in runs.items():
        repeated = of_label * len(most) if len(of_label) == 1 else of_label
        for i, (points, theirs) in enumerate(zip(repeated, most), 1):
            if any(point["ids"] != theirs[0]["ids"] for point in points):
                raise UserError(f"run {i} of {label!r} was not evaluated on the same problems as the others: "
                                f"a paired comparison needs that")
    return runs


def on_curve(point):
    """The points that AUP and the picture take: the thresholds, and token by token."""
    return point["rule"] == "1 per forward" or not point["rule"].endswith("per forward")


def summarize(points, y_max, pick=slice(None)):
    """A run on the problems `pick` (an index array) -> the values of COLUMNS, NaN where it has none."""
    cost, curve = points[0].get("run", {}), []
    row = {"TDS, nats^2": cost.get("tds", np.nan),
           "training, min": cost.get("train_s", np.nan) / 60,
           "collecting, min": cost.get("collect_s", np.nan) / 60}
    for point in points:
        rule, tokens = point["rule"], point["tokens"]
        accuracy = 100 * point["correct"][pick].mean()
        tpf = tokens[pick].sum() / point["nfe"][pick].sum()
        if on_curve(point):
            curve.append((tpf, accuracy))
        if rule in ACCURACY_AT:
            row[ACCURACY_AT[rule]] = accuracy
        if rule == "threshold 0.9":
            row |= {"TPF at 0.9": tpf, "tok/s at 0.9": tokens.sum() / point["seconds"]}
    row["AUP"] = nt_eval.area_of(curve, y_max)
    return [row.get(column, np.nan) for column in COLUMNS]


def bootstrap(runs, y_max, n_boot):
    """{label: (1 + n_boot, columns)}: the mean over its runs, then means of runs and problems drawn anew."""
    draws = {label: [[summarize(points, y_max) for points in of_label]] for label, of_label in runs.items()}
    sets = sorted({tuple(points[0]["ids"]) for of_label in runs.values() for points in of_label})
    for replicate in cli.progress_bar(range(1, n_boot + 1), "bootstrap"):
        rng = np.random.default_rng([0, replicate])  # the same problems and run numbers for every label
        picks = {ids: rng.integers(len(ids), size=len(ids)) for ids in sets}
        for label, of_label in runs.items():
            same = np.random.default_rng([0, replicate, 1])
            chosen = [of_label[i] for i in same.integers(len(of_label), size=len(of_label))]
            rows = [summarize(points, y_max, picks[tuple(points[0]["ids"])]) for points in chosen]
            draws[label].append(rows)
    return {label: np.mean(rows, 1) for label, rows in draws.items()}


def shown(values, bracketed=False):
    """A value with its interval, or half of its width. values: a column of bootstrap()."""
    if np.isnan(values[0]):
        return "–"
    lo, hi = np.percentile(values[1:], [2.5, 97.5])
    if bracketed:
        return f"{values[0]:.2f} [{lo:.2f}, {hi:.2f}]"
    digits = 1 if values[0] >= 10 else 2
    return f"{values[0]:.{digits}f} ± {(hi - lo) / 2:.{digits}f}"


def compare(runs, base, control, n_boot=1000, y_max=None):
    """The table of means over runs and, below it, paired: ratios to base, differences from control."""
    every = sum(runs.values(), [])
    correct = [point["correct"] for points in every for point in points if on_curve(point)]
    y_max = y_max or 100 * max(map(np.mean, correct))
    draws = bootstrap(runs, y_max, n_boot)
    (known,) = np.isfinite([rows[0] for rows in draws.values()]).any(0).nonzero()
    table = [["model", "runs", *(COLUMNS[j] for j in known)]]
    for label, rows in draws.items():
        table.append([label, str(len(runs[label])), *(shown(rows[:, j]) for j in known)])
    header, *body = (f"| {' | '.join(cells)} |" for cells in table)
    n = len({i for points in every for i in points[0]["ids"]})
    about = f"{n} problems, y_max {y_max:.2f}; ± is half of a 95% bootstrap interval over problems and runs"
    lines = [about, "", header, "|---" * len(table[0]) + "|", *body, ""]
    aup = COLUMNS.index("AUP")
    for label, rows in draws.items():
        if label != base:
            lines.append(f"AUP {label} / {base}: {shown(rows[:, aup] / draws[base][:, aup], bracketed=True)}")
        for j, name in enumerate(COLUMNS[:6]) if control in draws and label not in (base, control) else ():
            values = rows[:, j] - draws[control][:, j]
            if not np.isnan(values).any():  # else the protocol lacks this rule
                spread = values[1:].std()
                errors = f", {values[0] / spread:.1f} standard errors" if spread else ""
                lines.append(f"{name}, {label} - {control}: {shown(values, bracketed=True)}{errors}")
    return "\n".join(lines)


def picture(runs, path):
    """A curve per label, over the problems of all its runs; none of ablations ("TAD: near only")."""
    curves, panels = {}, {}
    for label, of_label in runs.items():
        if ":" not in label:
            curves[label] = [
                {**alike[0], **{key: np.concatenate([point[key] for point in alike]) for key in COUNTS}}
                for alike in zip(*of_label)]
    for title, keep in {
        "thresholds, and token by token": on_curve,
        "a fixed number of tokens per forward": lambda point: point["rule"].endswith("per forward"),
    }.items():
        kept = [(label, list(filter(keep, points))) for label, points in curves.items()]
        if all(len(points) > 1 for _, points in kept):
            panels[title] = kept
    nt_eval.plot(panels, path)


def published(task, family):
    """The papers' rows for a benchmark and a family: method, acc, tpf, aup, tok_s, and the table's facts."""
    found = []
    for paper in read_json(Path(__file__).with_name("published.json")):
        for method, *values in paper["rows"]:
            cells = zip(map(str.split, paper["columns"]), values)
            own = {key: value for (benchmark, key), value in cells if benchmark == task and value is not None}
            if own and paper["family"] == family:
                found.append({**paper, "method": method, **own})
    return found


def published_text(task, family, protocol, made_with):
    """The rows to stand beside a run of this protocol made with own | lm_eval; "" if none."""
    name = nt_eval.known_task(task)
    rows = [row for row in published(name, family) if "acc" in row]
    if not rows:
        return ""
    line = "{method:<40} {acc:>5} % TPF {tpf:>5} AUP {aup:>5} tok/s {tok_s:>7}  {model}, {source}"
    lines = [f"published, not run here ({name}):"]
    lines += [line.format(**{"tpf": "-", "aup": "-", "tok_s": "-", **row}) for row in rows]
    for *made_by, source, setting in dict.fromkeys((*r["made_by"], r["source"], r["setting"]) for r in rows):
        alike = made_by == [protocol, made_with]
        same = "the same protocol, but for options given here," if alike else "not the same protocol"
        lines.append(f"{same} as this run's ({protocol}, {made_with}): {source}: {setting}")
    return "\n".join(lines)


@dataclass
class RunsOptions:
    """one table and one picture over several runs"""
    sources: list[str] = option(positional=True)  # folders of results, or files that hold many
    base: str = "base"  # label the AUP ratios refer to
    control: str = "SFT"  # label the differences refer to
    y_max: float | None = None  # of AUP, percent [the best accuracy of all of them]
    out: str = "out/compare"  # directory of compare.md and compare.png


@dataclass
class PublishedOptions:
    """the papers' rows for a benchmark; nothing in them was run here"""
    task: str = option(positional=True)  # gsm8k, math, math500, humaneval, mbpp, ifeval, or lm_eval's name
    model: str = "llada"  # preset name, hub id or directory: its family's rows
    protocol: str = "thresholds"  # of your run: which rows were made in the same way
    made_with: Literal["own", "lm_eval"] = "own"  # eval.py, or tools/harness.py


def runs_command(args):
    runs, out = read_runs(args.sources), Path(args.out)
    if args.base not in runs:
        raise UserError(f"no run is labelled {args.base!r} (--base): there are {', '.join(runs)}")
    out.mkdir(parents=True, exist_ok=True)
    text = compare(runs, args.base, args.control, y_max=args.y_max)
    (out / "compare.md").write_text(text + "\n")
    picture(runs, out / "compare.png")
    print(f"{text}\nwritten: {out / 'compare.md'}, {out / 'compare.png'}")


def published_command(args):
    family = nt_model.family_of(args.model)
    text = published_text(args.task, family, args.protocol, args.made_with)
    print(text or f"nothing is published of {args.task} and the family {family}")


COMMANDS = {"runs": (runs_command, RunsOptions), "published": (published_command, PublishedOptions)}

if __name__ == "__main__":
    run_cli(lambda: cli.run_command(__doc__, COMMANDS))
