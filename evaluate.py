"""Greedy accuracy, maj@k and pass@k of any run on any task; every table and figure; offline self-training.

python evaluate.py runs/warmup runs/rl --samples 8
python evaluate.py runs/study/* --samples 8             runs that differ in more than their seed are compared as groups
python evaluate.py runs/warmup --samples 100 --keep-correct right.jsonl      right completions as training problems
"""

import json
import math
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import HfArgumentParser

from model import Decoder, load, named_in_errors, rank, read_json, write_json
from reward import InputError, Problem, load_problems, make_target
from rollout import OUTCOMES, Grades, SharedConfig, encode_prompts, flag, grade, prompt_seeds, run_script, sample


@dataclass
class Flags(SharedConfig):
    """Flags of evaluate.py."""

    out: str = flag("runs", "folder of study.json and study.png, and of models whose own folder is no run")
    samples: int = flag(0, "also sample so many completions a problem at temperature 1, for maj@k and pass@k")
    keep_correct: str | None = flag(None, "FILE: write right completions of the training problems to it instead")
    data: str | None = flag(None, "training problems of --keep-correct (default: those of the run)")
    limit: int | None = flag(None, "use only the first so many of them")
    seed: int = flag(0, "seed of those samples")


@dataclass
class Config(Flags):
    """Flags and the positional arguments."""

    runs: tuple[str, ...] = ()  # directories or hub ids

    def __post_init__(self):
        super().__post_init__()
        if self.keep_correct is not None and (len(self.runs) > 1 or self.samples < 1):
            raise InputError("--keep-correct FILE takes one run and --samples of 1 or more")
        if self.keep_correct is None and (self.limit or self.data):
            raise InputError("--limit and --data are for --keep-correct; here take --test-limit and --test-data")


def main(config: Config) -> list[dict]:
    """Evaluate every run, write its evaluation.json, print one table; compare groups of runs."""
    flags, places, results = [replace(config) for _ in config.runs], [config.out], []
    for run, one in zip(config.runs, flags, strict=True):
        one.as_trained(run)  # refuses a wrong name now, not after an hour
        ours = (Path(run) / "run.json").exists() and os.access(run, os.W_OK)  # no other model's folder is written to
        places.append(run if ours else Path(config.out) / f"evaluation-{run.strip('./').replace('/', '-')}")
    if config.keep_correct is not None:
        return [keep_correct(load(config.runs[0], config.device, config.dtype), flags[0])]
    out, *places = map(make_folder, places)
    for run, one, place in zip(config.runs, flags, places, strict=True):
        problems = load_problems(one.task, "test", one.test_data, one.test_limit, one.engine)
        results.append(evaluate(load(run, one.device, one.dtype), problems, one, one.samples, one.seed, place))
    if rank() == 0:
        print_table([{"run": run, **result} for run, result in zip(config.runs, results, strict=True)])
        compare_groups(out, config.runs, results)
    return results


def evaluate(model: Decoder, problems: list[Problem], config: SharedConfig, samples=0, seed=0, out=None) -> dict:
    """Greedy accuracy, maj@k and pass@k from `samples` completions. out: for them and for a line a completion."""
    prompts, sampling = encode_prompts(problems, model, config, config.max_new_tokens), config.sampling(model)
    rollout = sample(model, prompts, temperature=0, **sampling)
    grades = grade(rollout, problems, model, config)
    shares = {name: grades.outcomes.count(name) / len(problems) for name in OUTCOMES}
    result = {
        "task": config.task,
        "problems": len(problems),
        "greedy_accuracy": shares["right"],
        "greedy_interval": wilson(grades.outcomes.count("right"), len(problems)),
        "greedy_length": (rollout.lengths - rollout.prompt_lens).double().mean().item(),
        "greedy_outcomes": {name: share for name, share in shares.items() if share},
    }
    lines = list(readable(problems, grades, 0))
    if samples:
        grades = grade(sample(model, prompts, num_samples=samples, seed=seed, **sampling), problems, model, config)
        lines += readable(problems, grades, 1)
        right = [outcome == "right" for outcome in grades.outcomes]
        spans = [slice(i, i + samples) for i in range(0, len(right), samples)]  # the samples of each problem
        of_problem = [(grades.answers[span], right[span]) for span in spans]
        for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):  # 1, 2, 4, ... and all
            blocks = range(0, samples - k + 1, k)  # each of them votes: maj@1 is pass@1
            votes = [majority_is_right(a[i : i + k], r[i : i + k]) for a, r in of_problem for i in blocks]
            result[f"maj@{k}"] = sum(votes) / len(votes)
            result[f"pass@{k}"] = sum(pass_at_k(samples, sum(r), k) for _, r in of_problem) / len(of_problem)
    if out is not None and rank() == 0:
        try:
            (Path(out) / "evaluation.jsonl").write_text("\n".join([*map(json.dumps, lines), ""]))
            write_json(Path(out) / "evaluation.json", result)
        except OSError as error:  # the numbers are not lost with it
            print(f"warning: {out}: the evaluation cannot be written ({error.strerror})")
    return result


def readable(problems: list[Problem], grades: Grades, temperature: int) -> Iterator[dict]:
    """A line of evaluation.jsonl for each completion."""
    for n, (text, answer, outcome) in enumerate(zip(*grades[:3], strict=True)):
        problem = problems[n * len(problems) // len(grades.texts)]
        of_problem = {"question": problem.question, "gold": problem.answer, "temperature": temperature}
        yield of_problem | {"completion": text, "answer": answer, "outcome": outcome}


def majority_is_right(answers: list[str | None], right: list[bool]) -> bool:
    """maj@k: is the most frequent answer right? Completions without an answer do not vote; the first of equals wins."""
    votes = Counter(answer for answer in answers if answer is not None)
    return bool(votes) and right[answers.index(votes.most_common(1)[0][0])]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that k of n samples hold a right one: 1 - C(n-c, k) / C(n, k), unbiased (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): it stays inside [0, 1] and is right near its ends."""
    z, p = 1.96, successes / trials
    centre, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + (z / trials) ** 2 / 4)
    return max(0.0, (centre - spread) / (1 + z * z / trials)), min(1.0, (centre + spread) / (1 + z * z / trials))


def keep_correct(model: Decoder, config: Config) -> dict[str, int]:
    """Offline self-training (ReFT, section 4.2): right completions of the training problems, rows in ReFT's schema.

    Equal ones are kept once, and only what warm-up would learn as it stands: a box, ReFT's last line, or a program.
    """
    if config.data and Path(config.data).resolve() == Path(config.keep_correct).resolve():
        raise InputError(f"--keep-correct is {config.keep_correct}, it must be another file than --data")
    problems = load_problems(config.task, "train", config.data, config.limit, config.engine)
    prompts, sampling = encode_prompts(problems, model, config, config.max_new_tokens), config.sampling(model)
    seeds, size = prompt_seeds(config.seed, len(problems)), max(1, config.max_rows // config.samples)
    file, counts = Path(config.keep_correct), Counter()
    new = make_folder(file.parent) / f".{file.name}.{rank()}"  # each process writes all of it, the first one's is kept
    with new.open("w", encoding="utf-8") as lines:
        for first in tqdm(range(0, len(problems), size), "keep correct", unit="batch", disable=rank() > 0):
            part = slice(first, first + size)
            rollout = sample(model, prompts[part], num_samples=config.samples, seed=seeds[part], **sampling)
            grades = grade(rollout, problems[part], model, config)
            right = [n for n, outcome in enumerate(grades.outcomes) if outcome == "right"]
            counts.update(sampled=len(grades.texts), right=len(right))
            for i, text in dict.fromkeys((first + n // config.samples, grades.texts[n]) for n in right):
                if make_target(replace(problems[i], cot=text), config.engine) == text:
                    counts["kept"] += 1
                    row = {"item_id": f"{config.task}_{i}", "question": problems[i].question, "answer_cot": text}
                    lines.write(json.dumps(row | {"answer_value": problems[i].answer}) + "\n")
    os.replace(new, file) if rank() == 0 else new.unlink()
    print(f"{file}: {counts['right']} of {counts['sampled']} completions are right, {counts['kept']} of them kept")
    return dict(counts)


# ---- groups of runs, tables, figures --------------------------------------------------------------------------------

# they change nothing beyond rounding: a run may be resumed with other values of them
FREE = {"out", "model", "resume", "device", "save_every", "eval_every", "micro_batch", "max_rows"}
FREE |= {"gradient_checkpointing", "unsafe_exec"}


def read_metrics(run: str | Path) -> list[dict]:
    """The records of a run's metrics.jsonl; none where there is no such file."""
    file = Path(run) / "metrics.jsonl"
    with named_in_errors(file):
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written


def settings(run: str | Path) -> dict[str, str]:
    """The flags in run.json and, as "warm-up ...", those of the run that it started from."""
    file = Path(run) / "run.json"
    flags = read_json(file) if file.exists() else {}
    folders = [Path(), *Path(run).resolve().parents] if flags.get("model") else []  # wherever evaluate.py is started
    files = [file for folder in folders if (file := folder / flags["model"] / "run.json").exists()]
    warm_up = read_json(files[0]) if files else {"from": flags.get("model", str(run))}
    flags |= {f"warm-up {name}": value for name, value in warm_up.items() if name not in FREE - {"model"} | {"seed"}}
    return {name: str(value) for name, value in flags.items() if name not in FREE | {"seed"}}


def compare_groups(out: Path, runs: tuple[str, ...], results: list[dict]):
    """Runs that differ in their seed alone make one group; of several groups: a table, study.json, study.png."""
    flags = [settings(run) for run in runs]
    varied = sorted({name for one in flags for name in one if len({other.get(name) for other in flags}) > 1})
    groups: dict[tuple[str, ...], dict[str, list]] = {}  # setting -> number -> its value in each run
    if not 1 < len({tuple(one.get(name) for name in varied) for one in flags}) < len(runs):
        return
    figure, (panel,) = new_figure(1, 9.0, 4.0)
    for run, one, result in zip(runs, flags, results, strict=True):
        setting, records = tuple(one.get(name, "-") for name in varied), read_metrics(run)
        numbers = {name: value for name, value in result.items() if name == "greedy_accuracy" or "@" in name}
        numbers |= {"seconds": records[-1]["seconds"] if records else None}
        kl = [record["kl_behav"] for record in records if record.get("kl_behav") is not None]
        numbers |= {"kl_behav": statistics.mean(kl) if kl else None}
        points = [(r["seconds"], r["greedy_accuracy"]) for r in records if "greedy_accuracy" in r]
        colour = f"C{[*groups, setting].index(setting)}"  # a line a run, a colour a group
        label = None if setting in groups else ", ".join(setting)
        panel.plot(*np.reshape(points, (-1, 2)).T, ".-", color=colour, label=label)
        for name, value in numbers.items():
            groups.setdefault(setting, {}).setdefault(name, []).append(value)
    rows = [dict(zip(varied, setting, strict=True)) | numbers for setting, numbers in sorted(groups.items())]
    print_table(rows)
    write_json(out / "study.json", rows)
    panel.set(xlabel="seconds of training", ylabel="greedy accuracy", ylim=(None, 1.02))
    panel.legend(title=", ".join(varied).replace("_", " "), loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "study.png", dpi=110)
    print(f"figure: {out / 'study.png'}")


def print_table(rows: list[dict]):
    """Rows under the keys of the first one; of a list, mean ± standard deviation (of how many: None does not count)."""

    def cell(value) -> str:
        if isinstance(value, list):
            known = [x for x in value if x is not None]
            deviation = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
            return f"{statistics.mean(known):.3f}{deviation} ({len(known)})" if known else "-"
        if isinstance(value, dict):
            return ", ".join(f"{name} {cell(share)}" for name, share in value.items())
        if isinstance(value, tuple):
            return "-".join(map(cell, value))
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    table = [[name.replace("_", " ") for name in rows[0]], *([cell(row[name]) for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def make_folder(name: str | Path) -> Path:
    """A folder to write to, made and tried out before any work goes into what it is to hold: a file moves over another."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=name) as folder:
            for _ in range(2):  # the second one takes the place of the first
                write_json(Path(folder) / "probe.json", {})
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({error.strerror}); name another folder") from error
    return Path(name)


def new_figure(panels: int, width: float = 4.0, height: float = 2.6):
    """Panels in rows of three, drawn into a file; needs no screen."""
    from matplotlib.figure import Figure  # half a second that a run without a figure does not pay

    columns, rows = min(panels, 3), -(-panels // 3)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, 1 + i) for i in range(panels)]


def draw_curves(run: Path, keys: tuple[str, ...]):
    """curves.png of a training run: one panel a metric over the steps."""
    records = read_metrics(run)
    keys = [key for key in keys if any(record.get(key) is not None for record in records)]
    figure, panels = new_figure(len(keys))
    for panel, key in zip(panels, keys, strict=True):
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else "")
        panel.set(xlabel="step", title=key.replace("_", " "))
    figure.savefig(run / "curves.png", dpi=110)
    print(f"figure: {run / 'curves.png'}")


if __name__ == "__main__":
    parser = HfArgumentParser(Flags, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="directories or hub ids of checkpoints")
    run_script(main, Config, parser)
