"""rl.py: the equations by hand, and what breaks silently in PPO."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import rl
import rollout
import warmup
from model import load
from reward import InputError, load_problems
from rl import gae, policy_loss, value_loss, whiten
from rollout import grade, sample
from warmup import Run, collate, encode_examples

pytestmark = pytest.mark.usefixtures("rewards_that_differ")
PAD, EOS = 0, 1
REWARDS = torch.arange(8.0)


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(toy_run, out, **flags):
    """One in-process run of rl.py on the small checkpoint."""
    defaults = {"model": str(toy_run), "out": str(out), "steps": 1, "rollout_batch": 8, "minibatch": 4, "limit": 40}
    rl.main(rl.Config(**(defaults | {"max_new_tokens": 12, "test_limit": 8} | flags)))
    return load(out, None, flags.get("dtype")), metrics(out)


# ---- eqs. (5)-(7) ---------------------------------------------------------------------------------------------------


def test_gae_by_hand_with_a_length_1_a_full_length_and_a_cut_answer():
    # columns:      prompt | actions ...                         gamma = 1, lam = 0.5
    mask = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    values = torch.tensor([[9, 0.25, 9, 9], [9, 0.5, 0.25, 0.75], [9, 9, 0.5, 1.0]], dtype=torch.float64)
    rewards = torch.tensor([[0, 1.0, 0, 0], [0, -0.1, 0.2, 1.0], [0, 0, 0.1, 0.0]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5)
    # row 0, length 1:  A = 1 - 0.25
    # row 1, full:      delta = (-0.5-0.1+0.25, -0.25+0.2+0.75, -0.75+1) = (-0.35, 0.7, 0.25)
    #                   A_3 = 0.25, A_2 = 0.7 + 0.125 = 0.825, A_1 = -0.35 + 0.4125 = 0.0625
    # row 2, cut: no bootstrapped value: delta = (-0.5+0.1+1, -1+0) = (0.6, -1), A_2 = -1, A_1 = 0.6 - 0.5 = 0.1
    expected = torch.tensor([[0, 0.75, 0, 0], [0, 0.0625, 0.825, 0.25], [0, 0, 0.1, -1.0]], dtype=torch.float64)
    assert torch.allclose(advantages, expected, atol=1e-12)
    assert torch.allclose(returns, (expected + values) * mask, atol=1e-12)


def test_gae_with_gamma_below_1_and_values_of_padding_that_must_not_count():
    mask = torch.tensor([[1, 1, 0]], dtype=torch.bool)
    values = torch.tensor([[1.0, 2.0, 1e9]])
    advantages, returns = gae(torch.tensor([[0.0, 1.0, 0.0]]), values, mask, 0.5, 1.0)
    assert advantages.tolist() == [[-1.0 + 0.5 * 2.0 + 0.5 * -1.0, -1.0, 0.0]]
    assert returns.tolist() == [[0.5, 1.0, 0.0]]


def test_gae_scales_by_the_trace_of_the_next_action():
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards, trace = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.125]])
    advantages, returns = gae(rewards, torch.zeros(1, 3), mask, 1.0, 1.0, trace)
    assert advantages.tolist() == [[0.25 * 0.125, 0.125, 1.0]]  # c_{t+1} of eq. (6), never c_t
    assert returns.tolist() == [[0.5 * 0.25 * 0.125, 0.25 * 0.125, 0.125]]  # eq. (7): V + c_t A_t


def test_group_relative_rewards_by_hand():
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 1.0, 1.0, 0.0, 0.1])
    a = rl.group_relative(reward, 4).view(3, 4)
    assert a[0].tolist() == pytest.approx([3**0.5, *[-(3**-0.5)] * 3], abs=1e-3)  # mean 1/4, deviation sqrt(3)/4
    assert (a[1] == 0).all()  # equal rewards: nothing to learn
    assert a.sum(1).abs().max() < 1e-12 and (a[2].square().mean() - 1).abs() < 1e-3


# ---- eqs. (8)-(11) --------------------------------------------------------------------------------------------------


def loss_of(ratio, advantage, correction="none", rho=1.0, cap=2.0):
    """The loss of one action and its gradient with respect to log pi_theta."""
    logp_old = torch.tensor([[-1.0]], dtype=torch.float64)
    logp_new = (logp_old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    logp_behav = logp_old - torch.tensor(rho, dtype=torch.float64).log()
    A, mask = torch.full((1, 1), advantage, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss = policy_loss(logp_new, logp_old, logp_behav, A, mask, 0.2, correction, cap, 1)
    (gradient,) = torch.autograd.grad(loss, logp_new)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -1.2 * 2.0, 0.0),  # gains beyond 1 + eps are cut ...
        (1.5, -2.0, 3.0, 3.0),  # ... losses are not
        (0.5, -2.0, 0.8 * 2.0, 0.0),
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_policy_loss_clips_on_one_side_only(ratio, advantage, loss, gradient):
    assert loss_of(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-12)


def test_corrections_choose_ratio_and_weight():
    assert loss_of(1.0, 1.0, "none", rho=1.5) == pytest.approx((-1.0, -1.0))
    assert loss_of(1.0, 1.0, "ratio", rho=1.5) == pytest.approx((-1.2, 0.0))  # pi_theta / mu = 1.5 is clipped at step 0
    assert loss_of(1.0, 1.0, "ratio", rho=1.1) == pytest.approx((-1.1, -1.1))
    assert loss_of(1.0, 1.0, "truncated", rho=1.5) == pytest.approx(
        (-1.5, -1.5)
    )  # the clip sees pi_theta / pi_old only
    assert loss_of(1.0, 1.0, "truncated", rho=9.0, cap=2.0) == pytest.approx((-2.0, -2.0))
    assert loss_of(1.0, 1.0, "truncated", rho=0.5) == pytest.approx((-0.5, -0.5))


def test_value_loss_is_refts_clip_of_the_return():
    generator = torch.Generator().manual_seed(0)
    V, V_old, A = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    R, eps, mask = A + V_old, 0.2, torch.rand(4, 7, generator=generator) < 0.7
    reft = torch.max((R - V) ** 2, (torch.clamp(R - V, A - eps, A + eps)) ** 2)  # with A = R - V_old
    expected = 0.5 * (reft * mask).sum() / 5
    assert value_loss(V, V_old, R, mask, eps, 5).item() == pytest.approx(expected.item(), abs=1e-12)


def test_padding_changes_neither_loss_nor_whitening():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 7, generator=generator) < 0.6
    a, b, c, A, V, R = (torch.randn(4, 7, generator=generator) for _ in range(6))

    def everything(fill):
        x = [torch.where(mask, t, torch.as_tensor(fill)) for t in (a, b, c, A, V, R)]
        pg = policy_loss(x[0], x[1], x[2], x[3], mask, 0.2, "truncated", 2.0, 9)
        return torch.cat([whiten(x[3], mask).flatten(), torch.stack([pg, value_loss(x[4], x[1], x[5], mask, 0.2, 9)])])

    assert torch.equal(everything(0.0), everything(50.0))


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_mask():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    x = whiten(torch.tensor([[1.0, 2.0, 1e6], [6.0, 1e6, 1e6]]), mask)
    assert x[mask].mean().abs() < 1e-6 and (x[mask].var(unbiased=False) - 1).abs() < 1e-5
    assert (x[~mask] == 0).all()
    for constant in (torch.tensor([[3.0]]), torch.tensor([[3.0, 3.0]])):  # one token, or all alike: no NaN
        assert (whiten(constant, torch.ones_like(constant, dtype=torch.bool)) == 0).all()


def test_minibatches_hold_every_row_once_a_pass_and_the_learning_rate_rises_and_falls_to_0(toy_run):
    config = rl.Config(model=str(toy_run), rollout_batch=8, minibatch=3, ppo_epochs=2, lr=1.0, steps=4)
    generator = torch.Generator().manual_seed(0)
    batches = [batch for step in (1, 2, 3, 4) for batch in rl.minibatches(8, config, step, generator)]
    rows = [rows.tolist() for rows, _ in batches]
    assert [len(part) for part in rows] == [3, 3, 2] * 8
    passes = [[*a, *b, *c] for a, b, c in zip(rows[::3], rows[1::3], rows[2::3], strict=True)]
    assert all(sorted(order) == list(range(8)) for order in passes) and len(set(map(tuple, passes))) == 8
    ramp = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, *[1.0] * 15]
    fall = [share for share in (1.0, 0.75, 0.5, 0.25) for _ in range(6)]  # by batch: the last one still learns
    assert [lr for _, lr in batches] == pytest.approx([a * b for a, b in zip(ramp, fall, strict=True)])


# ---- defaults -------------------------------------------------------------------------------------------------------

SIZES_OF_RUNS = {"micro_batch": 16, "max_rows": 512}  # ours: memory
REFT = {  # for pretrained models; paper: ReFT, section 4.3 and appendix B; code: its exps/paper_exps and train_rl_reft.py
    warmup: {"lr": 1e-5, "batch": 48, "epochs": 2.0}  # paper; 2 epochs are those of GSM8K and SVAMP
    | {"weight_decay": 0.0, "beta2": 0.999, "max_new_tokens": 400}  # code; 700 tokens of which 300 are the prompt's
    | {"layer_dropout": 0.0, **SIZES_OF_RUNS},  # ours
    rl: {"lr": 3e-7, "rollout_batch": 32, "minibatch": 32, "ppo_epochs": 2, "clip": 0.2, "value_coef": 5.0}  # paper
    | {"kl_coef": 0.05, "gamma": 1.0, "samples": 1, "max_new_tokens": 400}  # code; kl_coef also in the paper
    | {"lam": 1.0}  # ours; ReFT: 0.95
    | {"skip_ratio": 0.0, "correction": "truncated", "cap": 2.0, "steps": 1000, **SIZES_OF_RUNS},  # ours
}
TOY = {  # ours: a decoder of half a million parameters
    warmup: {"lr": 4e-3, "batch": 32, "epochs": 0.9, "weight_decay": 0.1, "beta2": 0.95, "layer_dropout": 0.5}
    | {"skip_ratio": 0.25},
    rl: {"lr": 1e-4, "rollout_batch": 128, "minibatch": 64, "steps": 20, "kl_coef": 0.01, "value_coef": 0.1}
    | {"correction": "prefix"},
}


@pytest.mark.parametrize("stage", [warmup, rl], ids=["warmup", "rl"])
def test_defaults_are_those_of_reft_where_reft_states_one(stage, monkeypatch):
    monkeypatch.setattr("rollout.execute", lambda *args: None)  # nothing is run: any system will do
    for task, engine, changes in (
        ("gsm8k", "nl", {}),
        ("svamp", "python", {"kl_coef": 0.01} if stage is rl else {}),  # paper: less for programs
        ("toy", "nl", TOY[stage] | {"max_new_tokens": 64}),
        ("toy-long", "nl", TOY[stage] | {"max_new_tokens": 128}),
    ):
        model = None if stage is warmup and task in ("toy", "toy-long") else "hub/id"
        config = stage.Config(model=model, task=task, engine=engine)
        for name, value in (REFT[stage] | changes).items():
            assert getattr(config, name) == value, (task, engine, name)


# ---- the critic -----------------------------------------------------------------------------------------------------


def fitted(toy_run, share, ridge, monkeypatch, rows=24):
    """A float64 model whose head was fitted to random returns; its features, those returns, and its weights before."""
    if ridge is not None:
        monkeypatch.setattr(rl, "RIDGE", ridge)
    model = load(toy_run, None, "float64")
    torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model)
    prompts = [[9, 8, 7 + i % 5] for i in range(rows)]
    rollout = sample(model, prompts, max_new_tokens=12, eos_id=EOS, pad_id=PAD, seed=1)
    mask = rollout.action_mask
    returns = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rl.fit_value_head(model, rollout, returns, 5, share)
    with torch.no_grad():
        hidden = model(rollout.tokens)[:, :-1][mask]
    return model, before, hidden, returns[mask]


def test_the_value_head_is_fitted_by_least_squares_over_the_actions_alone(toy_run, monkeypatch):
    model, _, hidden, returns = fitted(toy_run, 1.0, 0.0, monkeypatch)
    features = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    best = torch.linalg.lstsq(features, returns[:, None]).solution[:, 0]
    found = torch.cat([model.value_head.weight.detach()[0], model.value_head.bias.detach()])
    assert len(hidden) > 2 * features.shape[1] and (found - best).abs().max() < 1e-4


def test_moving_away_from_the_last_fit_costs_more_the_fewer_completions_there_are_for_a_feature(toy_run, monkeypatch):
    model, before, hidden, returns = fitted(toy_run, 1.0, None, monkeypatch)
    weight, bias = (p.detach().clone().requires_grad_() for p in model.value_head.parameters())
    size = hidden.square().sum(0)  # (64,): of each feature over the batch
    penalty = 0.04 * (64 / 24) ** 2 * (size * (weight - before.value_head.weight) ** 2).sum()  # not on the bias
    objective = (returns - (hidden @ weight[0] + bias)).square().sum() + penalty
    objective.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5 < penalty  # it is at the minimum


def test_the_fit_moves_the_head_by_its_share_and_the_trunk_not_at_all(toy_run, monkeypatch):
    whole, before, *_ = fitted(toy_run, 1.0, 0.04, monkeypatch)
    half, *_ = fitted(toy_run, 0.5, 0.04, monkeypatch)
    for name, old in before.named_parameters():
        to_whole, to_half = (model.get_parameter(name) - old for model in (whole, half))
        assert torch.allclose(to_half, to_whole / 2, atol=1e-12)
        assert bool(to_whole.any()) == name.startswith("value_head")


def test_few_completions_teach_the_critic_their_mean_and_no_more(toy_run, monkeypatch):
    model, before, hidden, returns = fitted(toy_run, 1.0, 1e12, monkeypatch)
    assert (model.value_head.weight - before.value_head.weight).abs().max() < 1e-6
    assert (returns - model.values(hidden)).mean().abs() < 1e-9


def test_whitened_advantages_of_a_long_right_answer_are_negative_at_its_start_with_lam_95_and_not_by_default():
    """V = 0; a right and a wrong answer of 100 tokens each. Rewards fade backwards by lam^(L - t): below the mean."""
    rewards, mask = torch.zeros(2, 100, dtype=torch.float64), torch.ones(2, 100, dtype=torch.bool)
    rewards[0, -1] = 1
    start = {}
    for lam in (0.95, rl.Config(model="x", task="toy").lam):
        advantages, _ = rl.gae(rewards, torch.zeros_like(rewards), mask, 1.0, lam)
        start[lam] = rl.whiten(advantages, mask)[0, 0].item()
    assert start[0.95] < -0.3 and start[1.0] == pytest.approx(1.0)


def test_the_critic_takes_the_whole_fit_of_the_first_batch_and_half_of_the_others(toy_run, tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(rl, "fit_value_head", lambda *args: shares.append(args[-1]))
    train(toy_run, tmp_path / "rl", steps=3)
    assert shares == [1.0, 0.5, 0.5]


def test_explained_variance_is_1_for_a_perfect_critic_0_for_the_mean_and_less_for_a_wrong_one():
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    returns = torch.tensor([[1.0, 2.0, 9.0], [3.0, 6.0, -9.0]])
    share = lambda values: rl.explained_variance(values, returns, mask)  # noqa: E731
    assert share(returns * mask) == 1 and share(torch.full((2, 3), 3.0)) == 0
    assert share(returns / 2) == pytest.approx(0.75) and share(-returns) == pytest.approx(-3)


LATE = {"kl_behav": 0.0, "ess_tokens": 1.0, "length": 60.0, "explained_variance": 0.05}


@pytest.mark.parametrize(
    ("change", "step", "lam", "warned"),
    [
        ({}, 6, 0.95, True),
        ({}, 5, 0.95, False),  # the critic has had no time yet
        ({}, 6, 1.0, False),
        ({"length": 19.9}, 6, 0.95, False),  # 1 / (1 - lam) is 20
        ({"length": 20.1}, 6, 0.95, True),
        ({"explained_variance": 0.1}, 6, 0.95, False),
    ],
)
def test_a_lam_too_short_for_the_completions_under_a_critic_that_knows_nothing_is_named(change, step, lam, warned):
    found = dict(rl.warnings(LATE | change, step, lam))
    assert ("lam" in found) == warned and all("--lam 1" in text for text in found.values())


@pytest.mark.parametrize(
    ("kl", "ess", "warned"), [(0.049, 0.51, False), (0.051, 0.51, True), (0.049, 0.49, True)], ids=str
)
def test_a_mu_that_is_far_from_pi_is_named_beyond_kl_05_or_below_half_of_the_samples(kl, ess, warned):
    assert ("mu" in dict(rl.warnings(LATE | {"kl_behav": kl, "ess_tokens": ess}, 1, 1.0))) == warned


# ---- what breaks silently -------------------------------------------------------------------------------------------


@pytest.fixture
def batch(toy_run):
    """A small float64 model, two completions of different lengths with EOS, and their log-probabilities."""
    model = load(toy_run, None, "float64")
    tokens = torch.tensor([[9, 8, 7, 6, EOS, PAD, PAD], [9, 8, 5, 4, 3, 2, EOS]])
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    return model, tokens, mask


def test_eos_gets_a_gradient_and_padding_none(batch):
    model, tokens, mask = batch
    hidden = model(tokens)
    hidden.retain_grad()
    model.forward = lambda *_: hidden
    logp, values = rl.action_stats(model, tokens, mask)
    A = torch.ones_like(logp)
    loss = policy_loss(logp, logp.detach(), logp.detach(), A, mask, 0.2, "none", 2.0, 1)
    (loss + value_loss(values, values.detach(), A, mask, 0.2, 1)).backward()
    touched = hidden.grad.abs().sum(-1) > 0  # (N, T): the state that emits EOS stands one column before it
    assert touched[:, :-1].tolist() == mask.tolist()
    assert not touched[:, -1].any()


def test_action_stats_are_the_log_softmax_of_the_full_model(batch):
    model, tokens, mask = batch
    logp, values = rl.action_stats(model, tokens, mask)
    log_pi = model.logits(model(tokens)).log_softmax(-1)[:, :-1]
    expected = log_pi.gather(-1, tokens[:, 1:, None]).squeeze(-1) * mask
    assert (logp - expected).abs().max() < 1e-12
    assert values.shape == mask.shape and (logp[~mask] == 0).all()


def test_every_ratio_is_1_at_skip_0_and_lr_0(toy_run, tmp_path):
    _, records = train(toy_run, tmp_path / "rl", lr=0.0, steps=2, micro_batch=3)
    for record in records:
        assert max(abs(record["log_ratio_min"]), abs(record["log_ratio_max"])) < 1e-5
        assert record["clip_fraction"] == 0 and abs(record["kl_ref"]) < 1e-6 and abs(record["kl_behav"]) < 1e-6
        assert abs(record["policy_loss"]) < 1e-4  # minus the mean of whitened advantages times ratios of 1


def test_micro_batch_size_does_not_change_the_update(toy_run, tmp_path):
    flags = {"dtype": "float64", "skip_ratio": 0.25, "correction": "retrace", "lr": 1e-3}
    one, whole = (train(toy_run, tmp_path / str(size), micro_batch=size, **flags) for size in (1, 64))
    for p, q in zip(one[0].parameters(), whole[0].parameters(), strict=True):
        assert (p - q).abs().max() < 1e-9
    for name in ("policy_loss", "value_loss", "clip_fraction", "entropy", "kl_ref", "grad_norm", "kl_behav"):
        assert one[1][0][name] == pytest.approx(whole[1][0][name], abs=1e-9), name


def test_a_step_at_refts_learning_rate_changes_the_weights(toy_run, tmp_path):
    model, _ = train(toy_run, tmp_path / "rl", lr=3e-7, steps=1)
    before = load(toy_run, None, None)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_the_mask_changes_from_batch_to_batch_and_the_run_repeats(toy_run, tmp_path):
    a, first = train(toy_run, tmp_path / "a", steps=4, skip_ratio=0.25)
    b, second = train(toy_run, tmp_path / "b", steps=4, skip_ratio=0.25)
    assert len({tuple(record["skipped_layers"]) for record in first}) > 1
    assert [r["reward"] for r in first] == [r["reward"] for r in second]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def arguments_of_gae(monkeypatch) -> list[tuple]:
    """What main passes to gae, batch by batch."""
    calls, real = [], rl.gae
    monkeypatch.setattr(rl, "gae", lambda *args: calls.append(args) or real(*args))
    return calls


def test_reward_and_kl_penalty_enter_as_equation_4(toy_run, tmp_path, monkeypatch):
    calls, rollouts = arguments_of_gae(monkeypatch), []
    monkeypatch.setattr(rl, "grade", lambda *args: rollouts.append(args[0]) or grade(*args)._replace(rewards=REWARDS))
    flags = {"steps": 2, "lr": 1e-2, "kl_coef": 0.5, "save_every": 1, "skip_ratio": 0.25, "dtype": "float64"}
    saved, real_save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run: saved.append(copy.deepcopy(run.model)) or real_save(run))
    _, records = train(toy_run, tmp_path / "rl", **flags)
    rewards, _, mask, *_ = calls[1]
    with torch.no_grad():
        logp_old, _ = rl.action_stats(saved[0], rollouts[1].tokens, mask)  # the policy after batch 1
        logp_ref, _ = rl.action_stats(load(toy_run, None, "float64"), rollouts[1].tokens, mask)
    expected = -0.5 * (logp_old - logp_ref)
    last = mask.long().cumsum(1).argmax(1)
    expected[torch.arange(8), last] += REWARDS  # all of it at the last token
    assert (rewards - expected).abs().max() < 1e-9
    assert abs(records[1]["kl_ref"]) > 1e-3  # or the penalty was never seen


@pytest.mark.parametrize("correction", ["retrace", "prefix"])
def test_the_trace_reaches_the_advantages(toy_run, tmp_path, monkeypatch, correction):
    calls, terms = arguments_of_gae(monkeypatch), []
    real = rl.correction_terms
    monkeypatch.setattr(rl, "correction_terms", lambda *args: terms.append(real(*args)) or terms[-1])
    train(toy_run, tmp_path / "rl", correction=correction, skip_ratio=0.25, lam=0.9)
    *_, gamma, lam, trace = calls[0]
    assert torch.equal(trace, terms[0][1]) and (trace - 1).abs().max() > 1e-3
    assert (gamma, lam) == (1.0, 0.9)  # as asked


def test_value_coef_scales_the_value_loss_of_equation_11(toy_run, tmp_path, monkeypatch):
    gradients, real = [], Run.update
    spy = lambda run, *args: gradients.append(run.model.value_head.bias.grad.item()) or real(run, *args)  # noqa: E731
    monkeypatch.setattr(Run, "update", spy)
    for value_coef in (0.0, 1.0, 3.0):
        train(toy_run, tmp_path / f"{value_coef}", value_coef=value_coef, ppo_epochs=1, minibatch=8, dtype="float64")
    assert gradients[0] == 0 and gradients[1] != 0
    assert gradients[2] == pytest.approx(3 * gradients[1], rel=1e-9)


def test_one_warning_line_when_mu_is_far_from_pi(toy_run, tmp_path, capsys, monkeypatch):
    real = rl.mismatch
    monkeypatch.setattr(rl, "mismatch", lambda *args: real(*args) | {"kl_behav": 0.06})
    train(toy_run, tmp_path / "rl", steps=3)
    out = "".join(capsys.readouterr())
    assert out.count("warning: at step 1 KL(mu||pi) is 0.060") == out.count("warning:") == 1
    assert "--skip-ratio" in out and "--layer-dropout" in out
    monkeypatch.setattr(rl, "mismatch", lambda *args: real(*args) | {"kl_behav": 0.04, "ess_tokens": 0.6})
    train(toy_run, tmp_path / "near", steps=3)
    assert "warning:" not in "".join(capsys.readouterr())


def test_kl_penalty_is_under_the_full_model(toy_run, tmp_path):
    # at step 1 the policy is the reference, so the penalty is 0 however far mu is from both
    _, records = train(toy_run, tmp_path / "rl", skip_ratio=0.25)
    assert abs(records[0]["kl_ref"]) < 1e-6 and abs(records[0]["log_ratio_max"]) > 1e-3


def test_target_kl_behav_moves_the_number_of_skipped_layers(toy_run, tmp_path):
    small = {"rollout_batch": 4, "limit": 8}
    _, rising = train(toy_run, tmp_path / "a", steps=6, target_kl_behav=100.0, **small)
    counts = [len(record["skipped_layers"]) for record in rising]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] >= 2
    _, rising = train(toy_run, tmp_path / "list", steps=5, target_kl_behav=100.0, skip_layers="2,5", **small)
    assert [len(record["skipped_layers"]) for record in rising][-2:] == [2, 2]  # of two layers, no more
    _, staying = train(toy_run, tmp_path / "dear", steps=3, target_kl_behav=1e-9, skip_layers="cheap", **small)
    assert not any(record["skipped_layers"] for record in staying)  # one layer already costs too much
    _, falling = train(toy_run, tmp_path / "b", steps=6, skip_ratio=0.5, target_kl_behav=1e-9, **small)
    counts = [len(record["skipped_layers"]) for record in falling]
    assert counts[0] == 4 and counts == sorted(counts, reverse=True) and counts[-1] <= 2


def test_cheap_layers_are_measured_on_the_reference_and_all_masks_come_from_them(toy_run, tmp_path):
    _, records = train(toy_run, tmp_path / "rl", steps=6, skip_ratio=0.125, skip_layers="cheap")
    worth = json.loads((tmp_path / "rl" / "config.json").read_text())["layer_kl"]
    cheapest = sorted(range(1, 7), key=lambda layer: worth[layer])[:2]
    assert {layer for record in records for layer in record["skipped_layers"]} == {*cheapest}


def test_group_advantages_reach_every_token_and_leave_the_critic_alone(toy_run, tmp_path, monkeypatch):
    gae_calls, batches = arguments_of_gae(monkeypatch), []
    real = rl.ppo_update
    monkeypatch.setattr(rl, "ppo_update", lambda *args: batches.append(args) or real(*args))
    real_stats = rl.batch_stats  # a critic that an earlier run has trained must not count
    monkeypatch.setattr(rl, "batch_stats", lambda *args: (real_stats(*args)[0], torch.ones_like(real_stats(*args)[1])))
    flags = {"advantage": "group", "samples": 4, "kl_coef": 0.0, "lr": 1e-3, "gamma": 0.5, "value_coef": 3.0}
    model, records = train(toy_run, tmp_path / "rl", **flags, skip_ratio=0.25, correction="none")
    _, values, mask, gamma, lam, _ = gae_calls[0]
    assert (values == 0).all() and (gamma, lam) == (1.0, 1.0)
    expected = rl.group_relative(torch.tensor([(0.0, 1.0, 0.1)[n % 3] for n in range(8)]), 4).float()
    advantages = batches[0][2][3]
    assert torch.allclose(advantages, expected[:, None] * mask, atol=1e-6)  # not whitened either
    assert (model.value_head.weight == 0).all() and (model.value_head.bias == 0).all()
    assert records[0]["grad_norm"] > 0 and records[0]["explained_variance"] == 0


def test_self_training_is_equation_1_on_right_and_annotated_completions(toy_run, tmp_path, monkeypatch):
    gradients, rollouts, graded, real_grade = [], [], [], rl.grade
    monkeypatch.setattr(rl, "grade", lambda *args: graded.append(args[1]) or real_grade(*args))
    real_update = Run.update

    def collect(run, *args):
        gradients.append([None if p.grad is None else p.grad.clone() for p in run.model.parameters()])
        return real_update(run, *args)

    monkeypatch.setattr(Run, "update", collect)
    monkeypatch.setattr(rl, "sample", lambda *args, **flags: rollouts.append(sample(*args, **flags)) or rollouts[-1])
    flags = {"objective": "self-training", "ppo_epochs": 1, "minibatch": 16, "micro_batch": 2, "dtype": "float64"}
    _, records = train(toy_run, tmp_path / "rl", **flags, skip_ratio=0.25)
    model = load(toy_run, None, "float64")
    rollout, right = rollouts[0], [1, 4, 7]  # see rewards_that_differ
    logp, _ = rl.action_stats(model, rollout.tokens[right], rollout.action_mask[right])
    examples = encode_examples(graded[0], model, rl.Config(model=str(toy_run)))
    tokens, _, mask = collate(examples, "cpu")
    annotated, _ = rl.action_stats(model, tokens, mask)
    loss = -(logp.sum() + annotated.sum()) / (rollout.action_mask[right].sum() + mask.sum())
    loss.backward()
    assert len(gradients) == 1 and records[0]["policy_loss"] == pytest.approx(loss.item(), abs=1e-9)
    for got, parameter in zip(gradients[0], model.parameters(), strict=True):
        assert (got is None) == (parameter.grad is None or not parameter.grad.any())  # the value head
        assert got is None or (got - parameter.grad).abs().max() < 1e-9


def test_the_numbers_of_self_training_are_means_over_its_updates(monkeypatch):
    steps = iter([(1.0, 4.0), (3.0, 8.0)])
    monkeypatch.setattr(rl, "supervised_step", lambda run, examples, lr: next(steps))
    batches = [(torch.tensor([1, 0]), 0.1), (torch.tensor([2]), 0.1), (torch.tensor([], dtype=torch.int64), 0.1)]
    found = rl.self_training_update(None, ["a", "b", "c"], batches)  # an empty minibatch is none
    assert found == {"policy_loss": 2.0, "grad_norm": 6.0, "value_loss": 0.0, "clip_fraction": 0.0}


def test_self_training_with_nothing_to_learn_from_changes_nothing(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "load_problems", lambda *args: [replace(p, cot="") for p in load_problems(*args)])
    monkeypatch.setattr(rl, "grade", lambda *args: grade(*args)._replace(rewards=torch.full((8,), 0.1)))
    model, records = train(toy_run, tmp_path / "rl", objective="self-training", lr=1e-2)
    before = load(toy_run, None, None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert records[0]["policy_loss"] == records[0]["grad_norm"] == 0


def test_logp_behav_that_is_not_finite_raises(toy_run, tmp_path, monkeypatch):
    def broken(*args, **flags):
        rollout = sample(*args, **flags)
        rollout.logp_behav[0, int(rollout.prompt_lens[0])] = torch.nan
        return rollout

    monkeypatch.setattr(rl, "sample", broken)
    with pytest.raises(FloatingPointError, match="logp_behav"):
        train(toy_run, tmp_path / "rl")


def test_outcome_shares_are_over_completions_and_lengths_count_eos():
    outcomes = ["right", "right", "wrong", "cut", "error", "error"]
    grades = rollout.Grades([], [], outcomes, torch.tensor([1.0, 1.0, 0.1, 0.0, 0.0, 0.0]))
    rows = SimpleNamespace(lengths=torch.tensor([5, 6, 7, 9, 3, 3]), prompt_lens=torch.tensor([3, 3, 4, 4, 2, 2]))
    shares = rl.outcome_shares(rows, grades, 2)
    expected = {"reward": 0.35, "accuracy": 1 / 3, "length": 15 / 6, "wrong": 1 / 6, "cut": 1 / 6, "error": 1 / 3}
    assert shares == pytest.approx(expected | {"no_answer": 0, "timeout": 0, "killed": 0, "equal_rewards": 2 / 3})


def test_a_critic_explains_nothing_of_equal_returns():
    mask, values = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[0.1, -0.2, 0.3]] * 2)
    for returns in (torch.zeros(2, 3), torch.full((2, 3), 0.1)):
        assert math.isnan(rl.explained_variance(values, returns, mask))
    assert rl.explained_variance(values, values, mask) == 1


METRICS = """
    step seconds reward accuracy equal_rewards wrong no_answer cut error timeout killed length kl_ref kl_behav kl_behav_k1
    entropy log_ratio_min log_ratio_p1 log_ratio_p50 log_ratio_p99 log_ratio_max above_cap ess_tokens ess_sequences
    retrace_trace reward_under_pi explained_variance policy_loss value_loss clip_fraction grad_norm nonfinite_updates
    skipped_layers rollout_tokens_per_second rollout_seconds update_seconds peak_memory_gb greedy_accuracy
"""


def test_a_run_leaves_its_metrics_with_all_that_the_readme_tells_to_watch_and_its_files(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "draw_curves", evaluate.draw_curves)
    _, records = train(toy_run, tmp_path / "rl", eval_every=1, samples=2, steps=6)
    assert set(records[0]) == set(METRICS.split())
    for record in records:
        sampled = record["rollout_tokens_per_second"] * record["rollout_seconds"]
        assert sampled == pytest.approx(8 * record["length"])  # EOS included
        assert record["rollout_seconds"] + record["update_seconds"] < record["seconds"]
    readme = (Path(rl.__file__).parent / "README.md").read_text(encoding="utf-8")
    section = readme.split("## What to watch")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    watched = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    assert len(watched) > 8 and watched <= set(records[0])
    for file in ("config.json", "model.safetensors", "value_head.pt", "run.json", "evaluation.json", "curves.png"):
        assert (tmp_path / "rl" / file).stat().st_size > 0
    samples = (tmp_path / "rl" / "samples.txt").read_text(encoding="utf-8")
    assert re.findall(r"--- step (\d+), ", samples) == ["1", "1", "6", "6"] and samples.count(">>>") == 4  # every fifth


def test_program_chains_of_thought_go_through_all_stages(tmp_path):
    try:
        warm = warmup.Config(
            out=str(tmp_path / "w"), engine="python", steps=2, limit=40, test_limit=40, max_new_tokens=12
        )
    except InputError as refusal:
        pytest.skip(str(refusal))
    warmup.main(warm)
    _, records = train(tmp_path / "w", tmp_path / "rl", engine="python")
    shares = {outcome: records[0][outcome] for outcome in rollout.OUTCOMES[1:]}
    assert sum(shares.values()) == pytest.approx(1) and shares["no_answer"] == 0  # none was right
    config = evaluate.Config(
        runs=(str(tmp_path / "rl"),), out=str(tmp_path), test_limit=5, samples=2
    )  # engine: from run.json
    assert evaluate.main(config)[0]["pass@2"] == 0
