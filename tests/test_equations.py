"""PPO and the sampler once more: by hand, and naively. Read this beside rl.py and the papers.

1. Equations by hand: small numbers, worked out in comments.
2. PPO without tensors: a token is a tuple of numbers, a sum is a loop, a row is passed alone. A run
   of rl.py is repeated in this way, two batches with all their updates, to the same weights.
3. The sampler without a cache: one pass over the whole prefix for every token.
"""

import copy
import itertools
import math
import random
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from families import CONFIGS
from pytest import approx
from torch import Tensor

import rl
from evaluate import read_metrics
from model import Decoder, load
from rl import correction_terms, gae, policy_loss, value_loss, whiten
from rollout import Rollout, sample

CORRECTIONS = get_args(rl.Correction)
F64 = torch.float64


def tensor(*rows: list) -> Tensor:
    return torch.tensor(rows, dtype=F64)


# ---- 1. equations by hand: (5)-(7) ---------------------------------------------------------------


def test_gae_of_a_short_a_long_and_a_cut_completion():
    mask = tensor(
        [0, 1, 0, 0],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
    )
    values = tensor(
        [9, 0.25, 9.00, 9.00],  # the nines stand in prompts and padding, and must not count
        [9, 0.50, 0.25, 0.75],
        [9, 9.00, 0.50, 1.00],
    )
    rewards = tensor(
        [0, 1.0, 0.0, 0.0],
        [0, -0.1, 0.2, 1.0],
        [0, 0.0, 0.1, 0.0],
    )
    advantages, returns = gae(rewards, values, mask > 0, gamma=1.0, lam=0.5)
    # Row 0, one action:  A = 1 - 0.25
    # Row 1, to the end:  delta = (-0.5 - 0.1 + 0.25, -0.25 + 0.2 + 0.75, -0.75 + 1)
    #                           = (-0.35, 0.7, 0.25)
    #                     A_3 = 0.25, A_2 = 0.7 + 0.5 * 0.25, A_1 = -0.35 + 0.5 * 0.825
    # Row 2, cut:         no value is bootstrapped: delta = (-0.5 + 0.1 + 1, -1 + 0) = (0.6, -1)
    #                     A_2 = -1, A_1 = 0.6 - 0.5 * 1
    expected = tensor(
        [0, 0.75, 0, 0],
        [0, 0.0625, 0.825, 0.25],
        [0, 0, 0.1, -1.0],
    )
    assert torch.allclose(advantages, expected, atol=1e-12)
    assert torch.allclose(returns, (values + expected) * mask, atol=1e-12)


def test_lam_95_pushes_a_long_right_completion_down_at_its_start_and_the_default_does_not():
    """V = 0, and a right and a wrong completion of 100 tokens: A_t = lam^(L-t) r, then whitened."""
    rewards = torch.zeros(2, 100, dtype=F64)
    rewards[0, -1] = 1
    mask = torch.ones(2, 100) > 0

    def first_advantage(lam):
        advantages, _ = gae(rewards, 0 * rewards, mask, 1.0, lam)
        return whiten(advantages, mask)[0, 0].item()

    assert first_advantage(0.95) < -0.3
    assert first_advantage(rl.Config.lam) == approx(1)


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_mask():
    mask = tensor(
        [1, 1, 0],
        [1, 0, 0],
    )
    advantages = tensor(
        [1, 2, 1e6],
        [6, 1e6, 1e6],
    )
    deviations = tensor(  # from the mean, 3
        [-2, -1, 0],
        [3, 0, 0],
    )
    expected = deviations / (14 / 3) ** 0.5
    assert torch.allclose(whiten(advantages, mask > 0), expected, atol=1e-6)
    constant = tensor([3, 3])
    assert (whiten(constant, constant > 0) == 0).all()  # and not nan


def test_group_relative_rewards_are_standard_scores_within_each_question():
    reward = tensor(
        [1.0, 0.0, 0.0, 0.0],
        [0.1, 0.1, 0.1, 0.1],
    )
    scores = rl.group_relative(reward.flatten(), 4).view(2, 4)
    # Mean 1/4, deviation sqrt(3) / 4: scores 3 and -1, over sqrt(3).
    expected = tensor([3, -1, -1, -1]) / 3**0.5
    assert torch.allclose(scores[:1], expected, atol=1e-3)
    assert (scores[1] == 0).all()  # equal rewards teach nothing


# ---- (8)-(11) ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -1.2 * 2.0, 0.0),  # gains beyond 1 + eps are cut,
        (1.5, -2.0, 3.0, 3.0),  # losses are not
        (0.5, -2.0, 0.8 * 2.0, 0.0),
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_policy_loss_clips_on_one_side_only(ratio, advantage, loss, gradient):
    log_ratio = tensor([ratio, 9]).log().requires_grad_()  # the nines are padding
    A, mask = tensor([advantage, 9]), tensor([1, 0])
    found = policy_loss(log_ratio.exp(), A, A**0, mask > 0, 0.2, 1)
    (slopes,) = torch.autograd.grad(found, log_ratio)
    assert found.item() == approx(loss)
    assert slopes.tolist() == [approx([gradient, 0])]


@pytest.mark.parametrize(
    ("correction", "weight", "trace"),
    [
        ("none", [1, 1, 1], [1, 1, 1]),
        ("ratio", [1, 1, 1], [1, 1, 1]),
        ("truncated", [0.5, 2, 1.5], [1, 1, 1]),
        ("retrace", [0.5, 2, 1.5], [0.5, 1, 1]),
        ("prefix", [0.5, 2, 3], [0.5, 4, 1.5]),
    ],
)
def test_the_table_of_corrections(correction, weight, trace):
    rho = tensor([0.5, 4, 1.5, 9])
    mask = tensor([1, 1, 1, 0]) > 0
    logp_old = tensor([-1, -2, -3, -4])
    logp_behav = logp_old - rho.log()
    found = correction_terms(correction, logp_old, logp_behav, mask, cap=2.0)
    assert found[0][mask].tolist() == approx(weight)
    assert found[1][mask].tolist() == approx(trace)
    denominator = logp_behav if correction == "ratio" else logp_old
    assert torch.equal(found[2], denominator)


def test_value_loss_is_refts_clip_of_the_return():
    """ReFT clips R - V to A +- eps; here A = R - V_old."""
    generator = torch.Generator().manual_seed(0)
    V, V_old, A = torch.randn(3, 4, 7, generator=generator, dtype=F64)
    R, mask = A + V_old, A > -0.5
    clipped = (R - V).clamp(A - 0.2, A + 0.2)
    squared = torch.max((R - V) ** 2, clipped**2)
    expected = 0.5 * squared[mask].sum() / 5
    found = value_loss(V, V_old, R, mask, 0.2, 5)
    assert found.item() == approx(expected.item())


@pytest.mark.parametrize(
    ("step", "update", "rate"),
    [
        (1, 1, 0.1),
        (1, 9, 0.9),
        (1, 10, 1.0),
        (2, 5, 0.375),
        (4, 30, 0.25),
    ],
)
def test_the_learning_rate_rises_over_ten_updates_and_falls_by_step(step, update, rate):
    config = SimpleNamespace(lr=1.0, steps=4)  # the last step still learns
    assert rl.learning_rate(config, step, update) == approx(rate)


# ---- 2. PPO without tensors ----------------------------------------------------------------------

CLIP, CAP = 0.05, 1.1
GAMMA, LAM = 0.9, 0.8
ALPHA, BETA = 3.0, 0.5
LR, STEPS = 0.03, 2
SAMPLES, PARTIAL = 2, 0.3
FLAGS = {
    "clip": CLIP,
    "cap": CAP,
    "gamma": GAMMA,
    "lam": LAM,
    "value_coef": ALPHA,
    "kl_coef": BETA,
    "lr": LR,
    "steps": STEPS,
    "samples": SAMPLES,
    "partial_reward": PARTIAL,
    "skip_ratio": 0.25,
    "rollout_batch": 6,
    "minibatch": 4,
    "micro_batch": 3,
    "max_new_tokens": 8,
    "limit": 9,
    "test_limit": 2,
    "dtype": "float64",
}


class Token(NamedTuple):
    """What of a sampled token stands still while its batch is learned."""

    base: float  # log of the denominator of eq. (8)
    weight: float  # w_t of eq. (9)
    advantage: float  # A_t of eq. (6)
    value_old: float  # V_phi(s_t) when the batch was collected
    target: float  # R_t of eq. (7)


def weight_and_trace(correction: str, rho: list[float], t: int) -> tuple[float, float]:
    """w_t and c_t of the table of corrections; rho: pi_old / mu of every token of the row."""
    table = {
        "none": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "truncated": (min(rho[t], CAP), 1.0),
        "retrace": (min(rho[t], CAP), min(rho[t], 1.0)),
        "prefix": (math.prod(rho[: t + 1]), rho[t]),
    }
    return table[correction]


def naive_tokens(correction, rewards, values, logp_old, logp_behav, gamma, lam) -> list[Token]:
    """One row: the table of corrections and eqs. (5)-(7), as sums and not as a recursion."""
    L = len(rewards)
    rho = [math.exp(logp_old[t] - logp_behav[t]) for t in range(L)]
    w, c = zip(*(weight_and_trace(correction, rho, t) for t in range(L)), strict=True)
    base = logp_behav if correction == "ratio" else logp_old
    V = [*values, 0.0]  # nothing follows the last action
    delta = [-V[t] + rewards[t] + gamma * V[t + 1] for t in range(L)]  # eq. (5)
    tokens = []
    for t in range(L):
        A = 0.0
        for k in range(t, L):
            decay = (gamma * lam) ** (k - t) * math.prod(c[t + 1 : k + 1])
            A += decay * delta[k]  # eq. (6)
        R = V[t] + c[t] * A  # eq. (7)
        tokens.append(Token(base[t], w[t], A, V[t], R))
    return tokens


def naive_losses(token: Token, logp_new: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Policy loss and value loss of one token, and whether the clip took its gradient."""
    A, R = token.advantage, token.target
    ratio = (logp_new - token.base).exp()  # eq. (8)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    policy = -token.weight * min(ratio * A, clipped * A)  # eq. (9)
    near = value.clamp(token.value_old - CLIP, token.value_old + CLIP)
    critic = 0.5 * max((value - R) ** 2, (near - R) ** 2)  # eq. (10)
    return policy, critic, bool(clipped * A < ratio * A)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_terms_once_a_batch_and_losses_by_micro_batch_are_sums_over_tokens(correction):
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 4, (12, 1), generator=generator)
    ends = torch.randint(4, 10, (12, 1), generator=generator)
    column = torch.arange(9)
    mask = (starts <= column) & (column < ends)
    count = int(mask.sum())
    x = 0.5 * torch.randn(6, 12, 9, generator=generator, dtype=F64)
    x[:, ~mask] = torch.arange(6.0, dtype=F64)[:, None]  # must count nowhere
    rewards, values_old, logp_old, logp_behav, logp_new, values = x

    weight, trace, base = correction_terms(correction, logp_old, logp_behav, mask, CAP)
    advantages, returns = gae(rewards, values_old, mask, GAMMA, LAM, trace)
    ratio = (logp_new - base).exp()
    pg_loss = v_loss = 0.0
    for n in torch.arange(12).split(5):
        pg_loss += policy_loss(ratio[n], advantages[n], weight[n], mask[n], CLIP, count)
        v_loss += value_loss(values[n], values_old[n], returns[n], mask[n], CLIP, count)

    tokens, policy_sum, critic_sum = [], 0.0, 0.0
    for n in range(12):
        row = naive_tokens(correction, *x[:4, n, mask[n]].tolist(), GAMMA, LAM)
        tokens += row
        for token, logp, value in zip(row, *x[4:, n, mask[n]], strict=True):
            policy, critic, _ = naive_losses(token, logp, value)
            policy_sum += policy.item()
            critic_sum += critic.item()
    exactly = partial(approx, abs=1e-12)
    assert advantages[mask].tolist() == exactly([token.advantage for token in tokens])
    assert returns[mask].tolist() == exactly([token.target for token in tokens])
    assert pg_loss.item() == exactly(policy_sum / count)
    assert v_loss.item() == exactly(critic_sum / count)


def row_stats(model: Decoder, rollout: Rollout, n: int, skip=None) -> tuple[list, list]:
    """log pi(a_t|s_t) and V_phi(s_t) of the sampled tokens of row n."""
    tokens = rollout.tokens[n, : rollout.lengths[n]]
    hidden = model(tokens[None], skip)[0]
    log_pi = model.logits(hidden).log_softmax(-1)
    values = model.values(hidden)
    sampled = range(rollout.prompt_lens[n], len(tokens))
    logp = [log_pi[t - 1, tokens[t]] for t in sampled]
    return logp, [values[t - 1] for t in sampled]


@torch.no_grad()
def naive_batch(policy, reference, rollout, correction, advantage) -> list[list[Token]]:
    """Steps 3 to 5 of main for every row; eqs. (3)-(7)."""
    N = len(rollout.tokens)
    reward = [(0.0, 1.0, PARTIAL)[n % 3] for n in range(N)]  # eq. (3) of rewards_that_differ
    gamma, lam = (1.0, 1.0) if advantage == "group" else (GAMMA, LAM)
    rows = []
    for n in range(N):
        end_reward = reward[n]
        logp_old, values = row_stats(policy, rollout, n)
        logp_ref, _ = row_stats(reference, rollout, n)
        logp_behav, _ = row_stats(policy, rollout, n, rollout.skip)
        if advantage == "group":
            group = reward[n - n % SAMPLES :][:SAMPLES]
            end_reward = (reward[n] - np.mean(group)) / (np.std(group) + 1e-4)
            values = [0.0] * len(values)
        rewards = [BETA * (ref - old) for ref, old in zip(logp_ref, logp_old, strict=True)]
        rewards[-1] += end_reward  # eq. (4)
        rows.append(naive_tokens(correction, rewards, values, logp_old, logp_behav, gamma, lam))
    return rows if advantage == "group" else whitened(rows)


def whitened(rows: list[list[Token]]) -> list[list[Token]]:
    """Advantages of mean 0 and variance 1 over all tokens of the batch."""
    everything = [token.advantage for row in rows for token in row]
    mean = np.mean(everything)
    scale = math.sqrt(np.var(everything) + 1e-8)

    def white(token):
        return token._replace(advantage=(token.advantage - mean) / scale)

    return [[white(token) for token in row] for row in rows]


def naive_loss(model, rollout, rows, chosen: list[int], alpha: float, sums: Counter) -> Tensor:
    """Eq. (11) over the chosen rows; adds to `sums` what metrics.jsonl has the means of."""
    loss, count = 0.0, 0
    for n in chosen:
        logp_new, values = row_stats(model, rollout, n)
        for token, logp, value in zip(rows[n], logp_new, values, strict=True):
            policy, critic, is_clipped = naive_losses(token, logp, value)
            loss += policy + alpha * critic  # eq. (11)
            count += 1
            sums["policy_loss"] += policy.item()
            sums["value_loss"] += critic.item()
            sums["clip_fraction"] += is_clipped
    sums["tokens"] += count
    return loss / count


def naive_run(model: Decoder, batches: list, correction: str, advantage: str) -> list[dict]:
    """All updates of a run on (rollout, minibatches) of every step; the numbers it records."""
    reference = copy.deepcopy(model)
    alpha = 0.0 if advantage == "group" else ALPHA
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    updates, records = 0, []
    for step, (rollout, minibatches) in enumerate(batches):
        rows = naive_batch(model, reference, rollout, correction, advantage)
        sums, norms = Counter(), []
        for chosen in minibatches:
            optimizer.zero_grad()
            naive_loss(model, rollout, rows, chosen, alpha, sums).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norms.append(norm.item())
            updates += 1
            lr = LR * updates / 10 * (1 - step / STEPS)  # rises over ten updates
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        tokens = sums.pop("tokens")
        record = {name: total / tokens for name, total in sums.items()}
        records.append({**record, "grad_norm": np.mean(norms)})
    return records


@pytest.fixture(scope="module")
def start(small_run, tmp_path_factory):
    """small_run with a critic that is not zero, and layers that mu can do without."""
    model = load(small_run, "cpu", "float64")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.value_head.weight)
    for p in model.layers.parameters():
        p.data /= 2
    folder = tmp_path_factory.mktemp("start")
    model.save_pretrained(folder)
    (folder / "run.json").write_bytes((small_run / "run.json").read_bytes())
    return folder


@pytest.mark.usefixtures("rewards_that_differ")
@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_run_ends_where_the_equations_end(start, tmp_path, monkeypatch, correction, advantage):
    batches, real = [], rl.ppo_update

    def noting(run, rollout, batch, minibatches):
        minibatches = list(minibatches)
        chosen = [rows.tolist() for rows, _ in minibatches]
        batches.append((rollout, chosen))
        return real(run, rollout, batch, minibatches)

    monkeypatch.setattr(rl, "ppo_update", noting)
    config = rl.Config(
        model=str(start),
        out=str(tmp_path),
        correction=correction,
        advantage=advantage,
        **FLAGS,
    )
    rl.main(config)

    model = load(start, "cpu", "float64")
    records = naive_run(model, batches, correction, advantage)
    trained = load(tmp_path, "cpu", "float64")
    for name, parameter in model.named_parameters():
        assert (parameter - trained.get_parameter(name)).abs().max() < 1e-6, name
    for expected, found in zip(records, read_metrics(tmp_path), strict=True):
        for name, value in expected.items():
            assert found[name] == approx(value, rel=1e-6, abs=1e-9), name
        assert 0.1 < found["clip_fraction"] < 0.9 and found["ess_tokens"] < 0.97
    assert abs(found["kl_ref"]) > 0.003 and records[0]["grad_norm"] > 0.5


# ---- 3. the sampler without a cache --------------------------------------------------------------


@torch.no_grad()
def naive_completion(model, prompt, uniforms, eos_ids, temperature, skip):
    """Tokens and log mu: the first token whose share of the CDF exceeds the uniform number."""
    tokens, logps = list(prompt), []
    for u in uniforms:
        logits = model.logits(model(torch.tensor([tokens]), skip))[0, -1]
        probs = (logits / (temperature or 1)).softmax(-1).tolist()
        cdf = list(itertools.accumulate(probs))
        action = probs.index(max(probs))
        if temperature:
            action = next(i for i, c in enumerate(cdf) if c > u * cdf[-1])
        tokens.append(action)
        logps.append(math.log(probs[action]))
        if action in eos_ids:
            break
    return tokens, logps


@pytest.mark.parametrize("seed", range(16))
def test_sample_gives_what_the_naive_sampler_gives(seed):
    dice = random.Random(seed)
    torch.manual_seed(seed)
    family = dice.choice(list(CONFIGS))
    model = Decoder(CONFIGS[family]()).double()
    prompts = []
    for _ in range(dice.randint(1, 4)):
        prompts.append(dice.choices(range(97), k=dice.randint(1, 9)))
    seeds = [dice.randrange(2**40) for _ in prompts]
    eos_ids = dice.sample(range(97), dice.choice([0, 1, 4, 20]))
    num_samples, new_tokens = dice.randint(1, 3), dice.randint(1, 9)
    temperature = dice.choice([1.0, 1.0, 0.6, 1.7, 0])
    skip = dice.choice([None, torch.tensor(dice.choices([True, False], k=4))])
    rollout = sample(
        model,
        prompts,
        max_new_tokens=new_tokens,
        eos_id=eos_ids,
        pad_id=0,
        num_samples=num_samples,
        temperature=temperature,
        skip=skip,
        seed=seeds,
        max_rows=dice.choice([None, 1, 2, 3]),
    )
    assert len(rollout.tokens) == len(prompts) * num_samples
    for n, (prompt, completion) in enumerate(rollout.pairs()):
        i, j = divmod(n, num_samples)
        uniforms = np.random.default_rng((seeds[i], j)).random(new_tokens)
        tokens, logps = naive_completion(model, prompts[i], uniforms, eos_ids, temperature, skip)
        assert prompt + completion == tokens
        assert bool(rollout.finished[n]) == (tokens[-1] in eos_ids)
        logp_behav = rollout.logp_behav[n][rollout.action_mask[n]]
        assert logp_behav.tolist() == approx(logps, abs=1e-10)
