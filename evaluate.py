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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm
from transformers import HfArgumentParser

from model import Decoder, check_checkpoint, load, named_in_errors, rank, read_json, write_json
from reward import TASKS, InputError, Problem, load_problems, make_target
from rollout import SharedConfig, encode_prompts, flag, grade, prompt_seeds, run_script, sample


@dataclass
class Flags(SharedConfig):
    """Flags of evaluate.py."""

    out: str = flag("runs", "folder of study.json and study.png, where runs make groups")
    task: Literal[TASKS] | None = flag(None, "default: the one that the run was trained on, else toy")
    engine: Literal["nl", "python"] | None = flag(None, "default: the one that the run was trained with, else nl")
    prompt_style: Literal["auto", "reft", "chat"] | None = flag(None, "default: as the run was trained, else auto")
    samples: int = flag(0, "also sample so many completions a problem at temperature 1, for maj@k and pass@k")
    keep_correct: str | None = flag(None, "FILE: write right completions of the training problems to it instead")
    data: str | None = flag(None, "training problems of --keep-correct (default: the usual ones of the task)")
    seed: int = flag(0, "seed of those samples")


@dataclass
class Config(Flags):
    """Flags and the positional arguments."""

    runs: tuple[str, ...] = ()  # directories or hub ids

    def __post_init__(self):
        super().__post_init__()
        if self.keep_correct is not None and (len(self.runs) > 1 or self.samples < 1):
            raise InputError("--keep-correct FILE takes one run and --samples of 1 or more")
        if self.data and self.keep_correct and Path(self.data).resolve() == Path(self.keep_correct).resolve():
            raise InputError(f"--keep-correct is {self.keep_correct}, it must be another file than --data")


def main(config: Config) -> list[dict]:
    """Evaluate every run, write its evaluation.json, print one table; compare groups of runs."""
    for run in config.runs:
        check_checkpoint(run)  # a wrong name is refused now, not after an hour
    out, results = make_folder(config.out), []
    for run in config.runs:
        one = as_trained(config, run)
        model = load(run, one.device, one.dtype)
        if one.keep_correct is not None:
            return [keep_correct(model, one)]
        problems = load_problems(one.task, "test", one.test_data, one.limit, one.engine)
        results.append(evaluate(model, problems, one, one.samples, one.seed))
        if Path(run).is_dir() and rank() == 0:
            write_json(Path(run) / "evaluation.json", results[-1])
    if rank() == 0:
        print_table([{"run": run, **result} for run, result in zip(config.runs, results, strict=True)])
        compare_groups(out, config.runs, results)
    return results


def as_trained(config: Config, run: str) -> Config:
    """The flags with which a run is evaluated: those that were not given are the ones it was trained with."""
    trained = read_json(Path(run) / "run.json") if (Path(run) / "run.json").exists() else {}
    defaults = {"task": "toy", "engine": "nl", "prompt_style": "auto"}
    if config.task in (None, trained.get("task")):  # another task has other test problems and lengths
        defaults |= {"test_data": None, "max_new_tokens": None}
    flags = {name: getattr(config, name) or trained.get(name, default) for name, default in defaults.items()}
    return replace(config, **flags)


def evaluate(model: Decoder, problems: list[Problem], config: SharedConfig, samples: int = 0, seed: int = 0) -> dict:
    """What evaluation.json holds: greedy accuracy of the full model and, from `samples` completions, maj@k and pass@k."""
    prompts, sampling = encode_prompts(problems, model, config, config.max_new_tokens), config.sampling(model)
    rollout = sample(model, prompts, temperature=0, **sampling)
    right = int((grade(rollout, problems, model, config).rewards == 1).sum())
    result = {
        "task": config.task,
        "problems": len(problems),
        "greedy_accuracy": right / len(problems),
        "greedy_interval": wilson(right, len(problems)),
        "greedy_length": (rollout.lengths - rollout.prompt_lens).double().mean().item(),
    }
    if samples:
        grades = grade(sample(model, prompts, num_samples=samples, seed=seed, **sampling), problems, model, config)
        right = (grades.rewards == 1).tolist()
        spans = [slice(i, i + samples) for i in range(0, len(right), samples)]  # the samples of each problem
        of_problem = [(grades.answers[span], right[span]) for span in spans]
        for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):  # 1, 2, 4, ... and all
            result[f"maj@{k}"] = sum(majority_is_right(a[:k], r[:k]) for a, r in of_problem) / len(of_problem)
            result[f"pass@{k}"] = sum(pass_at_k(samples, sum(r), k) for _, r in of_problem) / len(of_problem)
    return result


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


# ---- groups of runs -------------------------------------------------------------------------------------------------

NOT_A_SETTING = {"seed", "out", "model", "resume", "device", "save_every", "eval_every", "micro_batch", "max_rows"}


def read_metrics(run: str | Path) -> list[dict]:
    """The records of a run's metrics.jsonl; none where there is no such file."""
    file = Path(run) / "metrics.jsonl"
    with named_in_errors(file):
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def settings(run: str | Path) -> dict[str, str]:
    """The flags in run.json and, as "warm-up ...", those of the run that it started from."""
    file = Path(run) / "run.json"
    flags = read_json(file) if file.exists() else {}
    before = Path(flags.get("model") or "") / "run.json"
    warm_up = read_json(before) if flags.get("model") and before.exists() else {"from": flags.get("model", str(run))}
    flags |= {f"warm-up {name}": value for name, value in warm_up.items() if name not in NOT_A_SETTING - {"model"}}
    return {name: str(value) for name, value in flags.items() if name not in NOT_A_SETTING}


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
    save(figure, out / "study.png")


def print_table(rows: list[dict]):
    """Rows under the keys of the first one; of a list, mean ± standard deviation (of how many: None does not count)."""

    def cell(value) -> str:
        if isinstance(value, list):
            known = [x for x in value if x is not None]
            deviation = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
            return f"{statistics.mean(known):.3f}{deviation} ({len(known)})" if known else "-"
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


# ---- figures --------------------------------------------------------------------------------------------------------


def new_figure(panels: int, width: float = 4.0, height: float = 2.6):
    """Panels in rows of three, drawn into a file; needs no screen."""
    from matplotlib.figure import Figure  # half a second that a run without a figure does not pay

    columns, rows = min(panels, 3), -(-panels // 3)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, 1 + i) for i in range(panels)]


def save(figure, file: Path):
    """Write a figure and say where it is."""
    figure.savefig(file, dpi=110)
    print(f"figure: {file}")


def draw_curves(run: Path, keys: tuple[str, ...]):
    """curves.png of a training run: one panel a metric over the steps."""
    records = read_metrics(run)
    keys = [key for key in keys if any(record.get(key) is not None for record in records)]
    figure, panels = new_figure(len(keys))
    for panel, key in zip(panels, keys, strict=True):
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else "")
        panel.set(xlabel="step", title=key.replace("_", " "))
    save(figure, run / "curves.png")


if __name__ == "__main__":
    parser = HfArgumentParser(Flags, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="directories or hub ids of checkpoints")
    run_script(main, Config, parser)
