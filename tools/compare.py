"""One table and one picture over several runs, seeds and tasks. The papers' numbers: docs/papers.md.

    python tools/compare.py runs assets/comparison.jsonl.gz --control SFT-SD     # docs/results.md

A run is a folder with the results.jsonl of eval.py or tools/sweep.py; a .jsonl.gz of sweep.py holds many.
"""
import gzip
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import eval as nt_eval  # noqa: E402
from cli import UserError, option, read_jsonl, run_cli  # noqa: E402

COLUMNS = ("token by token, %|2 per forward, %|4 per forward, %|at 0.9, %|TPF at 0.9|AUP|"
           "first point, %|TPF there|"  # of a protocol that begins with none of these rules
           "TDS, nats^2|tok/s at 0.9|training, min|collecting, min").split("|")
ACCURACY_AT = dict(zip(("1 per forward", "2 per forward", "4 per forward", "threshold 0.9"), COLUMNS))
COUNTS = ("correct", "tokens", "nfe")  # per problem
FIELDS = dict(label=str, rule=str, seconds=float, **dict.fromkeys(("ids", *COUNTS), list))


def read_points(source):
    """The points of a folder and those in it, or of a file that pack() wrote, which names their folders."""
    source = Path(source)
    rows, kinds = [], set()
    for file in [source] if source.is_file() else sorted(source.rglob("results.jsonl")):
        rows += read_jsonl(file, ours=True, **FIELDS)
    for row in rows:
        kinds |= {tuple(map(type, problem)) for problem in zip_longest(row["ids"], *map(row.get, COUNTS))}
        if not all(isinstance(row.get(key, {}), dict) for key in ("run", "provenance")):
            raise UserError(f"{source}: run and provenance of a point must be objects")
        row.setdefault("folder", f"{source.name} {row.get('provenance', {}).get('task', '')}")
    if kinds != {(str, int, int, int)}:
        raise UserError(f"{source} holds no results, or not an id and three counts for every problem")
    return rows


def pack(folders, file):
    """The results of run folders in one compressed file: the points without their responses."""
    lines = []
    for point in sum(map(read_points, folders), []):
        point.pop("responses", None)
        lines.append(json.dumps(point) + "\n")
    Path(file).write_bytes(gzip.compress("".join(lines).encode(), mtime=0))  # equal results, equal bytes


def read_runs(sources):
    """Folders and packed files -> {label: [points of run 1, points of run 2, ...]}. Runs of one number must
    have the same problems under every label; a label with a single run has those of all."""
    runs = defaultdict(lambda: defaultdict(list))
    for number, source in enumerate(sources):
        for point in read_points(source):
            point.update((key, np.array(point[key])) for key in COUNTS)
            runs[point["label"]][number, point["folder"]].append(point)
    runs = {label: list(of_label.values()) for label, of_label in runs.items()}
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
    """A run on the problems `pick` (an index array) -> the values of COLUMNS, NaN where it has none.
    y_max: {task of the run: percent}."""
    curve = []
    cost = points[0].get("run", {})
    row = {"TDS, nats^2": cost.get("tds", np.nan),
           "training, min": cost.get("train_s", np.nan) / 60,
           "collecting, min": cost.get("collect_s", np.nan) / 60}
    for point in points:
        rule = point["rule"]
        drawn = point | {key: point[key][pick] for key in COUNTS}
        accuracy, _ = nt_eval.accuracy(drawn)
        tpf = nt_eval.tpf(drawn)
        if on_curve(point):
            curve.append((nt_eval.rho(drawn), accuracy))
        if rule in ACCURACY_AT:
            row[ACCURACY_AT[rule]] = accuracy
        elif point is points[0]:
            row |= {"first point, %": accuracy, "TPF there": tpf}
        if rule == "threshold 0.9":
            row |= {"TPF at 0.9": tpf, "tok/s at 0.9": point["tokens"].sum() / point["seconds"]}
    row["AUP"] = nt_eval.area_of(curve, y_max[points[0].get("provenance", {}).get("task")])
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
            n = len(of_label)
            drawn = range(n) if len(y_max) > 1 else same.integers(n, size=n)  # tasks are not drawn
            chosen = [of_label[i] for i in drawn]
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
    best, curves = {}, []
    for points in every:  # of a label they may be of several tasks: its row is their average
        kept = list(filter(on_curve, points))
        task = points[0].get("provenance", {}).get("task")
        best.setdefault(task, []).extend(point["correct"].mean() for point in kept)
        if kept:
            curves.append((points[0]["label"], kept))
    y_max = {task: y_max or 100 * max(values, default=0) for task, values in best.items()}
    draws = bootstrap(runs, y_max, n_boot)
    (known,) = np.isfinite([rows[0] for rows in draws.values()]).any(0).nonzero()
    table = [["model", "runs", *(COLUMNS[j] for j in known)]]
    for label, rows in draws.items():
        cells = [shown(rows[:, j]) for j in known]
        table.append([label, str(len(runs[label])), *cells])
    header, *body = (f"| {' | '.join(cells)} |" for cells in table)
    n = len({i for points in every for i in points[0]["ids"]})
    highest = ", ".join(f"{value:.2f}" for value in y_max.values())
    about = f"{n} problems, y_max {highest}; ± is half of a 95% bootstrap interval over problems and runs"
    warning = nt_eval.anchor_warning(curves)
    lines = [about, *warning.splitlines(), "", header, "|---" * len(table[0]) + "|", *body, ""]
    aup = COLUMNS.index("AUP")
    for label, rows in draws.items():
        if label != base:
            lines.append(f"AUP {label} / {base}: {shown(rows[:, aup] / draws[base][:, aup], bracketed=True)}")
        for j, name in enumerate(COLUMNS[:6]) if control in draws and label not in (base, control) else ():
            values = rows[:, j] - draws[control][:, j]
            if not np.isnan(values).any():  # else the protocol lacks this rule
                lines.append(f"{name}, {label} - {control}: {shown(values, True)}")
    return "\n".join(lines)


def picture(runs, path):
    """A curve per label, over the problems of all its runs; none of ablations ("TAD: near only")."""
    curves, panels = {}, {}
    for label, of_label in runs.items():
        if ":" not in label:
            curves[label] = [
                alike[0] | {key: np.concatenate([point[key] for point in alike]) for key in COUNTS}
                for alike in zip(*of_label)]
    for title, keep in {
        "thresholds, and token by token": on_curve,
        "a fixed number of tokens per forward": lambda point: point["rule"].endswith("per forward"),
    }.items():
        kept = [(label, list(filter(keep, points))) for label, points in curves.items()]
        if all(len(points) > 1 for _, points in kept):
            panels[title] = kept
    if panels:  # not of single points
        nt_eval.plot(panels, path)


@dataclass
class RunsOptions:
    """one table and one picture over several runs"""
    sources: list[str] = option(positional=True)  # folders of results, or files that hold many
    base: str = "base"  # label the AUP ratios refer to
    control: str = "SFT-SD"  # label the differences refer to
    y_max: float | None = None  # of AUP, percent [the best accuracy of all of them]
    out: str = "out/compare"  # directory of compare.md and compare.png


def runs_command(args):
    runs = read_runs(args.sources)
    out = Path(args.out)
    for label in {args.base, args.control} - {*runs, "SFT-SD"}:  # the default need not be there
        raise UserError(f"no run is labelled {label!r}: there are {', '.join(runs)}; see --base, --control")
    out.mkdir(parents=True, exist_ok=True)
    text = compare(runs, args.base, args.control, y_max=args.y_max)
    cli.write_whole(out / "compare.md", text + "\n")
    picture(runs, out / "compare.png")
    print(f"{text}\nwritten: {out / 'compare.md'}, with a picture of curves")


COMMANDS = {"runs": (runs_command, RunsOptions)}

if __name__ == "__main__":
    run_cli(lambda: cli.run_command(__doc__, COMMANDS))
