"""Compare evaluated runs: those that differ in their seed alone make one group.

    python tests/tools/study.py runs/study/* --out runs

Prints a table with the mean and the standard deviation of every group, and writes study.json and
study.png. Reads run.json, metrics.jsonl and evaluation.json of each run; evaluate.py has written
the last one before.
"""

import argparse
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))

from evaluate import make_folder, print_table, read_metrics
from model import read_json, write_json
from reward import InputError
from warmup import FREE_ON_RESUME

# Flags that make no other setting of the study: where files lie, what is mere rounding; the seed.
NO_SETTINGS = {"seed", *FREE_ON_RESUME} - {"data", "test_data", "steps", "epochs"}


def main(runs: list[str], out: str):
    """The table, study.json and study.png of some runs."""
    folder = make_folder(out)
    names, groups = group(runs)
    rows = []
    for values, members in groups:
        numbers = [final_numbers(run) for run in members]
        row = dict(zip(names, values, strict=True))
        for name in numbers[0]:
            row[name] = [found.get(name) for found in numbers]
        rows.append(row)
    print_table([{name: mean_cell(value) for name, value in row.items()} for row in rows])
    write_json(folder / "study.json", rows)
    draw(names, groups, folder / "study.png")


def group(runs: list[str]) -> tuple[list[str], list]:
    """The settings in which runs differ, and for each of their values (values, runs)."""
    flags = [settings(run) for run in runs]
    every = sorted(set().union(*flags))
    names = [name for name in every if len({found.get(name) for found in flags}) > 1]
    groups = {}
    for run, found in zip(runs, flags, strict=True):
        values = tuple(found.get(name, "-") for name in names)
        groups.setdefault(values, []).append(run)
    return names, sorted(groups.items())


def settings(run: str) -> dict[str, str]:
    """The flags of a run and, as "warm-up ...", those of the run that it started from."""
    flags = read_json(Path(run, "run.json"))
    found = {name: flags[name] for name in flags if name not in NO_SETTINGS}
    source = flags.get("model")
    if source:
        # Flags name folders relative to where the run was started: some folder above it.
        files = [folder / source / "run.json" for folder in (Path(), *Path(run).resolve().parents)]
        warm_up = next((read_json(file) for file in files if file.exists()), {"model": source})
        for name, value in warm_up.items():
            if name == "model" or name not in NO_SETTINGS:
                found[f"warm-up {name}"] = value
    return {name: str(value) for name, value in found.items()}


def final_numbers(run: str) -> dict[str, float]:
    """Accuracies of evaluation.json, seconds of training, and the mean KL(mu||pi)."""
    result = read_json(Path(run, "evaluation.json"))
    numbers = {name: result[name] for name in result if name == "greedy_accuracy" or "@" in name}
    records = read_metrics(run)
    kls = [record["kl_behav"] for record in records if record.get("kl_behav") is not None]
    numbers["seconds"] = records[-1]["seconds"] if records else None
    numbers["kl_behav"] = statistics.mean(kls) if kls else None
    return numbers


def mean_cell(value: str | list) -> str:
    """Mean ± standard deviation (of how many runs); None does not count."""
    if isinstance(value, str):
        return value
    known = [x for x in value if x is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.3f}"
    if len(known) > 1:
        mean += f" ± {statistics.stdev(known):.3f}"
    return f"{mean} ({len(known)})"


def draw(names: list[str], groups: list, file: Path):
    """Greedy accuracy over the seconds of training: a line a run, a colour a group."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panel = figure.add_subplot()
    for number, (values, runs) in enumerate(groups):
        label = ", ".join(values)
        for run in runs:
            points = [r for r in read_metrics(run) if "greedy_accuracy" in r]
            seconds = [r["seconds"] for r in points]
            accuracies = [r["greedy_accuracy"] for r in points]
            panel.plot(seconds, accuracies, ".-", color=f"C{number}", label=label)
            label = None  # one entry a group
    panel.set(xlabel="seconds of training", ylabel="greedy accuracy", ylim=(None, 1.02))
    panel.legend(title=", ".join(names), loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110)
    print(f"figure: {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="runs", help="folder of study.json and study.png")
    try:
        main(**vars(parser.parse_args()))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
