"""Greedy accuracy, maj@k and pass@k of any run on any task; tables and figures.

python evaluate.py runs/warmup runs/rl --samples 8
python evaluate.py runs/study/* --samples 8             runs that differ in more than their seed are compared as groups
"""

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import HfArgumentParser

from model import Decoder, find_checkpoint, load, read_json, write_json
from processes import rank
from reward import Problem, load_problems
from rollout import (
    SharedConfig,
    check,
    encode_prompts,
    flag,
    grade,
    make_folder,
    new_figure,
    print_table,
    run_script,
    sample_together,
)


@dataclass
class Flags(SharedConfig):
    """Flags of evaluate.py."""

    out: str = flag("runs", "folder of the figure, evaluation.png")
    task: str | None = flag(None, "the task (default: the one that the run was trained on, else toy)")
    engine: str | None = flag(None, "nl or python (default: the one that the run was trained with, else nl)")
    prompt_style: str | None = flag(None, "auto, reft or chat (default: as the run was trained, else auto)")
    samples: int = flag(0, "also sample so many completions a problem at temperature 1, for maj@k and pass@k")
    seed: int = flag(0, "seed of those samples")

    def __post_init__(self):
        super().__post_init__()
        check(self, "samples", self.samples >= 0, "at least 0")
        check(self, "seed", self.seed >= 0, "at least 0")


@dataclass
class Config(Flags):
    """Flags and the positional arguments."""

    runs: tuple[str, ...] = ()  # directories or hub ids


def main(config: Config) -> list[dict]:
    """Evaluate every run, write its evaluation.json, print one table, draw one figure."""
    for run in config.runs:
        find_checkpoint(run)  # a wrong name is refused now, not after an hour
    out, results = make_folder(config.out), []
    for run in config.runs:
        trained = read_json(Path(run) / "run.json") if (Path(run) / "run.json").exists() else {}
        same = config.task in (None, trained.get("task"))  # another task has other test problems and lengths
        names = ("test_data", "max_new_tokens") if same else ()
        asked = {name: getattr(config, name) or trained.get(name) for name in names}
        task, engine = config.task or trained.get("task", "toy"), config.engine or trained.get("engine", "nl")
        style = config.prompt_style or trained.get("prompt_style", "auto")
        one = replace(config, task=task, engine=engine, prompt_style=style, **asked)
        problems = load_problems(task, "test", one.test_data, one.limit, engine)
        model, tokenizer, eos_ids = load(run, one.device, one.dtype)
        results.append(evaluate(model, tokenizer, eos_ids, problems, one, one.samples, one.seed))
        if Path(run).is_dir() and rank() == 0:
            write_json(Path(run) / "evaluation.json", results[-1])
    if rank() > 0:
        return results
    ks = powers_of_two(config.samples)
    header = ["run", "task", "problems", "greedy accuracy", "95% interval", "length"]
    rows = []
    for run, result in zip(config.runs, results, strict=True):
        low, high = result["greedy_interval"]
        cells = [run, result["task"], result["problems"], f"{result['greedy_accuracy']:.3f}", f"{low:.3f}-{high:.3f}"]
        cells += [f"{result['greedy_length']:.1f}"]
        rows.append(cells + [f"{result[f'{kind}@{k}']:.3f}" for kind in ("maj", "pass") for k in ks])
    print_table(header + [f"{kind}@{k}" for kind in ("maj", "pass") for k in ks], rows)
    draw_results(out, config, results)
    groups = group_runs(config.runs, results)
    if 1 < len(groups) < len(config.runs):
        print_groups(groups)
        write_json(out / "study.json", groups)
        draw_groups(out, groups)
    return results


def evaluate(
    model: Decoder,
    tokenizer,
    eos_ids: list[int],
    problems: list[Problem],
    config: SharedConfig,
    samples: int = 0,
    seed: int = 0,
) -> dict:
    """What evaluation.json holds: greedy accuracy of the full model and, from `samples` completions, maj@k and pass@k."""
    prompts = encode_prompts(problems, tokenizer, model, eos_ids, config)
    shared = {
        "max_new_tokens": config.max_new_tokens,
        "eos_id": eos_ids,
        "pad_id": eos_ids[0],
        "max_rows": config.max_rows,
    }
    rollout = sample_together(model, prompts, temperature=0, **shared)
    right = int((grade(rollout, problems, tokenizer, config).rewards == 1).sum())
    result = {
        "task": config.task,
        "problems": len(problems),
        "greedy_accuracy": right / len(problems),
        "greedy_interval": wilson(right, len(problems)),
        "greedy_length": (rollout.lengths - rollout.prompt_lens).double().mean().item(),
    }
    if samples:
        rollout = sample_together(model, prompts, num_samples=samples, seed=seed, **shared)
        grades = grade(rollout, problems, tokenizer, config)
        right = (grades.rewards == 1).tolist()
        spans = [slice(i, i + samples) for i in range(0, len(right), samples)]  # the samples of each problem
        groups = [(grades.answers[span], right[span]) for span in spans]
        for k in powers_of_two(samples):
            result[f"maj@{k}"] = sum(majority_is_right(a[:k], r[:k]) for a, r in groups) / len(groups)
            result[f"pass@{k}"] = sum(pass_at_k(samples, sum(r), k) for _, r in groups) / len(groups)
    return result


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`, and `samples` itself."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples}) if samples else []


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
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, (centre - spread) / (1 + z * z / trials)), min(1.0, (centre + spread) / (1 + z * z / trials))


def report(result: dict, seconds: float) -> str:
    """The line that a training stage ends with."""
    low, high = result["greedy_interval"]
    return (
        f"greedy accuracy on {result['problems']} test problems: {result['greedy_accuracy']:.3f} "
        f"(95% interval {low:.3f}-{high:.3f}); trained for {seconds:.0f} s"
    )


def read_metrics(run: str | Path) -> list[dict]:
    """The records of a run's metrics.jsonl; none where there is no such file."""
    file = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- groups of runs -------------------------------------------------------------------------------------------------

TARGET = 0.9  # the greedy accuracy whose time is taken
NOT_A_SETTING = {"seed", "out", "model", "resume", "device", "save_every", "eval_every", "micro_batch", "max_rows"}


def settings(run: str | Path) -> dict:
    """The flags in run.json and, as "warm-up ...", those of the run that it started from."""
    file = Path(run) / "run.json"
    flags = read_json(file) if file.exists() else {}
    before = Path(flags.get("model") or "") / "run.json"
    warm_up = read_json(before) if flags.get("model") and before.exists() else {}
    return flags | {f"warm-up {name}": value for name, value in warm_up.items() if name not in NOT_A_SETTING}


def group_runs(runs: tuple[str, ...], results: list[dict]) -> list[dict]:
    """Runs that differ in nothing but their seed make one group: its settings that other groups do not share, and what
    its runs reached, a list each.

    seconds_to_target: seconds of training, evaluations left out, until a greedy evaluation reached TARGET; None: never.
    """
    flags = [settings(run) for run in runs]
    names = sorted({name for one in flags for name in one} - NOT_A_SETTING)
    varied = [name for name in names if len({repr(one.get(name)) for one in flags}) > 1]
    groups: dict[str, dict] = {}
    for run, one, result in zip(runs, flags, results, strict=True):
        setting = {name: one.get(name) for name in varied}
        group = groups.setdefault(repr(setting), {"setting": setting, "runs": [], "curves": []})
        records = read_metrics(run)
        curve = [(r["seconds"], r["greedy_accuracy"]) for r in records if r.get("greedy_accuracy") is not None]
        reached = {kind: value for kind, value in result.items() if kind == "greedy_accuracy" or "@" in kind}
        reached["seconds_to_target"] = next((seconds for seconds, accuracy in curve if accuracy >= TARGET), None)
        reached["seconds"] = records[-1]["seconds"] if records else None
        for name in ("kl_behav", "ess_tokens"):
            values = [record[name] for record in records if record.get(name) is not None]
            reached[name] = sum(values) / len(values) if values else None
        for name, value in reached.items():
            group.setdefault(name, []).append(value)
        group["runs"].append(str(run))
        group["curves"].append(curve)
    return sorted(groups.values(), key=lambda group: [str(value) for value in group["setting"].values()])


def mean_and_sd(values: list[float | None], digits: int = 3) -> str:
    """Mean and standard deviation of what was reached, and by how many of the runs where some did not."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.{digits}f}"
    text += f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def print_groups(groups: list[dict]):
    """One row a group: what distinguishes it, and mean ± standard deviation over its runs."""
    varied = list(groups[0]["setting"])
    columns = {"greedy_accuracy": ("greedy accuracy", 3)}
    columns |= {name: (name, 3) for name in groups[0] if "maj@" in name}
    columns |= {"seconds_to_target": (f"seconds to {TARGET:g}", 1), "seconds": ("seconds", 1)}
    columns |= {"kl_behav": ("KL/token", 4), "ess_tokens": ("token ESS", 2)}
    rows = []
    for group in groups:
        cells = ["-" if value is None else value for value in group["setting"].values()]
        cells += [mean_and_sd(group[name], digits) for name, (_, digits) in columns.items()]
        rows.append([*cells, len(group["runs"])])
    print_table([*(name.replace("_", " ") for name in varied), *(title for title, _ in columns.values()), "runs"], rows)


def draw_groups(out: Path, groups: list[dict]):
    """study.png: greedy accuracy over the seconds of training, one line a group; its runs are averaged point by point."""
    figure, (panel,) = new_figure(1, width=9.0)
    figure.set_figheight(max(4.0, 0.25 * len(groups)))  # the legend has a line a group
    for group in groups:
        curves = [curve for curve in group["curves"] if curve]
        if curves:
            points = [[statistics.mean(axis) for axis in zip(*at, strict=True)] for at in zip(*curves, strict=False)]
            panel.plot(*zip(*points, strict=True), ".-", label=", ".join(map(str, group["setting"].values())))
    panel.set(xlabel="seconds of training", ylabel="greedy accuracy", ylim=(None, 1.02))
    panel.grid(alpha=0.3)
    panel.legend(title=", ".join(groups[0]["setting"]).replace("_", " "), loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "study.png", dpi=120)
    print(f"figure: {out / 'study.png'}")


def draw_curves(run: Path, keys: tuple[str, ...]):
    """curves.png of a training run: one panel a metric over the steps."""
    records = read_metrics(run)
    keys = tuple(key for key in keys if any(key in record for record in records))
    figure, panels = new_figure(len(keys))
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for panel, key in zip(panels, keys, strict=False):
        points = [(record["step"], record[key]) for record in records if key in record]
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else "")
        panel.set(xlabel="step", title=key.replace("_", " "))
        panel.grid(alpha=0.3)
    figure.savefig(run / "curves.png", dpi=110)


def draw_results(out: Path, config: Config, results: list[dict]):
    """evaluation.png: greedy accuracy with its interval beside maj@k and pass@k of every run."""
    figure, (panel,) = new_figure(1, width=max(6.0, 1.6 * len(results) + 2))
    kinds = ["greedy", *(f"{kind}@{config.samples}" for kind in ("maj", "pass") if config.samples)]
    for j, kind in enumerate(kinds):
        heights = [result["greedy_accuracy"] if kind == "greedy" else result[kind] for result in results]
        centres = [i + 0.8 / len(kinds) * (j - (len(kinds) - 1) / 2) for i in range(len(results))]
        panel.bar(centres, heights, 0.75 / len(kinds), label=kind)
        if kind == "greedy":
            bounds = [result["greedy_interval"] for result in results]
            errors = [[h - low for h, (low, _) in zip(heights, bounds, strict=True)]]
            errors += [[high - h for h, (_, high) in zip(heights, bounds, strict=True)]]
            panel.errorbar(centres, heights, errors, fmt="none", ecolor="black", capsize=3)
    panel.set_xticks(range(len(results)), config.runs)
    panel.set(ylim=(0, 1.02), ylabel="accuracy", title=", ".join(sorted({result["task"] for result in results})))
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "evaluation.png", dpi=120)
    print(f"figure: {out / 'evaluation.png'}")


def make_parser() -> HfArgumentParser:
    """The flags and, in front of them, the runs."""
    parser = HfArgumentParser(Flags, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="directories or hub ids of checkpoints")
    return parser


if __name__ == "__main__":
    run_script(main, Config, make_parser())
