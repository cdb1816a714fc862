"""One table and one picture over several runs, seeds and tasks. The papers' numbers: docs/papers.md.
    python tools/compare.py runs assets/comparison.jsonl.gz --control SFT-SD     # docs/results.md"""
import gzip
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import eval as nt_eval  # noqa: E402
from cli import UserError, option, run_cli  # noqa: E402
from eval import COUNTS, read_points  # noqa: E402

COLUMNS = ("token by token, %|2 per forward, %|4 per forward, %|at 0.9, %|TPF at 0.9|AUP|at TPF 3, %|"
           "TPF 5 points below base|first point, %|TPF there|"  # the last two: where none of these begins
           "TDS, nats^2|training, min|collecting, min").split("|")
ACCURACY_AT = dict(zip("1 per forward|2 per forward|4 per forward|threshold 0.9".split("|"), COLUMNS))


def pack(folders, file):
    """The results of run folders in one compressed file: the points without their responses."""
    lines = [cli.line_of({key: point[key] for key in point if key != "responses"})
             for point in sum(map(read_points, folders), [])]
    Path(file).write_bytes(gzip.compress("".join(lines).encode(), mtime=0))  # equal results, equal bytes


def read_runs(sources):
    """-> {label: [points of run 1, ...]}: a run's problems are the same under every label; one run is all."""
    runs = defaultdict(lambda: defaultdict(list))
    for number, source in enumerate(sources):
        for point in read_points(source):
            point.update((key, np.array(point[key])) for key in COUNTS)
            runs[point["label"]][number, point["folder"]].append(point)
    runs = {label: list(of_label.values()) for label, of_label in runs.items()}
    most = max(runs.values(), key=len)
    for label, of_label in runs.items():
        repeated = of_label * len(most) if len(of_label) == 1 else of_label
        for points, theirs in zip_longest(repeated, most, fillvalue=[dict(ids=[], folder="absent")]):
            if any(point["ids"] != theirs[0]["ids"] for point in points):
                raise UserError(f"a run of {label!r} ({points[0]['folder']}) has other problems than "
                                f"{theirs[0]['folder']}: a paired comparison needs the same ones")
    return runs


def on_curve(point):
    """The points that AUP and the picture take: the thresholds, and token by token."""
    return point["rule"] == "1 per forward" or not point["rule"].endswith("per forward")


def summarize(points, y_max, least, pick=slice(None)):
    """A run on the problems `pick` (indices), y_max in percent -> the values of COLUMNS, or NaN. least: the
    accuracy, percent, of which the highest TPF is sought, between the curve's points (0: never), or NaN."""
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
            row["TPF at 0.9"] = tpf
    row["AUP"] = nt_eval.area_of(curve, y_max)
    if curve:
        tpfs, accuracies = zip(*sorted(curve))
        between = np.linspace(tpfs[0], tpfs[-1], 1000)
        reached = between[np.interp(between, tpfs, accuracies) >= least]
        if not np.isnan(least):
            row["TPF 5 points below base"] = reached.max(initial=0)
        row["at TPF 3, %"] = np.interp(3, tpfs, accuracies, np.nan, np.nan)
    return [row.get(column, np.nan) for column in COLUMNS]


def by_task(runs):
    """Runs {label: [points of a run, ...]} -> {task: runs}."""
    tasks = defaultdict(lambda: defaultdict(list))
    for label, of_label in runs.items():
        for points in of_label:
            tasks[points[0]["task"]][label].append(points)
    return tasks


def bootstrap(runs, y_max, least, number, n_boot):
    """{label: (1 + n_boot, columns)}: the mean over runs, then means of runs and problems drawn anew."""
    draws = {label: [] for label in runs}
    sets = sorted({tuple(points[0]["ids"]) for of_label in runs.values() for points in of_label})
    for replicate in cli.progress_bar(range(1 + n_boot), "bootstrap"):
        rng = np.random.default_rng([number, replicate])
        picks = {ids: rng.integers(len(ids), size=len(ids)) for ids in sets}
        for label, of_label in runs.items():
            n = len(of_label)
            chosen = np.random.default_rng([number, replicate, 1]).integers(n, size=n)
            if not replicate:
                picks, chosen = dict.fromkeys(sets, slice(None)), range(n)
            rows = [summarize(of_label[i], y_max, least, picks[tuple(of_label[i][0]["ids"])])
                    for i in chosen]
            draws[label].append(np.mean(rows, 0))
    return {label: np.array(rows) for label, rows in draws.items()}


def shown(values, bracketed=False):
    """A value with its interval, or half of its width. values: a column of bootstrap()."""
    if np.isnan(values[0]):
        return "–"
    lo, hi = np.percentile(values[1:], [2.5, 97.5])
    if bracketed:
        return f"{values[0]:.2f} [{lo:.2f}, {hi:.2f}]"
    digits = 1 if values[0] >= 10 else 2
    return f"{values[0]:.{digits}f} ± {(hi - lo) / 2:.{digits}f}"


def table_of(draws, runs, control):
    """{label: (1 + n_boot, columns)} -> lines: a table of means, and paired differences from control."""
    known = np.flatnonzero(np.isfinite([rows[0] for rows in draws.values()]).any(0))
    titles = "model", "runs", *(COLUMNS[j] for j in known)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for label, rows in draws.items():
        cells = [shown(rows[:, j]) for j in known]
        lines.append(f"| {label} | {len(runs[label])} | {' | '.join(cells)} |")
    lines.append("")
    for label in draws if control in draws else ():
        if label == control:
            continue
        for j, name in enumerate(COLUMNS[:8]):
            values = draws[label][:, j] - draws[control][:, j]
            if not np.isnan(values).any():  # else the protocol lacks this rule
                lines.append(f"{name}, {label} - {control}: {shown(values, bracketed=True)}")
    return lines


def compare(runs, control, n_boot=1000, y_max=""):
    """A table per task, of several tasks their average first. y_max: a family of Y_MAX, or our best."""
    published, tasks = nt_eval.Y_MAX.get(y_max, {}), by_task(runs)
    every, lines = [], []
    for number, (task, own) in enumerate(tasks.items()):
        alike = sum(own.values(), [])
        curves = [(points[0]["label"], list(filter(on_curve, points))) for points in alike]
        best = max((point["correct"].mean() for _, kept in curves for point in kept), default=0)
        highest = published.get(nt_eval.known_task(task), 100 * best)
        base = [points[0]["correct"].mean() for points in own.get("base", ())]
        least = 100 * np.mean(base or np.nan) - 5
        every.append(bootstrap(own, highest, least, number, n_boot))
        n = len({i for points in alike for i in points[0]["ids"]})
        if len(tasks) > 1:
            lines += ["", f"## {task}", ""]
        lines.append(f"{n} problems{f', y_max {highest:.2f}' * bool(best)}; ± is half of a 95% bootstrap "
                     f"interval over problems and runs")
        lines += [*nt_eval.anchor_warning(curves).splitlines(), ""]
        lines += table_of(every[-1], own, control)
    if len(tasks) > 1:
        average = {label: np.mean([draws[label] for draws in every], 0) for label in runs
                   if all(label in draws for draws in every)}
        lines = [f"average of {len(tasks)} tasks", "", *table_of(average, runs, control), *lines]
    return "\n".join(lines)


def picture(tasks, path):
    """A panel per task and kind of rule; in it a curve per label, none of ablations ("TAD: near only")."""
    panels = {}
    for task, runs in tasks.items():
        curves = {label: [alike[0] | {key: np.concatenate([point[key] for point in alike]) for key in COUNTS}
                          for alike in zip(*of_label)]  # over the problems of all runs
                  for label, of_label in runs.items() if ":" not in label}
        for title, keep in {
            "thresholds, and token by token": on_curve,
            "a fixed number of tokens per forward": lambda point: point["rule"].endswith("per forward"),
        }.items():
            kept = [(label, list(filter(keep, points))) for label, points in curves.items()]
            kept = [(label, points) for label, points in kept if points]
            if any(len(points) > 1 for _, points in kept):
                panels[f"{task}: {title}" if len(tasks) > 1 else title] = kept
    if panels:  # not of single points
        nt_eval.plot(panels, path)


@dataclass
class RunsOptions:
    """one table and one picture over several runs"""
    sources: list[str] = option(positional=True)  # folders of results, or files that hold many
    control: str = "base"  # label that the differences refer to
    y_max: str = option("", choices=nt_eval.Y_MAX)  # of AUP: family whose published best counts [our best]
    out: str = "out/compare"  # directory of compare.md and compare.png


def runs_command(args):
    runs = read_runs(args.sources)
    out = Path(args.out)
    if args.control not in {*runs, "base"}:  # the default need not be there
        raise UserError(f"--control {args.control!r}: there are {', '.join(runs)}")
    out.mkdir(parents=True, exist_ok=True)
    text = compare(runs, args.control, y_max=args.y_max)
    cli.write_whole(out / "compare.md", text + "\n")
    print(f"{text}\nwritten: {out / 'compare.md'}")
    picture(by_task(runs), out / "compare.png")


COMMANDS = {"runs": (runs_command, RunsOptions)}

if __name__ == "__main__":
    run_cli(lambda: cli.run_command(__doc__, COMMANDS))
