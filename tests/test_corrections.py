"""Off-policy correction, exact: every completion of small problems is enumerated, in float64, through rl.py's functions."""

import itertools
import math
from typing import get_args

import pytest
import torch
from transformers import LlamaConfig

import rl
from model import Decoder
from rl import correction_terms, gae, next_level, policy_loss
from rollout import token_logp

V, EOS, L = 3, 2, 4  # vocabulary, end of sequence, longest completion
F64 = torch.float64
CORRECTIONS = get_args(rl.Correction)


def enumerate_completions(eos: bool):
    """Every completion: ended by EOS at any place or cut at L tokens; without EOS all have L. tokens, mask: (N, L)."""
    done, open_ = [], [()]
    for _ in range(L):
        longer = [(*prefix, a) for prefix in open_ for a in range(V)]
        done += [c for c in longer if eos and c[-1] == EOS]
        open_ = [c for c in longer if not (eos and c[-1] == EOS)]
    completions = done + open_
    tokens = torch.tensor([c + (0,) * (L - len(c)) for c in completions])
    mask = torch.tensor([[t < len(c) for t in range(L)] for c in completions])
    states = {prefix: i for i, prefix in enumerate(sorted({c[:t] for c in completions for t in range(len(c))}))}
    index = torch.tensor([[states.get(c[:t], 0) if t < len(c) else 0 for t in range(L)] for c in completions])
    return tokens, mask, index, len(states)


class Problem:
    """A policy as a table of logits over all states, mu beside it, and rewards per token."""

    def __init__(self, seed: int, eos: bool = True, noise: float = 0.5, kl: bool = True):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.tokens, self.mask, self.index, states = enumerate_completions(eos)
        self.theta = normal(states, V).requires_grad_()
        self.mu_table = self.theta.detach() + noise * normal(states, V)
        self.logp_old, self.logp_behav = self.logp(self.theta).detach(), self.logp(self.mu_table)
        last = self.mask.long().sum(1) - 1
        self.rewards = torch.zeros(self.mask.shape, dtype=F64)
        success = (torch.rand(len(last), generator=generator) < 0.4).double()
        self.rewards[torch.arange(len(last)), last] = success  # eq. (3)
        if kl:
            logp_ref = self.logp(self.theta.detach() + 0.3 * normal(states, V))
            self.rewards = self.rewards - 0.1 * (self.logp_old - logp_ref) * self.mask  # eq. (4)
        self.values = normal(states)[self.index] * self.mask  # a wrong critic

    def logp(self, table):
        return token_logp(table[self.index], self.tokens) * self.mask  # (N, L)

    def probability(self, logp):
        return (logp * self.mask).sum(1).exp()  # (N,)

    def true_gradient(self):
        """grad sum_tau pi_theta(tau) sum_t r_total_t, r_total frozen at pi_old."""
        objective = (self.probability(self.logp(self.theta)) * self.rewards.sum(1)).sum()
        return torch.autograd.grad(objective, self.theta)[0]

    def row_gradients(self, correction, lam=1.0, cap=2.0, trace=None, values=None, attached=False):
        """- grad of the shipped loss of each completion alone, denominator 1: (N, states, V)."""
        values = self.values if values is None else values
        if trace is None:
            _, trace = correction_terms(correction, self.logp_old, self.logp_behav, self.mask, cap)
        advantages, _ = gae(self.rewards, values, self.mask, 1.0, lam, trace)
        gradients = []
        for n in range(len(self.tokens)):
            row = slice(n, n + 1)
            logp_new = self.logp(self.theta)
            logp_old = logp_new if attached else self.logp_old
            loss = policy_loss(
                logp_new[row], logp_old[row], self.logp_behav[row], advantages[row], self.mask[row],
                0.2, correction, cap, 1,
            )  # fmt: skip
            gradients.append(-torch.autograd.grad(loss, self.theta, allow_unused=True)[0])
        return torch.stack(gradients)

    def mean_gradient(self, *args, **flags):
        return torch.einsum("n,nsv->sv", self.probability(self.logp_behav), self.row_gradients(*args, **flags))

    def state_values(self, logp):
        """V(s_t) of the policy with these log-probabilities, exact, (N, L): what follows each prefix, on average."""
        p, to_go = self.probability(logp), (self.rewards * self.mask).flip(1).cumsum(1).flip(1)
        flat, weight = self.index[self.mask], p[:, None].expand_as(to_go)[self.mask]
        sums = torch.zeros(int(self.index.max()) + 1, 2, dtype=F64)
        sums.index_add_(0, flat, torch.stack([weight * to_go[self.mask], weight], 1))
        return (sums[:, 0] / sums[:, 1])[self.index] * self.mask


def relative_error(estimate, truth):
    return ((estimate - truth).norm() / truth.norm()).item()


# ---- the theorem ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [True, False], ids=["EOS anywhere", "fixed length"])
@pytest.mark.parametrize("seed", range(3))
def test_prefix_is_unbiased_for_any_critic(seed, eos):
    problem = Problem(seed, eos)
    assert relative_error(problem.mean_gradient("prefix"), problem.true_gradient()) < 1e-10


def test_prefix_needs_lam_1_unless_the_critic_is_right():
    problem = Problem(0)
    assert relative_error(problem.mean_gradient("prefix", lam=0.95), problem.true_gradient()) > 1e-3
    right = problem.state_values(problem.logp_old)
    assert relative_error(problem.mean_gradient("prefix", lam=0.95, values=right), problem.true_gradient()) < 1e-10


def test_prefix_needs_the_trace_of_the_next_action():
    problem = Problem(0)
    _, trace = correction_terms("prefix", problem.logp_old, problem.logp_behav, problem.mask, 2.0)
    this_instead_of_next = torch.cat([torch.ones_like(trace[:, :1]), trace[:, :-1]], 1)  # eq. (6) now reads c_t
    error = relative_error(problem.mean_gradient("prefix", trace=this_instead_of_next), problem.true_gradient())
    assert error > 1e-3


def test_prefix_needs_more_than_plain_gae():
    problem = Problem(0)
    plain = torch.ones_like(problem.rewards)
    assert relative_error(problem.mean_gradient("prefix", trace=plain), problem.true_gradient()) > 1e-3


def replace_weight(monkeypatch, weight_of_rho, detach=True):
    def terms(correction, logp_old, logp_behav, mask, cap):
        rho = torch.where(mask, logp_old - logp_behav, 0.0).exp()
        rho = rho.detach() if detach else rho
        return weight_of_rho(rho), rho.detach()

    monkeypatch.setattr(rl, "correction_terms", terms)


def test_prefix_needs_the_product_of_the_past(monkeypatch):
    problem = Problem(0)
    replace_weight(monkeypatch, lambda rho: rho.flip(1).cumprod(1).flip(1))
    assert relative_error(problem.mean_gradient("prefix"), problem.true_gradient()) > 1e-3
    replace_weight(monkeypatch, lambda rho: rho.cumprod(1))
    assert relative_error(problem.mean_gradient("prefix"), problem.true_gradient()) < 1e-10


def test_the_weight_must_be_a_constant(monkeypatch):
    problem = Problem(0)
    constant = problem.row_gradients("prefix")
    replace_weight(monkeypatch, lambda rho: rho.cumprod(1), detach=False)
    attached = problem.row_gradients("prefix", attached=True)
    truth = problem.true_gradient()
    mu = problem.probability(problem.logp_behav)
    assert relative_error(torch.einsum("n,nsv->sv", mu, attached), truth) > 1e-3
    assert relative_error(torch.einsum("n,nsv->sv", mu, constant), truth) < 1e-10


def test_prefix_is_unbiased_for_every_skip_mask_of_a_decoder():
    torch.manual_seed(0)
    config = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": V, "eos_token_id": EOS}
    decoder = Decoder(LlamaConfig(**config, num_hidden_layers=4, initializer_range=0.6)).double()
    completions, mask, index, states = enumerate_completions(eos=True)
    tokens = torch.cat([torch.zeros(len(completions), 1, dtype=torch.int64), completions], 1)  # a prompt of one token
    parameters = [p for name, p in decoder.named_parameters() if not name.startswith("value_head")]

    def logp(skip=None):
        return token_logp(decoder.logits(decoder(tokens, skip))[:, :-1], completions) * mask

    logp_old = logp().detach()
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(states, 1 + V, generator=generator, dtype=F64)  # V_phi(s), r(s, a)
    values, rewards = table[index, 0] * mask, table[index, 1 + completions] * mask
    truth = torch.autograd.grad((logp().sum(1).exp() * rewards.sum(1)).sum(), parameters)
    truth = torch.cat([g.flatten() for g in truth])
    estimates = []
    for skipped in itertools.chain([()], [(1,)], [(2,)], [(1, 2)]):
        skip = torch.tensor([i in skipped for i in range(4)])
        logp_behav = logp(skip).detach()
        mu = logp_behav.sum(1).exp()
        assert mu.sum().item() == pytest.approx(1, abs=1e-12)
        _, trace = correction_terms("prefix", logp_old, logp_behav, mask, 2.0)
        advantages, _ = gae(rewards, values, mask, 1.0, 1.0, trace)
        # eq. (9) is homogeneous in A: scaling row n by mu(tau_n) takes the expectation in one call
        loss = policy_loss(logp(), logp_old, logp_behav, mu[:, None] * advantages, mask, 0.2, "prefix", 2.0, 1)
        estimates.append(-torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        assert relative_error(estimates[-1], truth) < 1e-10
    assert relative_error(sum(estimates) / len(estimates), truth) < 1e-10
    assert (logp(torch.tensor([False, True, True, False])) - logp_old).abs().max() > 0.05  # the masks do matter


@pytest.mark.parametrize("seed", range(3))
def test_group_relative_rewards_give_the_gradient_of_success_under_prefix(seed):
    """Two samples a question, each 0 or 1: the mean over all pairs that mu may draw, through the shipped functions."""
    problem = Problem(seed, kl=False)
    mu, success = problem.probability(problem.logp_behav), problem.rewards.sum(1)
    pairs = torch.cartesian_prod(success, success)  # (N * N, 2): a completion and the other sample of its question
    relative = (
        rl.group_relative(pairs.flatten(), 2).view(len(mu), len(mu), 2)[..., 0] @ mu
    )  # (N,): the loss is linear in it
    truth = problem.true_gradient() * 0.5 / (0.5 + 1e-4)  # a group of 0 and 1 has deviation 0.5
    problem.rewards = problem.rewards * 0
    problem.rewards[torch.arange(len(mu)), problem.mask.long().sum(1) - 1] = relative
    problem.values = torch.zeros_like(problem.values)
    assert relative_error(problem.mean_gradient("prefix"), truth) < 1e-10
    assert relative_error(problem.mean_gradient("none"), truth) > 1e-3


# ---- properties of the five -----------------------------------------------------------------------------------------


def test_on_policy_all_five_are_the_same_gradient_and_nothing_is_clipped():
    problem = Problem(0, noise=0.0)
    assert torch.equal(problem.logp_behav, problem.logp_old)
    on_policy = problem.mean_gradient("none", lam=0.95)
    assert relative_error(problem.mean_gradient("none", lam=1.0), problem.true_gradient()) < 1e-10
    for correction in CORRECTIONS:
        assert relative_error(problem.mean_gradient(correction, lam=0.95), on_policy) < 1e-12
        ratio = rl.importance_ratio(problem.logp_old, problem.logp_old, problem.logp_behav, correction)
        assert (ratio == 1).all()


def test_the_target_of_prefix_has_the_value_of_pi_as_its_expectation():
    problem = Problem(0)
    _, trace = correction_terms("prefix", problem.logp_old, problem.logp_behav, problem.mask, 2.0)
    _, returns = gae(problem.rewards, problem.values, problem.mask, 1.0, 1.0, trace)
    mu = problem.probability(problem.logp_behav)
    value_of_pi = problem.state_values(problem.logp_old)
    for state in range(len(problem.theta)):
        here = (problem.index == state) & problem.mask  # at most one column of a completion
        weight = mu[:, None].expand_as(here)[here]
        expected = value_of_pi[here][0]
        assert (weight * returns[here]).sum() / weight.sum() == pytest.approx(expected.item(), abs=1e-12)


def test_lam_0_is_one_step_td():
    problem = Problem(0)
    for correction in CORRECTIONS:
        _, trace = correction_terms(correction, problem.logp_old, problem.logp_behav, problem.mask, 2.0)
        advantages, _ = gae(problem.rewards, problem.values, problem.mask, 0.9, 0.0, trace)
        next_values = torch.cat([problem.values[:, 1:], torch.zeros(len(problem.values), 1, dtype=F64)], 1)
        td = (problem.rewards + 0.9 * next_values - problem.values) * problem.mask
        assert (advantages - td).abs().max() < 1e-12


def test_rho_1_is_gae():
    problem = Problem(0)
    plain = gae(problem.rewards, problem.values, problem.mask, 0.9, 0.95)
    for correction in CORRECTIONS:
        weight, trace = correction_terms(correction, problem.logp_old, problem.logp_old, problem.mask, 2.0)
        assert (weight == 1).all() and (trace == 1).all()
        for a, b in zip(gae(problem.rewards, problem.values, problem.mask, 0.9, 0.95, trace), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("correction", ["retrace", "prefix"])
def test_traces_agree_with_the_quadratic_definition(correction):
    problem = Problem(0)
    gamma, lam = 0.9, 0.8
    rho = ((problem.logp_old - problem.logp_behav) * problem.mask).exp()
    c = rho.clamp(max=1) if correction == "retrace" else rho
    _, trace = correction_terms(correction, problem.logp_old, problem.logp_behav, problem.mask, 2.0)
    advantages, returns = gae(problem.rewards, problem.values, problem.mask, gamma, lam, trace)
    for n in range(len(problem.tokens)):
        T = int(problem.mask[n].sum())
        V_ = [*problem.values[n, :T].tolist(), 0.0]
        delta = [problem.rewards[n, k].item() + gamma * V_[k + 1] - V_[k] for k in range(T)]
        for t in range(T):
            A = sum((gamma * lam) ** (k - t) * math.prod(c[n, t + 1 : k + 1].tolist()) * delta[k] for k in range(t, T))
            assert advantages[n, t].item() == pytest.approx(A, abs=1e-12)
            assert returns[n, t].item() == pytest.approx(V_[t] + c[n, t].item() * A, abs=1e-12)


def bias_and_variance(correction: str, noise: float, problems: int = 24) -> tuple[float, float]:
    """Mean over fixed problems of |E g - grad J| / |grad J| and of the variance of g / |grad J|^2; the critic is V^mu."""
    biases, variances = [], []
    for seed in range(problems):
        problem = Problem(1000 + seed, noise=noise)
        truth, mu = problem.true_gradient(), problem.probability(problem.logp_behav)
        lam = 1.0 if correction == "prefix" else 0.95
        rows = problem.row_gradients(correction, lam=lam, values=problem.state_values(problem.logp_behav))
        mean = torch.einsum("n,nsv->sv", mu, rows)
        biases.append(relative_error(mean, truth))
        variances.append(((mu * (rows - mean).square().sum((1, 2))).sum() / truth.square().sum()).item())
    return sum(biases) / problems, sum(variances) / problems


def test_bias_and_variance_are_ordered_as_the_readme_says():
    bias, variance = {}, {}
    for correction in CORRECTIONS:
        bias[correction], variance[correction] = bias_and_variance(correction, 0.5)
    assert bias["prefix"] < bias["retrace"] < bias["truncated"] < bias["none"] < bias["ratio"], bias
    assert variance["truncated"] < variance["prefix"], variance
    for correction in CORRECTIONS:
        smaller = bias_and_variance(correction, 0.05, 8)[0]
        assert smaller < 0.4 * bias[correction] or smaller < 1e-10, correction


def test_missing_or_non_finite_logp_behav_raises():
    old, mask = torch.zeros(1, 2), torch.tensor([[True, False]])
    for broken in (None, torch.tensor([[torch.nan, 0.0]]), torch.tensor([[-torch.inf, 0.0]])):
        with pytest.raises(FloatingPointError, match="logp_behav"):
            correction_terms("truncated", old, broken, mask, 2.0)
    correction_terms("truncated", old, torch.tensor([[0.0, torch.nan]]), mask, 2.0)  # padding does not matter


# ---- diagnostics ----------------------------------------------------------------------------------------------------


def test_mismatch_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    rho = torch.tensor([[4.0, 0.5], [1.0, 9.0]], dtype=F64)
    got = rl.mismatch(rho.log(), torch.zeros_like(rho), mask, 2.0, torch.tensor([1.0, 0.0], dtype=F64))
    tokens, sequences = [4.0, 0.5, 1.0], [2.0, 1.0]
    assert got["kl_behav_k1"] == pytest.approx(-sum(map(math.log, tokens)) / 3)
    assert got["kl_behav"] == pytest.approx(sum(w - 1 - math.log(w) for w in tokens) / 3)
    assert got["entropy"] == pytest.approx(-sum(w * math.log(w) for w in tokens) / 3)
    assert got["above_cap"] == pytest.approx(1 / 3)
    assert got["ess_tokens"] == pytest.approx((5.5 / 3) ** 2 / ((16 + 0.25 + 1) / 3))
    assert got["ess_sequences"] == pytest.approx(1.5**2 / 2.5)
    assert got["retrace_trace"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert got["reward_under_pi"] == pytest.approx(2 / 3)
    assert got["log_ratio_max"] == pytest.approx(math.log(4)) and got["log_ratio_p50"] == pytest.approx(0)
    assert sum(sequences) == 3
    assert got["log_ratio_min"] == pytest.approx(math.log(0.5))
    assert got["log_ratio_p1"] == pytest.approx(0.98 * math.log(0.5))  # a hundredth of the way, two per gap
    assert got["log_ratio_p99"] == pytest.approx(0.98 * math.log(4))


def test_kl_and_entropy_from_the_samples_of_mu_are_unbiased():
    problem = Problem(0)
    mu = problem.probability(problem.logp_behav)
    log_mu, log_pi = problem.mu_table.log_softmax(-1), problem.theta.detach().log_softmax(-1)
    exact = (log_mu.exp() * (log_mu - log_pi)).sum(-1)[problem.index] * problem.mask
    log_rho = problem.logp_old - problem.logp_behav
    k1, k3 = -log_rho * problem.mask, (log_rho.exp() - 1 - log_rho) * problem.mask
    expected = (mu @ exact.sum(1)).item()
    assert (mu @ k1.sum(1)).item() == pytest.approx(expected, abs=1e-12)
    assert (mu @ k3.sum(1)).item() == pytest.approx(expected, abs=1e-12)
    entropy = -(log_pi.exp() * log_pi).sum(-1)[problem.index] * problem.mask
    sampled = -log_rho.exp() * problem.logp_old * problem.mask
    assert (mu @ sampled.sum(1)).item() == pytest.approx((mu @ entropy.sum(1)).item(), abs=1e-12)


def test_the_number_of_skipped_layers_settles_where_kl_is_near_the_target():
    def kl_of(layers):
        return 0.01 * layers**2  # target 0.04 at two layers

    level, counts = 0.0, []
    for _ in range(60):
        counts.append(round(level))
        level = next_level(level, kl_of(round(level)), 0.04, 5)
    assert counts[0] == 0 and set(counts[-20:]) <= {1, 2, 3}
    assert sum(counts[-20:]) / 20 == pytest.approx(2, abs=0.5)
    assert next_level(3.0, 1e-9, 0.04, 5) == 3.5 and next_level(3.0, 9.0, 0.04, 5) == 2.5  # half a layer at most
    assert next_level(5.0, 1e-9, 0.04, 5) == 5.0  # the first, the last and one inner layer stay
    assert next_level(0.1, 9.0, 0.04, 5) == 0.0
