"""ReFT's reward model: it tells right completions from wrong ones, and reranks samples by that.

    python evaluate.py runs/warmup --samples 8 --limit 1000 --keep-correct labelled.jsonl --labels
    python verifier.py --data labelled.jsonl
    python evaluate.py runs/warmup --samples 8 --rerank runs/verifier

ReFT samples 100 completions of every training problem, and reranks 100 of a test problem. The whole
model is trained, with its value head as the classifier of the last token (section 4.3). It starts
from a warm-up model, as in the paper; the authors' code starts from the model whose samples are
reranked (SFT or ReFT). Departures: one logit that starts at 0 (their code: two, at random), and the
last checkpoint counts, not the best one on the test set.
"""

import shlex
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evaluate import read_limit, verifier_scores
from model import all_reduce, load, named_in_errors, rank, write_json
from reward import TOY_STEPS, InputError, Problem, read_json_rows
from rollout import encode_prompts, flag, run_script
from warmup import (
    Run,
    TrainConfig,
    batch_indices,
    check_batch,
    collate,
    fingerprint,
    learning_rate,
    micro_batches,
)


def verifier_step(run: Run, examples: list, lr: float) -> tuple[float, float]:
    """One optimizer step on the binary cross-entropy; returns it and the norm of its gradient.

    examples: (token ids, label) pairs, label True where the completion is right.
    """
    rows_of_ids = [(ids, []) for ids, _ in examples]
    tokens, lengths, _ = collate(rows_of_ids, run.device)  # (N, T), (N,)
    is_right = [float(label) for _, label in examples]
    labels = torch.tensor(is_right, device=run.device)  # (N,)
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
    for rows, T in micro_batches(lengths, run.config.micro_batch):
        hidden = run.model(tokens[rows, :T])  # (n, T, d)
        last = hidden[torch.arange(len(rows)), lengths[rows] - 1]  # (n, d)
        logits = run.model.values(last)  # (n,): of being right
        targets = labels[rows].to(logits.dtype)  # (n,)
        loss_of_rows = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        loss = loss_of_rows / len(examples)  # of the whole step, as in `supervised_step`
        loss.backward()
        loss_sum += loss.detach()
    return all_reduce(loss_sum).item(), run.update(lr, loss_sum)


def main(config: "Config") -> dict:
    """Train, evaluate on completions of held-out questions, save."""
    model = load(config.model, config.device, config.dtype)
    model.linear_maps = model.hf_config.layer_kl = None  # it never skips
    for parameter in model.value_head.parameters():
        torch.nn.init.zeros_(parameter)  # --model may be a run with a critic
    examples, held_out = labelled_examples(config, model)
    check_batch("--batch", config.batch, examples)
    steps = config.steps or max(1, round(config.epochs * len(examples) / config.batch))
    contents = fingerprint(examples, [], model)
    run = VerifierRun("verifier", config, model, contents, steps, tests=held_out)
    for step in run.steps():
        chosen = batch_indices(config.seed, step, config.batch, len(examples))
        lr = learning_rate(config, step, steps)
        loss, grad_norm = verifier_step(run, [examples[i] for i in chosen], lr)
        run.stop_clock()
        numbers = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
        }
        if run.is_evaluation_due(step):
            numbers.update(run.evaluate())
        run.record(numbers)
        if run.is_save_due(step):
            run.save()
    words = ["python", "evaluate.py", config.model, "--samples", "8", "--rerank", config.out]
    return run.finish(("loss", "accuracy"), shlex.join(words))


class VerifierRun(Run):
    """A run whose evaluation asks which completions of the held-out questions are right."""

    def evaluate(self, out=None):
        """Accuracy on the held-out completions, and that of always guessing the commoner label."""
        rows, labels = zip(*self.tests, strict=True)
        scores = verifier_scores(self.model, rows)
        pairs = zip(scores, labels, strict=True)
        hits = sum((score > 0) == label for score, label in pairs)
        share = sum(labels) / len(labels)
        result = {
            "accuracy": hits / len(labels),
            "guessing": max(share, 1 - share),
        }
        if out is not None and rank() == 0:
            write_json(out / "evaluation.json", result)
        return result


def labelled_examples(config, model):
    """(token ids, label) pairs: for training, and held out, of the last tenth of the questions.

    InputError for a file that `evaluate.py --labels` did not write, or that has one label only.
    """
    rows = [row for _, row in read_json_rows(config.data)][: config.limit]
    with named_in_errors(config.data):
        problems = [Problem(row["question"], row["answer_cot"], "") for row in rows]
        labels = [row["label"] == 1 for row in rows]
    if len(set(labels)) < 2:
        raise InputError(f"--data {config.data}: it needs right completions and wrong ones")
    prompts = encode_prompts(problems, model, config)
    completions = model.encode([problem.cot for problem in problems])
    limit = read_limit(model)
    questions = list(dict.fromkeys(problem.question for problem in problems))  # in order, once
    count = max(1, len(questions) // 10)
    last_tenth = set(questions[-count:])
    examples, held_out = [], []
    for problem, prompt, completion, label in zip(
        problems, prompts, completions, labels, strict=True
    ):
        part = held_out if problem.question in last_tenth else examples
        part.append(((prompt + completion)[:limit], label))
    return examples, held_out


@dataclass
class Flags:
    """Flags of verifier.py itself; defaults of the authors' script (the paper: batches of 48)."""

    model: str = flag("runs/warmup", "directory or hub id of the warm-up model to start from")
    out: str = flag("runs/verifier", "directory of the run")
    steps: int | None = flag(None, "optimizer steps (default: as many as --epochs needs)", low=1)
    epochs: float = flag(3.0, "passes over the labelled completions", low=1e-9)
    batch: int = flag(24, "completions of one optimizer step", low=1)
    lr: float | None = flag(
        None, "reached after a tenth of the steps, then falls to 0 (toy: 1e-3, else 1e-6)", low=0
    )


@dataclass
class Config(TrainConfig, Flags):
    """All flags of verifier.py; those of sampling, skipping and test problems do nothing here."""

    def __post_init__(self):
        if self.data is None:  # asked here, before that of the warm-up is inherited
            raise InputError("--data is missing: a file of evaluate.py --keep-correct --labels")
        super().__post_init__()
        self.fill_in({"lr": 1e-3 if self.task in TOY_STEPS else 1e-6})


if __name__ == "__main__":
    run_script(main, Config)
