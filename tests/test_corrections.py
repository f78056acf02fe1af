"""Off-policy correction, exact: all completions of small problems are enumerated, in float64.

The policy is a table of logits, one row a state; mu is another one. Expectations are sums over all
completions, and gradients go through the functions of rl.py. The second half is the table of the
README: bias and variance of the five corrections.
"""

from statistics import fmean
from typing import get_args

import pytest
import torch
from pytest import approx
from torch import Tensor
from transformers import LlamaConfig

import rl
from model import Decoder
from rl import correction_terms, gae, policy_loss
from rollout import token_logp

VOCAB, EOS, LONGEST = 3, 2, 4
F64 = torch.float64
CORRECTIONS = get_args(rl.Correction)


def enumerate_completions(has_eos: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """All completions: ended by EOS anywhere or cut at LONGEST; without EOS all have that length.

    tokens, mask and the state before each token, (N, LONGEST) each; the number of states.
    """
    completions, prefixes = [], [()]
    for _ in range(LONGEST):
        longer = [(*prefix, token) for prefix in prefixes for token in range(VOCAB)]
        completions += [c for c in longer if has_eos and c[-1] == EOS]
        prefixes = [c for c in longer if not has_eos or c[-1] != EOS]
    completions += prefixes
    prefixes = sorted({c[:t] for c in completions for t in range(len(c))})
    states = {prefix: i for i, prefix in enumerate(prefixes)}
    shape = len(completions), LONGEST
    tokens = torch.zeros(shape, dtype=torch.int64)
    state = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for n, c in enumerate(completions):
        for t in range(len(c)):
            tokens[n, t] = c[t]
            state[n, t] = states[c[:t]]
            mask[n, t] = True
    return tokens, mask, state, len(states)


class Problem:
    """A policy theta, a behavior model, rewards per token and a critic that knows nothing."""

    def __init__(self, seed: int, has_eos=True, noise=0.5, kl_coef=0.1):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.tokens, self.mask, self.state, states = enumerate_completions(has_eos)
        self.theta = normal(states, VOCAB).requires_grad_()
        self.logp_old = self.logp(self.theta).detach()  # (N, L), as all of these
        self.mu_table = self.theta.detach() + noise * normal(states, VOCAB)
        self.logp_behav = self.logp(self.mu_table)
        self.mu = self.logp_behav.sum(1).exp()  # (N,): how often mu writes each completion
        self.last = self.mask.long().sum(1) - 1  # (N,)
        is_right = torch.rand(len(self.mask), generator=generator) < 0.4
        self.rewards = self.at_last(is_right.double())  # eq. (3)
        ref_table = self.theta.detach() + 0.3 * normal(states, VOCAB)
        logp_ref = self.logp(ref_table)
        self.rewards -= kl_coef * (self.logp_old - logp_ref)  # eq. (4)
        self.values = normal(states)[self.state] * self.mask

    def logp(self, table: Tensor) -> Tensor:
        return token_logp(table[self.state], self.tokens) * self.mask

    def at_last(self, reward: Tensor) -> Tensor:
        """Rewards of completions (N,) at their last tokens, (N, L)."""
        rewards = torch.zeros(self.mask.shape, dtype=F64)
        return rewards.scatter(1, self.last[:, None], reward[:, None])

    def terms(self, correction: str) -> tuple[Tensor, Tensor, Tensor]:
        return correction_terms(correction, self.logp_old, self.logp_behav, self.mask, cap=2.0)

    def true_gradient(self) -> Tensor:
        """grad sum_tau pi_theta(tau) sum_t r_total_t, the rewards frozen at pi_old."""
        pi = self.logp(self.theta).sum(1).exp()  # (N,)
        objective = pi @ self.rewards.sum(1)
        return torch.autograd.grad(objective, self.theta)[0]

    def row_gradients(
        self,
        correction: str,
        lam: float = 1.0,
        values: Tensor | None = None,
        weight: Tensor | None = None,
        trace: Tensor | None = None,
    ) -> Tensor:
        """- grad of the shipped loss of each completion alone, (N, states, VOCAB)."""
        shipped_weight, shipped_trace, base = self.terms(correction)
        weight = shipped_weight if weight is None else weight
        trace = shipped_trace if trace is None else trace
        values = self.values if values is None else values
        advantages, _ = gae(self.rewards, values, self.mask, 1.0, lam, trace)
        ratio = (self.logp(self.theta) - base).exp()
        gradients = []
        for row in zip(ratio, advantages, weight, self.mask, strict=True):
            loss = policy_loss(*row, clip=0.2, tokens=1)
            gradients += torch.autograd.grad(-loss, self.theta, retain_graph=True)
        return torch.stack(gradients)

    def error(self, correction: str, **changes) -> float:
        """Of the expected gradient under mu, relative to the true one."""
        rows = self.row_gradients(correction, **changes)
        return relative_error(self.expectation(rows), self.true_gradient())

    def expectation(self, rows: Tensor) -> Tensor:
        """Under mu; rows: (N, ...)."""
        return torch.tensordot(self.mu, rows, dims=1)

    def state_values(self, logp: Tensor) -> Tensor:
        """V(s_t) of the policy with these log-probabilities, exact, (N, L)."""
        probability = logp.sum(1, keepdim=True).exp() * self.mask  # (N, L): of what passes s_t
        to_go = self.rewards.flip(1).cumsum(1).flip(1)  # (N, L)
        state = self.state.flatten()
        zeros = torch.zeros(len(self.theta), dtype=F64)  # (states,)
        passing = zeros.index_add(0, state, probability.flatten())
        earned = zeros.index_add(0, state, (probability * to_go).flatten())
        return (earned / passing)[self.state] * self.mask


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    error = (estimate - truth).norm() / truth.norm()
    return error.item()


# ---- the theorem ---------------------------------------------------------------------------------


@pytest.mark.parametrize("has_eos", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_prefix_is_unbiased_for_any_critic(seed, has_eos):
    assert Problem(seed, has_eos).error("prefix") < 1e-10


def test_prefix_needs_lam_1_unless_the_critic_is_right():
    problem = Problem(0)
    assert problem.error("prefix", lam=0.95) > 1e-3
    values = problem.state_values(problem.logp_old)
    assert problem.error("prefix", lam=0.95, values=values) < 1e-10


def test_prefix_needs_the_trace_of_the_next_action_and_the_weight_of_the_past():
    problem = Problem(0)
    _, rho, _ = problem.terms("prefix")
    ones = torch.ones_like(rho)
    this_action = torch.cat([ones[:, :1], rho[:, :-1]], 1)  # eq. (6) with c_t
    future = rho.flip(1).cumprod(1).flip(1)
    assert problem.error("prefix", trace=ones) > 1e-3
    assert problem.error("prefix", trace=this_action) > 1e-3
    assert problem.error("prefix", weight=rho) > 1e-3
    assert problem.error("prefix", weight=future) > 1e-3


def test_prefix_is_unbiased_for_every_skip_mask_of_a_decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        initializer_range=0.6,
    )
    model = Decoder(config).double()
    model.value_head.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    problem = Problem(1)
    mask, actions = problem.mask, problem.tokens
    prompt = torch.zeros_like(actions[:, :1])  # of one token
    tokens = torch.cat([prompt, actions], 1)

    def logp(skip=None):
        hidden = model(tokens, skip)[:, :-1]
        return token_logp(model.logits(hidden), actions) * mask

    def gradient(x):
        gradients = torch.autograd.grad(x, parameters)
        return torch.cat([g.flatten() for g in gradients])

    logp_old = logp().detach()
    pi = logp().sum(1).exp()
    truth = gradient(pi @ problem.rewards.sum(1))
    for skipped in ("", "1", "2", "12"):
        skip = torch.tensor([layer in skipped for layer in "0123"])
        logp_behav = logp(skip).detach()
        mu = logp_behav.sum(1, keepdim=True).exp()  # (N, 1)
        weight, trace, base = correction_terms("prefix", logp_old, logp_behav, mask, 2.0)
        advantages, _ = gae(problem.rewards, problem.values, mask, 1.0, 1.0, trace)
        ratio = (logp() - base).exp()
        # The weight enters linearly: times mu, one call takes the expectation.
        loss = policy_loss(ratio, advantages, mu * weight, mask, 0.2, 1)
        assert relative_error(gradient(-loss), truth) < 1e-10
    assert (logp_behav - logp_old).abs().max() > 0.05  # the layers do matter


@pytest.mark.parametrize("seed", range(3))
def test_group_relative_rewards_give_the_gradient_of_success_under_prefix(seed):
    """Two samples a question, each 0 or 1: the mean over all pairs that mu may draw."""
    problem = Problem(seed, kl_coef=0.0)
    is_right = problem.rewards.sum(1)  # (N,)
    pairs = torch.cartesian_prod(is_right, is_right)  # (N * N, 2)
    relative = rl.group_relative(pairs.flatten(), 2)[::2]  # (N * N,): of the first of each pair
    truth = problem.true_gradient() * 0.5 / (0.5 + 1e-4)  # a group of 0 and 1 has deviation 0.5
    relative = relative.view(len(is_right), -1) @ problem.mu  # (N,)
    problem.rewards = problem.at_last(relative)
    problem.values *= 0
    error = {}
    for correction in ("prefix", "none"):
        rows = problem.row_gradients(correction)
        error[correction] = relative_error(problem.expectation(rows), truth)
    assert error["prefix"] < 1e-10 and error["none"] > 1e-3


def test_the_return_of_prefix_has_the_value_of_pi_as_its_expectation():
    problem = Problem(0)
    _, trace, _ = problem.terms("prefix")
    rewards, mask = problem.rewards, problem.mask
    _, returns = gae(rewards, problem.values, mask, 1.0, 1.0, trace)
    value_of_pi = problem.state_values(problem.logp_old)
    for state in range(len(problem.theta)):
        here = (problem.state == state) & mask  # at most one column of a completion
        mu = problem.mu[here.any(1)]
        mean = mu @ returns[here] / mu.sum()
        assert mean.item() == approx(value_of_pi[here][0].item(), abs=1e-12)


# ---- the five corrections ------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_on_policy_all_five_are_the_same_gradient(correction):
    problem = Problem(0, noise=0.0)
    weight, trace, base = problem.terms(correction)
    assert (weight == 1).all() and (trace == 1).all()
    assert torch.equal(base, problem.logp_old)  # every ratio is 1, and none is clipped
    assert problem.error(correction) < 1e-10


def bias_and_variance(correction: str, noise: float, problems: int = 24) -> tuple[float, float]:
    """|E g - grad J| / |grad J| and Var g / |grad J|^2, means over problems; lam 1, critic V^mu."""
    biases, variances = [], []
    for seed in range(problems):
        problem = Problem(1000 + seed, noise=noise)
        truth = problem.true_gradient()
        values = problem.state_values(problem.logp_behav)
        rows = problem.row_gradients(correction, 1.0, values)
        mean = problem.expectation(rows)
        biases.append(relative_error(mean, truth))
        variance = problem.expectation((rows - mean) ** 2).sum()
        variances.append((variance / truth.square().sum()).item())
    return fmean(biases), fmean(variances)


def test_bias_and_variance_are_those_of_the_readme_and_small_where_mu_is_near():
    table = {correction: bias_and_variance(correction, 0.5) for correction in CORRECTIONS}
    readme = {
        "none": (0.35, 12.1),
        "ratio": (0.53, 9.0),
        "truncated": (0.28, 13.2),
        "retrace": (0.23, 11.2),
        "prefix": (0.00, 18.0),
    }
    for correction, (bias, variance) in readme.items():
        assert table[correction] == (approx(bias, abs=0.006), approx(variance, abs=0.06))
        near, _ = bias_and_variance(correction, 0.05, 8)
        assert near < 0.4 * bias + 1e-10


# ---- what is measured of mu ----------------------------------------------------------------------


def test_mu_without_a_finite_log_probability_is_refused_and_padding_does_not_matter():
    logp_old = torch.zeros(1, 2)
    mask = torch.tensor([[True, False]])
    for broken in (torch.nan, -torch.inf):
        logp_behav = torch.tensor([[0.0, broken]])
        correction_terms("truncated", logp_old, logp_behav, mask, 2.0)
        with pytest.raises(FloatingPointError, match="log mu"):
            correction_terms("truncated", logp_old, logp_behav.flip(1), mask, 2.0)


def test_kl_and_entropy_from_the_samples_of_mu_are_unbiased():
    problem = Problem(0)
    log_mu = problem.mu_table.log_softmax(-1)  # (states, VOCAB)
    log_pi = problem.theta.detach().log_softmax(-1)
    exact = {
        "kl_behav": (log_mu.exp() * (log_mu - log_pi)).sum(-1),  # (states,)
        "entropy": -(log_pi.exp() * log_pi).sum(-1),
    }
    sums = dict.fromkeys(exact, 0.0)
    for n, mask in enumerate(problem.mask):
        found = rl.mismatch(problem.logp_old[n], problem.logp_behav[n], mask)
        times = problem.mu[n].item() * int(mask.sum())
        for name in exact:
            sums[name] += times * found[name]
    for name, table in exact.items():
        tokens = table[problem.state] * problem.mask
        expected = problem.mu @ tokens.sum(1)
        assert sums[name] == approx(expected.item(), abs=1e-12)


def test_the_effective_sample_size_by_hand():
    rho = torch.tensor([4.0, 0.5, 1.0, 9.0])
    mask = torch.tensor([True, True, True, False])
    mean, mean_square = 5.5 / 3, 17.25 / 3
    found = rl.mismatch(rho.log(), 0 * rho, mask)
    assert found["ess_tokens"] == approx(mean**2 / mean_square)
