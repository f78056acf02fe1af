"""Greedy accuracy, maj@k, pass@k, rerank@k of any run on any task; self-training data; figures.

    python evaluate.py runs/warmup runs/rl --samples 8
    python evaluate.py runs/warmup --samples 8 --rerank runs/verifier
    python evaluate.py runs/w --samples 8 --limit 1000 --keep-correct right.jsonl

Samples are drawn at temperature 1. maj@k votes on the answers, in one spelling, of disjoint blocks
of k samples; completions without an answer do not vote, and the first of equals wins. rerank@k
takes the completion of a block, among those with an answer, that a verifier finds best
(verifier.py).
The third command writes right completions of the training problems as training problems (ReFT,
section 4.2).
"""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from model import (
    Decoder,
    all_gather,
    load,
    named_in_errors,
    rank,
    unsharded,
    world_size,
    write_json,
)
from reward import HUB, InputError, Problem, make_target, to_problem
from rollout import (
    MAX_SEED,
    OUTCOMES,
    SharedConfig,
    encode_prompts,
    fitting,
    flag,
    grade,
    load_split,
    new_parser,
    prompt_seeds,
    run_script,
    sample,
)


def evaluate(
    model: Decoder,
    problems: list[Problem],
    config: SharedConfig,
    samples: int = 0,
    seed: int = 0,
    out: Path | None = None,
    rerank: Callable | None = None,
) -> dict:
    """Greedy accuracy, and maj@k and pass@k from `samples` completions a problem.

    out: the folder for evaluation.json and, with a line a completion, evaluation.jsonl.
    rerank: gives the scores of rerank@k, from problems and grades; see `rerank_scores`.
    """
    prompts = encode_prompts(problems, model, config)
    fitting(prompts, model, config.max_new_tokens, is_training=False)
    rollout = sample(model, prompts, temperature=0, **config.sampling(model))
    grades = grade(rollout, problems, model, config)
    counts = Counter(grades.outcomes)
    right = counts["right"]
    result = {
        "task": config.task,
        "problems": len(problems),
        "greedy_accuracy": right / len(problems),
        "greedy_interval": wilson(right, len(problems)),
        "greedy_length": (rollout.lengths - rollout.prompt_lens).double().mean().item(),
        "greedy_outcomes": {n: counts[n] / len(problems) for n in OUTCOMES if n in counts},
    }
    lines = list(completion_lines(problems, grades, temperature=0))
    if samples:
        sampling = config.sampling(model)
        rollout = sample(model, prompts, num_samples=samples, seed=seed, **sampling)
        grades = grade(rollout, problems, model, config)
        lines += completion_lines(problems, grades, temperature=1)
        scores = rerank(problems, grades) if rerank else None
        result.update(sampled_accuracy(grades, samples, scores))
    if out is not None and rank() == 0:
        try:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / "evaluation.jsonl").write_text(text)
            write_json(out / "evaluation.json", result)
        except OSError as error:  # the numbers are not lost with it
            print(f"warning: {out}: the evaluation cannot be written ({error.strerror})")
    return result


def sampled_accuracy(grades, samples, scores=None):
    """maj@k, pass@k and, with scores, rerank@k for k = 1, 2, 4, ... and all samples.

    Rows are ordered by problem.
    """
    sizes = {2**i for i in range(samples.bit_length())} | {samples}
    is_right = [outcome == "right" for outcome in grades.outcomes]
    result = {}
    for k in sorted(sizes):
        votes, passes, best = [], [], []
        for start in range(0, len(is_right), samples):
            for block in range(start, start + samples - k + 1, k):
                span = slice(block, block + k)
                votes.append(majority_is_right(grades.answers[span], is_right[span]))
                if scores is not None:
                    winner = max(range(block, block + k), key=scores.__getitem__)
                    best.append(is_right[winner])  # no answer in the block: not right
            passes.append(pass_at_k(samples, sum(is_right[start : start + samples]), k))
        result[f"maj@{k}"] = sum(votes) / len(votes)
        result[f"pass@{k}"] = sum(passes) / len(passes)
        if scores is not None:
            result[f"rerank@{k}"] = sum(best) / len(best)
    return result


def majority_is_right(answers: list[str | None], is_right: list[bool]) -> bool:
    """maj@k: whether the most frequent answer is right."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return is_right[answers.index(winner)]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that k of n samples hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased (arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): it stays inside [0, 1] and is right near its ends."""
    z, p = 1.96, successes / trials
    centre = p + z**2 / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z**2 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def completion_lines(problems, grades, temperature):
    """A line of evaluation.jsonl for each completion."""
    samples = len(grades.texts) // len(problems)
    for n, text in enumerate(grades.texts):
        problem = problems[n // samples]
        yield {
            "question": problem.question,
            "gold": problem.answer,
            "temperature": temperature,
            "completion": text,
            "answer": grades.answers[n],
            "outcome": grades.outcomes[n],
        }


# ---- reranking by a verifier ---------------------------------------------------------------------

READ_TOKENS = 700  # of prompt and completion that a verifier reads (ReFT's script)


def read_limit(verifier: Decoder) -> int:
    """How many tokens of a row it reads: READ_TOKENS, or as many as its context has."""
    return min(READ_TOKENS, verifier.config.max_positions)


def rerank_scores(verifier, config, problems, grades):
    """The score of every completion, -inf where it has no answer; equal texts are read once.

    config: of the verifier, whose prompts and tokens may be others than those of the run.
    """
    prompts = encode_prompts(problems, verifier, config)
    completions = verifier.encode(grades.texts)
    samples = len(completions) // len(prompts)
    rows = [(*prompts[n // samples], *ids) for n, ids in enumerate(completions)]
    distinct = list(dict.fromkeys(rows))
    score_of = dict(zip(distinct, verifier_scores(verifier, distinct), strict=True))
    # by the answer: a completion that was cut can have the text of one that ended
    return [
        -math.inf if answer is None else score_of[row]
        for row, answer in zip(rows, grades.answers, strict=True)
    ]


@torch.no_grad()
def verifier_scores(verifier: Decoder, rows: list) -> list[float]:
    """The logit of being right, V_phi at the last token, of each row of token ids."""
    scores = []
    limit = read_limit(verifier)
    with unsharded(verifier), verifier.mixed_precision():  # keeps the bf16 copies of the weights
        for row in rows[rank() :: world_size()]:
            tokens = torch.tensor([row[:limit]], device=verifier.device)
            last = verifier(tokens)[0, -1]  # (d,)
            scores.append(verifier.values(last).item())
    parts = all_gather(scores)  # each process has read every n-th row
    return [parts[n % world_size()][n // world_size()] for n in range(len(rows))]


# ---- the script ----------------------------------------------------------------------------------


@dataclass
class Flags:
    """Flags of evaluate.py itself."""

    samples: int = flag(0, "also sample so many completions a problem, for maj@k and pass@k", low=0)
    out: str = flag("runs", "folder for evaluations of models whose own folder is no run")
    seed: int = flag(0, "seed of the samples", low=0, high=MAX_SEED)
    rerank: str | None = flag(None, "VERIFIER: a run of verifier.py, for rerank@k")
    keep_correct: str | None = flag(
        None, "FILE: write right completions of the training problems to it instead"
    )
    kept_samples: int = flag(10, "at most so many of them a problem (ReFT: 10)", low=1)
    labels: bool = flag(
        False, "with --keep-correct: write every completion, label 1 if right, for verifier.py"
    )
    data: str | None = flag(None, "training problems of --keep-correct (default: the run's)")
    limit: int | None = flag(None, "use only the first so many of them", low=1)


@dataclass
class ParsedFlags(SharedConfig, Flags):
    """What the parser fills in; each run is asked for what it was trained on."""

    takes_one_model = False


@dataclass
class Config(ParsedFlags):
    """The flags and the positional arguments."""

    runs: tuple[str, ...] = ()  # directories or hub ids

    def __post_init__(self):
        super().__post_init__()
        if self.keep_correct is None and (self.limit or self.data or self.labels):
            flags = "--limit, --data and --labels"
            raise InputError(f"{flags} are for --keep-correct FILE; take --test-limit")
        if self.rerank is not None and not self.samples:
            raise InputError("--rerank VERIFIER takes --samples of 1 or more")
        if self.keep_correct is not None and (len(self.runs) > 1 or not self.samples):
            raise InputError("--keep-correct FILE takes one run and --samples of 1 or more")


def main(config: Config) -> list[dict]:
    """Evaluate every run, write its evaluation.json, print one table."""
    configs = [replace(config) for _ in config.runs]
    for run, run_config in zip(config.runs, configs, strict=True):
        run_config.inherit(run)  # refuses a wrong name now, not after an hour
    if config.keep_correct is not None:
        model = load(config.runs[0], config.device, config.dtype)
        return [keep_correct(model, configs[0])]
    folders = [evaluation_folder(run, config) for run in config.runs]
    if len(set(folders)) < len(folders):
        raise InputError("two of the runs would write to the same folder; take them by turns")
    for folder in folders:
        make_folder(folder)
    rerank = None
    if config.rerank:
        verifier_config = replace(config)
        verifier_config.inherit(config.rerank)
        verifier = load(config.rerank, config.device, config.dtype)
        if not verifier.value_head.weight.any():
            raise InputError(f"--rerank {config.rerank}: no run of verifier.py, its V is 0")
        rerank = partial(rerank_scores, verifier, verifier_config)
    splits = [load_split(run_config, "test") for run_config in configs]
    rows = []
    for run, run_config, folder, problems in zip(
        config.runs, configs, folders, splits, strict=True
    ):
        model = load(run, config.device, config.dtype)
        result = evaluate(model, problems, run_config, config.samples, config.seed, folder, rerank)
        rows.append({"run": run, **result})
    print_table(rows)
    return rows


def evaluation_folder(run, config):
    """A run's own folder; no other model's folder is written to."""
    if (Path(run) / "run.json").exists() and os.access(run, os.W_OK):
        return Path(run)
    return Path(config.out) / f"evaluation-{run.strip('./').replace('/', '-')}"


def keep_correct(model: Decoder, config: Config) -> dict[str, int]:
    """Offline self-training (ReFT, section 4.2): right completions of the training problems.

    Of each problem at most --kept-samples different ones, drawn at random, and only what warm-up
    learns as it stands (a box, ReFT's last line, or a program; in a chat that line becomes a box);
    and the annotated one, if it is not among them. Rows have ReFT's fields. With --labels: every
    different completion, and its label.
    """
    file = Path(config.keep_correct)
    if file.is_dir() or (config.data and Path(config.data).resolve() == file.resolve()):
        raise InputError(f"--keep-correct is {file}, it must be a file, and another than --data")
    problems = load_split(config, "train")
    prompts = encode_prompts(problems, model, config)
    kept = fitting(prompts, model, config.max_new_tokens, is_training=True)
    seeds = prompt_seeds(config.seed, len(problems))
    size = max(1, world_size() * config.max_rows // config.samples)
    counts = Counter()
    new = make_folder(file.parent) / f".{file.name}.new"
    with open(new if rank() == 0 else os.devnull, "w", encoding="utf-8") as lines:
        starts = range(0, len(kept), size)
        for start in tqdm(starts, "keep correct", unit="batch", disable=rank() > 0):
            indices = kept[start : start + size]
            part = [problems[i] for i in indices]
            rollout = sample(
                model,
                [prompts[i] for i in indices],
                num_samples=config.samples,
                seed=[seeds[i] for i in indices],
                **config.sampling(model),
            )
            grades = grade(rollout, part, model, config)
            counts["sampled"] += len(grades.texts)
            counts["right"] += grades.outcomes.count("right")
            for n, i in enumerate(indices):
                own = slice(n * config.samples, (n + 1) * config.samples)
                outcomes = {}
                for text, outcome in zip(grades.texts[own], grades.outcomes[own], strict=True):
                    if outcomes.get(text) != "right":  # it may come again, cut
                        outcomes[text] = outcome
                texts = kept_texts(problems[i], outcomes, config)
                counts["kept"] += len(texts)
                for text in texts:
                    row = {"item_id": f"{config.task}_{i}", **row_of(problems[i], text)}
                    if config.labels:
                        row["label"] = int(outcomes[text] == "right")
                    lines.write(json.dumps(row) + "\n")
    if rank() == 0:
        os.replace(new, file)
    shares = f"{counts['right']} of {counts['sampled']} completions are right"
    annotated = "" if config.labels else ", the annotated ones among them"
    print(f"{file}: {shares}, {counts['kept']} are kept{annotated}")
    return dict(counts)


def kept_texts(problem, outcomes, config):
    """The texts to write: right ones that warm-up learns as they stand, and the annotated one.

    outcomes: text -> outcome, of all samples of the problem. With --labels: every text.
    """
    if config.labels:
        return list(outcomes)
    whole = [
        text
        for text, outcome in outcomes.items()
        if outcome == "right" and is_learned(problem, text, config)
    ]
    kept = whole[: config.kept_samples]  # samples come in random order
    annotated = make_target(problem, config.engine)
    if problem.cot and annotated not in kept:
        kept.append(annotated)
    return kept


def row_of(problem, text):
    """A training problem as a row of ReFT's data."""
    return {
        "question": problem.question,
        "answer_cot": text,
        "answer_value": problem.answer,
    }


def is_learned(problem, text, config):
    """Whether warm-up learns this text as it stands, from a row of it."""
    task = config.task if config.task in HUB else "gsm8k"  # toy tasks have no rows of their own
    try:
        again = to_problem(row_of(problem, text), task, "train", config.engine, "")
    except InputError:
        return False
    return make_target(again, config.engine) == text


# ---- tables, figures, folders --------------------------------------------------------------------


def print_table(rows):
    """Rows under the keys of the first one."""
    table = [[name.replace("_", " ") for name in rows[0]]]
    table += [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def cell(value):
    """A number with three decimals, an interval, or shares with their names."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(share)}" for name, share in value.items())
    if isinstance(value, tuple):
        return "-".join(map(cell, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def read_metrics(run):
    """The records of a run's metrics.jsonl; none where there is no such file."""
    file = Path(run) / "metrics.jsonl"
    with named_in_errors(file):
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        # The last line may be half written.
        return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curves(run, names):
    """curves.png of a training run: one panel a metric over the steps."""
    from matplotlib.figure import Figure  # half a second that a run without a figure does not pay

    records = read_metrics(run)
    names = [name for name in names if any(r.get(name) is not None for r in records)]
    if not names:
        return
    rows = math.ceil(len(names) / 3)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for place, name in enumerate(names, 1):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        panel = figure.add_subplot(rows, 3, place)
        panel.plot(*zip(*points, strict=True), ".-")
        panel.set(xlabel="step", title=name.replace("_", " "))
    figure.savefig(run / "curves.png", dpi=110)
    print(f"figure: {run / 'curves.png'}")


def make_folder(name):
    """A folder to write to, made and tried out before any work goes into what it is to hold."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=name) as folder:
            for _ in range(2):  # the second file takes the place of the first
                write_json(Path(folder) / "probe.json", {})
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({error.strerror}); name another") from error
    return Path(name)


if __name__ == "__main__":
    parser = new_parser(ParsedFlags)
    parser.add_argument("runs", nargs="+", help="directories or hub ids of checkpoints")
    run_script(main, Config, parser)
