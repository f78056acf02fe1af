"""warmup.py: eq. (1), the data order, and the whole job in a shortened form."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import rl
import warmup
from evaluate import read_metrics
from model import load
from reward import Problem, load_problems, score
from rollout import token_logp
from sandbox import run_programs
from warmup import Run, batch_indices, collate, encode_examples, micro_batches

SHORT = {
    "steps": 3,
    "limit": 60,
    "test_limit": 8,
    "batch": 8,
    "max_new_tokens": 2,
    "dtype": "float64",
}


def weights(run):
    return list(load(run, None, "float64").parameters())


def train(out, **flags):
    warmup.main(warmup.Config(out=str(out), **{**SHORT, **flags}))
    return out


# ---- the loss and the update ---------------------------------------------------------------------


def test_the_loss_counts_the_completion_with_eos_and_nothing_else(toy_run, tmp_path):
    model = load(toy_run, None, "float64")
    problems = load_problems("toy", "train", limit=3)
    examples = encode_examples(problems, model, warmup.Config())
    tokens, lengths, mask = collate(examples, "cpu")
    logps = []
    for n, (prompt, completion) in enumerate(examples):
        assert tokens[n, : lengths[n]].tolist() == prompt + completion
        assert tokens[n, 1:][mask[n]].tolist() == completion
        text = model.tokenizer.decode(completion)
        assert text == f"{problems[n].cot}\nTherefore, the answer is: {problems[n].answer}<eos>"
        alone = torch.tensor([prompt + completion])  # without padding
        with torch.no_grad():
            logits = model.logits(model(alone))[:, :-1]
        logp = token_logp(logits, alone[:, 1:])[0]
        logps.append(logp[len(prompt) - 1 :])
    flags = {
        "model": str(toy_run),
        "steps": 1,
        "limit": 3,
        "batch": 3,
        "lr": 0.0,
    }
    (record,) = read_metrics(train(tmp_path / "run", **flags))
    expected = -torch.cat(logps).mean().item()
    assert record["loss"] == pytest.approx(expected, abs=1e-12)


def test_micro_batch_size_does_not_change_the_training(tmp_path):
    runs = [train(tmp_path / str(size), micro_batch=size) for size in (1, 5)]
    losses = [read_metrics(run)[-1]["loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    for p, q in zip(*map(weights, runs), strict=True):
        assert (p - q).abs().max() < 1e-9


@pytest.fixture
def run(toy_run, tmp_path):
    """A Run of stage 1 with Adam's parameters away from their defaults."""
    model = load(toy_run, None, "float64")
    flags = {"limit": 2, "test_limit": 2, "max_new_tokens": 4}
    config = warmup.Config(model=str(toy_run), out=str(tmp_path / "run"), **flags)
    contents = {"the training problems": [2]}
    run = Run("warmup", config, model, contents, 10, weight_decay=0.5, beta2=0.75)
    run.nonfinite_updates = 0
    return run


def test_matrices_decay_norms_and_biases_do_not(run):
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.update(0.1, torch.tensor(0.0))
    for name, parameter in run.model.named_parameters():
        expected = before[name] * (0.95 if parameter.dim() == 2 else 1.0)
        assert torch.allclose(parameter, expected, atol=1e-15), name
    for group in run.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.75)


@pytest.mark.parametrize(("size", "clipped"), [(0.5, 0.5), (40.0, 1.0)])
def test_the_gradient_is_clipped_to_norm_1_and_its_norm_before_is_returned(run, size, clipped):
    weight, norms = run.model.norm.weight, []
    weight.grad = torch.zeros_like(weight)
    weight.grad[3] = size

    def note(*_):
        norms.append(weight.grad.norm().item())

    run.optimizer.register_step_pre_hook(note)
    assert run.update(0.0, torch.tensor(1.0)) == pytest.approx(size)
    assert norms == pytest.approx([clipped], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 25])
def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_in_a_line(tmp_path, steps):
    train(tmp_path, steps=steps, batch=2, lr=1e-3, eval_every=8)
    records = read_metrics(tmp_path)
    rates = [record["lr"] / 1e-3 for record in records]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1)
    assert peak <= steps / 10
    tail = [*rates[peak + 1 :], 0]  # the last step still learns
    falls = [a - b for a, b in pairwise(tail)]
    assert falls == pytest.approx([1 / (0.9 * steps)] * len(falls))
    evaluated = [record["step"] for record in records if "greedy_accuracy" in record]
    assert evaluated == list(range(8, steps + 1, 8))


# ---- layer dropout -------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch):
    """The skip mask of every step."""
    masks, real = [], warmup.supervised_step

    def spy(run, examples, lr, skip):
        masks.append(skip)
        return real(run, examples, lr, skip)

    monkeypatch.setattr(warmup, "supervised_step", spy)
    return masks


def test_layer_dropout_trains_nested_models_in_its_share_of_batches(tmp_path, masks):
    train(tmp_path, steps=40, batch=2, layer_dropout=0.5)
    skips = [tuple(mask.tolist()) for mask in masks if mask is not None]
    assert len(masks) == 40 and 12 < len(skips) < 28
    assert {sum(skip) for skip in skips} == {2}
    assert len(set(skips)) > 5


def test_layer_dropout_draws_from_the_pool_as_many_layers_as_rl_will(tmp_path, masks):
    flags = {"layer_dropout": 1.0, "skip_ratio": 0.125, "skip_layers": "cheap"}
    train(tmp_path, steps=8, batch=4, **flags)
    layer_kl = json.loads((tmp_path / "config.json").read_text())["layer_kl"]
    cheapest = sorted(range(1, 7), key=lambda layer: layer_kl[layer])[:2]
    (left_out,) = torch.stack(masks).sum(0).nonzero().T.tolist()
    assert left_out == sorted(cheapest)
    assert [int(mask.sum()) for mask in masks] == [1] * 8


# ---- targets -------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
THOUGHT = CHAT + "{% if add_generation_prompt %}<A><think>\n{% endif %}"
PROGRAM = "def solution():\n    return 2"
CLOSED = "1 + 1 = 2\n</think>\n\nTherefore, the answer is: \\boxed{2}"


@pytest.mark.parametrize(
    ("engine", "template", "cot", "target"),
    [
        ("nl", CHAT, "1 + 1 = 2", "1 + 1 = 2\nTherefore, the answer is: \\boxed{2}"),
        ("nl", CHAT, "It is \\boxed{2}.", "It is \\boxed{2}."),
        ("python", CHAT, PROGRAM, PROGRAM),
        ("nl", THOUGHT, "1 + 1 = 2", CLOSED),
        ("nl", THOUGHT, "1 + 1 = 2\nTherefore, the answer is: 2", CLOSED),
        ("nl", THOUGHT, CLOSED, CLOSED),
        ("nl", THOUGHT, "It is \\boxed{2}.", "\n</think>\n\nIt is \\boxed{2}."),
        ("python", THOUGHT, PROGRAM, f"\n</think>\n\n{PROGRAM}"),
    ],
)
def test_in_a_chat_the_answer_is_boxed_and_a_thought_that_the_template_opens_is_closed_before_it(
    engine, template, cot, target, toy_run
):
    model = load(toy_run, None, None)
    model.tokenizer.chat_template = template
    problem = Problem("1 + 1?", cot, "2")
    ((prompt, ids),) = encode_examples([problem], model, warmup.Config(engine=engine))
    assert model.tokenizer.decode(ids) == f"{target}<eos>"
    assert model.tokenizer.decode(prompt).endswith("<think>\n") == (template == THOUGHT)
    if engine == "nl":
        assert score(target, "2", "gsm8k") == 1
    else:
        assert run_programs([target]) == ["2"]


def write_problems(file, cots):
    rows = [{"question": "1 + 1?", "answer_cot": cot, "answer_value": "2"} for cot in cots]
    Path(file).write_text("\n".join(map(json.dumps, rows)))


def test_problems_that_do_not_fit_are_left_out_however_many(toy_run, tmp_path, capsys):
    data = str(tmp_path / "data.jsonl")
    write_problems(data, ["1 + 1 = 2. " * 100, "1 + 1 = 2.", "1 + 1 = 2. " * 200])
    flags = {
        "model": str(toy_run),
        "task": "gsm8k",
        "data": data,
        "test_data": data,
    }
    train(tmp_path / "run", batch=1, steps=2, **flags)
    out = capsys.readouterr().out
    assert "left out: 2 of 3 problems exceed the 256 tokens" in out
    assert " 1 problems, " in out


# ---- the order of the data -----------------------------------------------------------------------


def test_batches_walk_through_every_epoch_once():
    order = [i for step in range(1, 8) for i in batch_indices(3, step, 5, 7)]
    epochs = [order[i : i + 7] for i in range(0, 35, 7)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 5
    assert epochs[0] != epochs[1]


def test_micro_batches_hold_every_row_once_and_no_more_columns_than_needed():
    lengths = torch.tensor([5, 9, 2, 7, 7])
    parts = [(rows.tolist(), columns) for rows, columns in micro_batches(lengths, 2)]
    assert parts == [([2, 0], 5), ([3, 4], 7), ([1], 9)]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"epochs": 2.0}, 6),
        ({"epochs": 0.5}, 2),
        ({"steps": 3, "epochs": 9}, 3),
    ],
)
def test_epochs_times_problems_over_batch_steps_are_taken_unless_steps_says_otherwise(
    tmp_path, flags, steps
):
    train(tmp_path, **{"steps": None, "limit": 13, "batch": 4, **flags})
    assert len(read_metrics(tmp_path)) == steps


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    largest = 2**63 - 1
    a = weights(train(tmp_path / "a", seed=largest))
    b = weights(train(tmp_path / "b", seed=largest))
    c = weights(train(tmp_path / "c", seed=0))
    assert all(map(torch.equal, a, b))
    assert not all(map(torch.equal, a, c))


# ---- the run -------------------------------------------------------------------------------------


def test_checkpoints_on_the_way_can_be_opened(tmp_path, monkeypatch):
    saved, real = [], Run.save

    def spy(run):
        real(run)
        saved.append(weights(run.out)[0])

    monkeypatch.setattr(Run, "save", spy)
    train(tmp_path, steps=6, save_every=2)
    assert len(saved) == 3  # after 2, 4 and, once, at the end
    assert not any(torch.equal(a, b) for a, b in pairwise(saved))


def test_the_next_command_carries_the_flags_of_this_run(toy_run, tmp_path, capsys):
    train(tmp_path / "toy", steps=1)
    command = f"python rl.py --skip-ratio 0.25 --model {tmp_path / 'toy'}"
    assert f"next: {command}\n" in capsys.readouterr().out

    data, out = str(tmp_path / "a.jsonl"), str(tmp_path / "svamp")
    write_problems(data, ["1 + 1 = 2."])
    flags = {"task": "svamp", "data": data, "test_data": data, "max_new_tokens": 4}
    train(out, model=str(toy_run), batch=1, steps=1, **flags)
    assert f"next: python rl.py --model {out}\n" in capsys.readouterr().out  # no layer dropout
    assert vars(rl.Config(model=out)).items() >= flags.items()


def test_end_to_end_reinforcement_learns_which_reasoning_pays(main_job):
    """RL with skipped layers makes much more of a warm-up that imitates both annotators."""
    folder, job = main_job
    assert job.wait() == 0, (folder / "log").read_text()
    supervised, reinforced = [
        json.loads((folder / "runs" / name / "evaluation.json").read_text())
        for name in ("warmup", "rl")
    ]
    assert reinforced["greedy_accuracy"] > supervised["greedy_accuracy"] + 0.15
    records = read_metrics(folder / "runs" / "rl")
    assert all(0 < record["kl_behav"] < 0.3 for record in records)
    assert all(len(record["skipped_layers"]) == 2 for record in records)
