"""rl.py: its runs, its defaults, and what breaks silently. The equations: test_equations.py."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest import approx

import evaluate
import rl
import warmup
from evaluate import read_metrics
from model import load, read_json
from reward import InputError
from rl import policy_loss, value_loss
from rollout import Grades, load_split
from warmup import collate, encode_examples

pytestmark = pytest.mark.usefixtures("rewards_that_differ")
PAD, EOS = 0, 1


def train(source, out, **flags):
    """The trained model and the metrics of a short run in this process."""
    defaults = {
        "model": str(source),
        "out": str(out),
        "steps": 1,
        "rollout_batch": 8,
        "minibatch": 4,
        "limit": 40,
        "max_new_tokens": 12,
        "test_limit": 8,
    }
    rl.main(rl.Config(**{**defaults, **flags}))
    return load(out, None, flags.get("dtype")), read_metrics(out)


def is_same(model, other) -> bool:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


# ---- defaults ------------------------------------------------------------------------------------

REFT = {  # for pretrained models: section 4.3 and appendix B, and its exps/paper_exps
    warmup: {
        "lr": 1e-5,
        "batch": 48,
        "epochs": 2.0,  # of GSM8K and SVAMP
        "weight_decay": 0.0,
        "beta2": 0.999,
        "max_new_tokens": 400,  # of 700 tokens, 300 are the prompt's
        "layer_dropout": 0.0,  # ours
    },
    rl: {
        "lr": 3e-7,
        "rollout_batch": 32,
        "minibatch": 32,
        "ppo_epochs": 2,
        "clip": 0.2,
        "value_coef": 5.0,
        "kl_coef": 0.05,
        "gamma": 1.0,
        "samples": 1,
        "partial_reward": 0.1,
        "max_new_tokens": 400,
        "lam": 1.0,  # ours, as all below; ReFT: 0.95
        "skip_ratio": 0.0,
        "correction": "truncated",
        "cap": 2.0,
        "steps": 1000,
    },
}


@pytest.mark.parametrize("stage", [warmup, rl], ids=["warmup", "rl"])
def test_defaults_are_those_of_reft_where_reft_states_one(stage, monkeypatch):
    monkeypatch.setattr("rollout.execute", lambda *args: None)  # any system will do: nothing runs
    programs = {"kl_coef": 0.01} if stage is rl else {}  # paper: less for programs
    own = stage is warmup  # a new model for toy tasks
    toy_long = {**stage.TOY, "max_new_tokens": 128}
    if own:
        toy_long["epochs"] = 0.8
    for task, engine, changes in (
        ("gsm8k", "nl", {}),
        ("svamp", "python", programs),
        ("toy", "nl", {**stage.TOY, "max_new_tokens": 64}),
        ("toy-long", "nl", toy_long),
    ):
        model = None if own and "toy" in task else "hub/id"
        config = stage.Config(model=model, task=task, engine=engine)
        for name, value in {**REFT[stage], **changes}.items():
            assert getattr(config, name) == value, (task, engine, name)


# ---- what breaks silently ------------------------------------------------------------------------


def test_eos_gets_a_gradient_and_padding_none(toy_run):
    model = load(toy_run, None, "float64")
    tokens = torch.tensor(
        [
            [9, 8, 7, EOS, PAD],
            [9, 8, 7, 6, EOS],
        ]
    )
    mask = torch.tensor(
        [
            [False, True, True, False],
            [False, True, True, True],
        ]
    )
    hidden = model(tokens)
    hidden.retain_grad()
    model.forward = lambda *_: hidden
    logp, values = rl.action_stats(model, tokens, mask)
    ones = torch.ones_like(logp)
    ratio = (logp - logp.detach()).exp()
    loss = policy_loss(ratio, ones, ones, mask, 0.2, 1)
    loss += value_loss(values, values.detach(), ones, mask, 0.2, 1)
    loss.backward()
    is_touched = hidden.grad.abs().sum(-1) > 0  # (N, T): EOS is emitted one column before it
    assert is_touched[:, :-1].tolist() == mask.tolist()
    assert not is_touched[:, -1].any()


def test_every_ratio_is_1_at_skip_0_and_lr_0(toy_run, tmp_path):
    _, records = train(toy_run, tmp_path / "rl", lr=0.0, steps=2, micro_batch=3)
    for record in records:
        assert record["ess_tokens"] == approx(1)
        assert record["clip_fraction"] == 0
        assert abs(record["kl_behav"]) < 1e-9
        assert abs(record["kl_ref"]) < 1e-6
        assert abs(record["policy_loss"]) < 1e-4  # minus the mean of whitened advantages


def test_a_step_at_refts_learning_rate_changes_the_weights(toy_run, tmp_path):
    model, _ = train(toy_run, tmp_path / "rl", lr=3e-7)
    assert not is_same(model, load(toy_run, None, None))


def test_the_mask_changes_from_batch_to_batch_and_the_run_repeats(toy_run, tmp_path):
    flags = {"steps": 4, "skip_ratio": 0.25}
    one, records = train(toy_run, tmp_path / "one", **flags)
    two, _ = train(toy_run, tmp_path / "two", **flags)
    assert is_same(one, two)
    assert len({str(record["skipped_layers"]) for record in records}) > 1


def test_minibatches_hold_every_row_once_a_pass_in_a_new_order_with_the_rate_of_the_update():
    config = SimpleNamespace(
        rollout_batch=8,
        minibatch=3,
        ppo_epochs=2,
        lr=1.0,
        steps=4,
        device="cpu",
    )
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in (1, 2):
        batches += rl.minibatches(8, config, step, generator)
    rows = [rows.tolist() for rows, _ in batches]
    orders = {(*rows[n], *rows[n + 1], *rows[n + 2]) for n in (0, 3, 6, 9)}
    assert len(orders) == 4
    for order in orders:
        assert sorted(order) == list(range(8))
    expected = [rl.learning_rate(config, 1 + n // 6, 1 + n) for n in range(12)]
    assert [lr for _, lr in batches] == approx(expected)


# ---- what flags do -------------------------------------------------------------------------------


@pytest.mark.parametrize("partial_reward", [0.0, 0.1, 0.5, 1.0])
def test_partial_reward_is_what_a_wrong_answer_earns(toy_run, tmp_path, partial_reward):
    _, (record,) = train(toy_run, tmp_path / "rl", partial_reward=partial_reward)
    # Of eight completions three are right and two wrong, see rewards_that_differ.
    assert record["reward"] == approx((3 + 2 * partial_reward) / 8)
    assert record["accuracy"] == 3 / 8 and record["wrong"] == 2 / 8


def test_cheap_layers_are_measured_on_the_reference_and_all_masks_come_from_them(toy_run, tmp_path):
    flags = {"steps": 6, "skip_ratio": 0.125, "skip_layers": "cheap"}
    _, records = train(toy_run, tmp_path / "rl", **flags)
    layer_kl = read_json(tmp_path / "rl" / "config.json")["layer_kl"]
    cheapest = sorted(range(1, 7), key=layer_kl.__getitem__)[:2]
    skipped = {layer for record in records for layer in record["skipped_layers"]}
    assert skipped == {*cheapest}


@pytest.mark.parametrize(
    ("kl_behav", "ess_tokens", "is_warned"),
    [
        (0.049, 0.51, False),
        (0.051, 0.51, True),
        (0.049, 0.49, True),
    ],
)
def test_a_mu_far_from_pi_is_named_beyond_kl_05_or_below_half_of_the_samples(
    kl_behav, ess_tokens, is_warned
):
    numbers = {"kl_behav": kl_behav, "ess_tokens": ess_tokens}
    assert bool(list(rl.warnings(numbers))) == is_warned


def test_a_warning_is_printed_once_a_run(toy_run, tmp_path, capsys, monkeypatch):
    far = {"kl_behav": 0.06, "entropy": 1.0, "ess_tokens": 1.0}
    monkeypatch.setattr(rl, "mismatch", lambda *args: far)
    train(toy_run, tmp_path / "rl", steps=3)
    out = "".join(capsys.readouterr())
    assert out.count("warning: at step 1 KL(mu||pi) is 0.060") == out.count("warning:") == 1


# ---- self-training -------------------------------------------------------------------------------


def test_self_training_is_equation_1_on_right_and_annotated_completions(
    toy_run, tmp_path, monkeypatch
):
    graded, real = [], rl.grade
    monkeypatch.setattr(rl, "grade", lambda *args: graded.append(args) or real(*args))
    flags = {
        "objective": "self-training",
        "skip_ratio": 0.25,
        "minibatch": 16,
        "micro_batch": 2,
        "ppo_epochs": 1,
        "dtype": "float64",
        "partial_reward": 1.0,  # and still a wrong answer is no example
    }
    trained, (record,) = train(toy_run, tmp_path / "rl", **flags)

    rollout, problems, _, config = graded[0]
    model = load(toy_run, None, "float64")
    right = [rollout.pairs()[n] for n in (1, 4, 7)]  # see rewards_that_differ
    tokens, _, mask = collate(right + encode_examples(problems, model, config), "cpu")
    logp, _ = rl.action_stats(model, tokens, mask)
    loss = -logp.sum() / mask.sum()
    loss.backward()
    assert record["policy_loss"] == approx(loss.item(), abs=1e-9)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert record["grad_norm"] == approx(norm.item())
    assert not is_same(trained, model)
    assert not trained.value_head.weight.any()


def test_the_numbers_of_self_training_are_means_over_its_updates(monkeypatch):
    updates = iter([(1.0, 4.0), (3.0, 8.0)])
    monkeypatch.setattr(rl, "supervised_step", lambda run, examples, lr: next(updates))
    rows = torch.tensor([1, 0]), torch.tensor([2]), torch.tensor([])  # the last is no update
    found = rl.self_training_update(None, ["a", "b", "c"], [(n, 0.1) for n in rows])
    assert found == {"policy_loss": 2.0, "grad_norm": 6.0}


def test_self_training_with_nothing_to_learn_from_changes_nothing(toy_run, tmp_path, monkeypatch):
    def load_without_cot(*args):
        return [replace(problem, cot="") for problem in load_split(*args)]

    def all_wrong(rollout, *args):
        count = len(rollout.tokens)
        return Grades(["no"] * count, ["1"] * count, ["wrong"] * count)

    monkeypatch.setattr(rl, "load_split", load_without_cot)
    monkeypatch.setattr(rl, "grade", all_wrong)
    flags = {"objective": "self-training", "lr": 1e-2}
    model, (record,) = train(toy_run, tmp_path / "rl", **flags)
    assert is_same(model, load(toy_run, None, None))
    assert record["policy_loss"] == record["grad_norm"] == 0


# ---- records -------------------------------------------------------------------------------------


def test_shares_of_outcomes_are_over_completions_and_lengths_count_eos():
    grades = Grades([], [], ["right", "right", "wrong", "cut"])
    rollout = SimpleNamespace(
        lengths=torch.tensor([5, 6, 7, 9]),
        prompt_lens=torch.tensor([3, 3, 4, 4]),
    )
    reward = torch.tensor([1.0, 1.0, 0.1, 0.0])
    found = rl.completion_stats(rollout, grades, reward, samples=2)
    expected = {
        "reward": 0.525,
        "accuracy": 0.5,
        "length": 13 / 4,
        "equal_rewards": 0.5,
        "wrong": 0.25,
        "no_answer": 0.0,
        "cut": 0.25,
        "error": 0.0,
        "timeout": 0.0,
        "killed": 0.0,
    }
    assert found == approx(expected)


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_one_that_knows_the_mean():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0, 99.0])
    mask = returns < 99

    def explained(values):
        return rl.explained_variance(values, returns, mask)

    assert explained(returns * mask) == 1
    assert explained(0 * returns + 3) == approx(0)
    assert explained(returns / 2) == approx(0.75)
    assert explained(-returns) == approx(-3)
    assert math.isnan(rl.explained_variance(returns, 0.1 * mask, mask))  # nothing to explain


METRICS = """
    step seconds reward accuracy length equal_rewards wrong no_answer cut error timeout killed
    kl_ref kl_behav entropy ess_tokens explained_variance policy_loss value_loss clip_fraction
    grad_norm skipped_layers rollout_tokens_per_second rollout_seconds update_seconds
    greedy_accuracy nonfinite_updates
"""
FILES = "config.json model.safetensors value_head.pt run.json evaluation.json curves.png"


def test_a_run_leaves_its_files_and_the_metrics_that_the_readme_tells_to_watch(
    toy_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(warmup, "draw_curves", evaluate.draw_curves)
    _, records = train(toy_run, tmp_path / "rl", eval_every=1, samples=2, steps=6)
    folder = tmp_path / "rl"
    assert set(records[0]) == set(METRICS.split())
    for record in records:
        sampled = record["rollout_tokens_per_second"] * record["rollout_seconds"]
        assert sampled == approx(8 * record["length"])  # EOS included
        assert record["rollout_seconds"] + record["update_seconds"] < record["seconds"]
    readme = (Path(rl.__file__).parent / "README.md").read_text(encoding="utf-8")
    section = readme.split("## What to watch")[1].split("\n## ")[0]
    watched = re.findall(r"^\| (`[^|]*)\|", section, re.M)  # the first cells of the table
    names = set(re.findall(r"`(\w+)`", " ".join(watched)))
    assert len(names) > 8 and names <= set(records[0])
    for file in FILES.split():
        assert (folder / file).stat().st_size > 0
    samples = (folder / "samples.txt").read_text(encoding="utf-8")
    assert re.findall(r"--- step (\d+), ", samples) == ["1", "1", "6", "6"]  # every fifth step


def test_program_chains_of_thought_go_through_all_stages(tmp_path):
    warm, out = tmp_path / "warmup", tmp_path / "rl"
    flags = {"engine": "python", "limit": 40, "test_limit": 40, "max_new_tokens": 12}
    try:
        config = warmup.Config(out=str(warm), steps=2, **flags)
    except InputError as refusal:
        pytest.skip(str(refusal))  # programs cannot be held back here
    warmup.main(config)
    train(warm, out)
    config = evaluate.Config(runs=(str(out),), test_limit=5, samples=2)
    assert read_json(out / "run.json")["engine"] == "python"  # without --engine
    (result,) = evaluate.main(config)
    assert sum(result["greedy_outcomes"].values()) == approx(1)
    assert result["pass@2"] == 0
