"""Stage 2b: PPO with GAE, a KL penalty and importance-ratio correction, eqs. (4)-(11).

    python rl.py                        ReFT: the full model samples, on-policy
    python rl.py --skip-ratio 0.25      Nested-ReFT: a quarter of the layers is skipped in sampling

Departures from ReFT, the paper (its code in brackets):
- KL penalty: the estimate log pi_old - log pi_ref at the sampled token (as the code); the paper
  writes the full KL.
- Losses: the mean over the tokens of an optimizer step (the code: the mean of sequence means).
- The learning rate rises over 10 updates and falls linearly to lr / steps (paper: constant).
- lam is 1. With lam .95 and a critic that knows nothing, A_t = lam^(L-t) r (L: the last action):
  long right completions are pushed down at their start, and PPO ends in short wrong ones.
- A completion cut at --max-new-tokens earns 0 (the code pays it), and no bootstrapped value.
- With all layers at work, too, weights and traces are computed: they correct the rounding between
  sampling and training, and are 1 up to that (`--correction none` leaves them out).
- A program is sampled whole (the code gives its head, and the question as its docstring).
- gamma and lam in the usual sense of Schulman et al. The paper calls the reward discount lambda = 1
  and the TD discount gamma = 0.95; its code has gamma = 1, lam = 0.95.
Of Nested-ReFT we could read the abstract and the introduction only, and no code is public. Ours are
the five corrections and their names (which of the paper's three each one is, is open) and, for all
but toy tasks, two defaults: --skip-layers cheap and --skip-with linear.
"""

import copy
import math
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model import FITTED, Decoder, all_reduce, load, sample_skip, shard
from reward import TOY_STEPS, InputError, reward_of
from rollout import (
    OUTCOMES,
    Rollout,
    encode_prompts,
    fitting,
    flag,
    grade,
    load_split,
    run_script,
    sample,
    token_logp,
)
from warmup import (
    Run,
    TrainConfig,
    batch_indices,
    check_batch,
    encode_examples,
    fingerprint,
    micro_batches,
    nested_pool,
    supervised_step,
)

TOY = {
    "steps": 20,
    "rollout_batch": 128,
    "minibatch": 64,
    "lr": 1e-4,
    "kl_coef": 0.01,
    "value_coef": 0.1,
    "correction": "prefix",  # exact in theory (see the README); variance grows with length
}
# ReFT, section 4.3 and appendix B, and exps/paper_exps of github.com/lqtrung1998/mwp_ReFT; kl_coef
# of programs is .01. Ours: steps (the paper's 300 epochs are 300 x problems / 32) and correction.
PRETRAINED = {
    "steps": 1000,
    "rollout_batch": 32,
    "minibatch": 32,
    "lr": 3e-7,
    "kl_coef": 0.05,
    "value_coef": 5.0,  # the 1/2 of eq. (10) comes on top
    "correction": "truncated",  # bounded variance, for long completions
}
LR_RAMP = 10  # updates over which the learning rate rises

# ---- the equations, in the order of the papers ---------------------------------------------------
# All tensors are (N, T-1): column t belongs to the action at token t+1, as in the picture of
# rollout.py. `tokens` is how many actions the whole optimizer step has.


def gae(rewards, values, mask, gamma, lam, trace=None) -> tuple[Tensor, Tensor]:
    """Advantages and returns, eqs. (5)-(7). rewards: of eq. (4); trace: c_t, 1 when None.

    What follows the last action counts as 0, also where a completion was cut.
    """
    trace = torch.ones_like(rewards) if trace is None else trace
    values = values * mask  # (N, T-1): V after the last action is 0
    advantages = torch.zeros_like(rewards)
    next_value = next_trace = next_advantage = torch.zeros_like(rewards[:, 0])  # (N,)
    for t in reversed(range(rewards.shape[1])):
        delta = -values[:, t] + rewards[:, t] + gamma * next_value  # eq. (5), (N,)
        advantage = delta + gamma * lam * next_trace * next_advantage  # eq. (6), (N,)
        advantages[:, t] = advantage * mask[:, t]
        next_value = values[:, t]
        next_trace = trace[:, t]  # eq. (6) takes the trace of the NEXT action
        next_advantage = advantages[:, t]
    # V(s_t) averages over a_t ~ pi, but mu drew a_t: so A_t enters with c_t.
    returns = values + trace * advantages  # eq. (7), (N, T-1)
    return advantages, returns


def correction_terms(correction, logp_old, logp_behav, mask, cap) -> tuple[Tensor, Tensor, Tensor]:
    """Weight w_t of eq. (9), trace c_t of eqs. (6), (7), log denominator of eq. (8); constants.

    Only `prefix` is unbiased (lam = gamma = 1, no whitening, a constant denominator, first update).
    """
    if not logp_behav[mask].isfinite().all():
        raise FloatingPointError("log mu of a sampled token is not finite: no importance ratios")
    rho = torch.where(mask, logp_old - logp_behav, 0.0).exp()  # pi_old / mu, (N, T-1)
    ones = torch.ones_like(rho)
    if correction == "none":  # control: mu is ignored
        return ones, ones, logp_old
    if correction == "ratio":  # pi_theta / mu in eq. (8); its clip cuts from the start
        return ones, ones, logp_behav
    if correction == "truncated":  # bounded variance
        return rho.clamp(max=cap), ones, logp_old
    if correction == "retrace":  # also corrects the later rewards in A_t
        return rho.clamp(max=cap), rho.clamp(max=1), logp_old
    # prefix: prod_{i<=t} rho_i, which also corrects how often mu comes to s_t
    return rho.cumprod(1), rho, logp_old


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the sampled tokens; padding and prompts do not count."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the sampled tokens of the whole batch, 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask  # (N, T-1)


def policy_loss(ratio, advantages, weight, mask, clip, tokens) -> Tensor:
    """The clipped surrogate of eq. (9), a scalar."""
    clipped = ratio.clamp(1 - clip, 1 + clip)  # (N, T-1)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # (N, T-1)
    return -(weight * surrogate * mask).sum() / tokens  # eq. (9)


def value_loss(values, values_old, returns, mask, clip, tokens) -> Tensor:
    """The clipped squared error of V_phi, eq. (10), a scalar."""
    # ReFT clips R - V to A +- eps; with R = A + V_old (c_t = 1) that is V clipped to V_old +- eps.
    clipped = values.clamp(values_old - clip, values_old + clip)  # (N, T-1)
    squared = torch.max((values - returns) ** 2, (clipped - returns) ** 2)  # (N, T-1)
    return 0.5 * (squared * mask).sum() / tokens  # eq. (10)


def learning_rate(config: "Config", step: int, update: int) -> float:
    """The rate of an update: it rises over LR_RAMP updates, then falls linearly with the steps.

    update: its number in the run, from 1, as if all batches had --rollout-batch rows. The last step
    has lr / steps.
    """
    rise = min(1, update / LR_RAMP)
    fall = 1 - (step - 1) / config.steps
    return config.lr * rise * fall


class Batch(NamedTuple):
    """Inputs of eqs. (8)-(11), (N, T-1) each."""

    mask: Tensor
    base: Tensor  # log denominator of eq. (8)
    weight: Tensor  # w_t
    values_old: Tensor  # V_old(s_t)
    advantages: Tensor  # A_t; whitened with --advantage gae
    returns: Tensor  # R_t


def ppo_update(run: Run, rollout: Rollout, batch: Batch, updates: Iterable) -> dict[str, float]:
    """Step 6 of main: an optimizer step for each (rows, learning rate); means over the tokens."""
    config = run.config
    grad_norms = []
    sums = np.zeros(3)  # of policy loss, value loss and clipped tokens
    total = 0  # tokens of all updates
    for rows, lr in updates:
        tokens = int(batch.mask[rows].sum())  # of the whole step: micro-batches change no gradient
        loss_sum = torch.zeros((), device=run.device)
        for part, T in micro_batches(rollout.lengths[rows], config.micro_batch):
            micro = rows[part]  # (n,)
            mb = Batch(*(x[micro, : T - 1] for x in batch))  # (n, T-1) each
            logp_new, values = action_stats(run.model, rollout.tokens[micro, :T], mb.mask)
            ratio = (logp_new - mb.base).exp()  # eq. (8), (n, T-1)
            pg_loss = policy_loss(ratio, mb.advantages, mb.weight, mb.mask, config.clip, tokens)
            v_loss = value_loss(values, mb.values_old, mb.returns, mb.mask, config.clip, tokens)
            loss = pg_loss + config.value_coef * v_loss  # eq. (11)
            loss.backward()
            loss_sum += loss.detach()
            # A > 0 and ratio > 1 + eps, or A < 0 and ratio < 1 - eps: eq. (9) has no gradient.
            is_clipped = ((ratio - 1) * mb.advantages.sign() > config.clip) & mb.mask  # (n, T-1)
            sums += (pg_loss.item() * tokens, v_loss.item() * tokens, is_clipped.sum().item())
        total += tokens
        grad_norms.append(run.update(lr, loss_sum))
    pg_mean, v_mean, clip_fraction = (all_reduce(torch.from_numpy(sums)) / total).tolist()
    return {
        "policy_loss": pg_mean,
        "value_loss": v_mean,
        "clip_fraction": clip_fraction,
        "grad_norm": sum(grad_norms) / len(grad_norms),  # before it is clipped to 1
    }


def main(config: "Config") -> dict:
    """Train, evaluate on the test problems, save; returns what evaluation.json holds."""
    problems = load_split(config, "train")
    reference = load(config.model, config.device, config.dtype)  # pi_theta^(0)
    prompts = encode_prompts(problems, reference, config)
    kept = fitting(prompts, reference, config.max_new_tokens, is_training=True)
    problems, prompts = [problems[i] for i in kept], [prompts[i] for i in kept]
    questions = config.rollout_batch // config.samples  # a batch
    check_batch("--rollout-batch", questions, problems)
    annotated = annotated_examples(problems, reference, config)
    pool = nested_pool(reference, config, lambda: own_completions(reference, prompts, config))
    model = copy.deepcopy(reference)
    # Without a critic its head gets no gradient, and AdamW holds no moments of it.
    model.value_head.requires_grad_(config.value_coef > 0)
    contents = fingerprint(problems, [prompts, annotated], reference)
    run = Run("rl", config, model, contents, config.steps, pool=pool)
    pool = run.state["pool"]  # on --resume that of the checkpoint: measures differ by rounding
    freeze(reference)  # after the fingerprint, which is of fp32 weights

    for step in run.steps():
        # 1. problems, and a new skip mask for every batch; rng seeds all else that is random
        rng = np.random.default_rng((config.seed, 1, step))  # 1: of a step; 0: of `batch_indices`
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))  # mask, minibatches
        chosen = batch_indices(config.seed, step, questions, len(problems))
        batch_problems = [problems[i] for i in chosen]
        skip = sample_skip(len(model.layers), config.skip_ratio, generator, pool)  # eq. (2)

        # 2. completions from the nested behavior model mu
        sampling_seed = int(rng.integers(2**62))
        started = time.perf_counter()
        rollout = sample(
            model,
            [prompts[i] for i in chosen],
            num_samples=config.samples,
            skip=skip,
            seed=sampling_seed,
            **config.sampling(model),
        )
        rollout_seconds = time.perf_counter() - started
        mask = rollout.action_mask  # (N, T-1)
        logp_behav = rollout.logp_behav  # (N, T-1)

        # 3. the reward of each completion
        grades = grade(rollout, batch_problems, model, config)
        rewards_of_texts = [reward_of(name, config.partial_reward) for name in grades.outcomes]
        reward = torch.tensor(rewards_of_texts, device=run.device)  # (N,), eq. (3)

        # 4. the full model: log pi_old, V_old and log pi_ref of every sampled token
        started = time.perf_counter()
        logp_old, values_old = batch_stats(model, rollout, config.micro_batch)  # (N, T-1) each
        logp_ref, _ = batch_stats(reference, rollout, config.micro_batch)  # (N, T-1)

        # 5. rewards, advantages, returns; and what corrects for mu
        end_reward = reward  # (N,)
        if config.advantage == "group":
            end_reward = group_relative(reward, config.samples)  # (N,)
            values_old = torch.zeros_like(values_old)  # (N, T-1): no critic
        kl_ref = logp_old - logp_ref  # (N, T-1)
        # eq. (4): the KL penalty at every token, the reward at the last one
        rewards = -config.kl_coef * kl_ref  # (N, T-1)
        last = rollout.lengths - 2  # (N,): the column of the last action
        rewards[torch.arange(len(last)), last] += end_reward
        weight, trace, base = correction_terms(
            config.correction, logp_old, logp_behav, mask, config.cap
        )  # (N, T-1) each
        advantages, returns = gae(rewards, values_old, mask, config.gamma, config.lam, trace)
        if config.advantage == "gae":
            advantages = whiten(advantages, mask)  # after the returns, which keep their scale

        # 6. PPO: several passes over the batch (or self-training, which ignores step 5)
        if config.objective == "ppo":
            batch = Batch(mask, base, weight, values_old, advantages, returns)
            losses = ppo_update(
                run, rollout, batch, minibatches(len(mask), config, step, generator)
            )
        else:
            examples = right_examples(rollout, grades.outcomes, annotated, chosen)
            updates = minibatches(len(examples), config, step, generator)
            losses = self_training_update(run, examples, updates)

        # 7. records; evaluating and saving are not counted as time of training
        update_seconds = time.perf_counter() - started
        run.stop_clock()
        numbers = {
            **completion_stats(rollout, grades, reward, config.samples),
            "kl_ref": masked_mean(kl_ref, mask).item(),  # on mu's tokens: a KL only where mu = pi
            **mismatch(logp_old, logp_behav, mask),
            "explained_variance": explained_variance(values_old, returns, mask),
            **losses,
            "skipped_layers": skip.nonzero().flatten().tolist(),
            "rollout_tokens_per_second": int(mask.sum()) / rollout_seconds,
            "rollout_seconds": rollout_seconds,  # step 2
            "update_seconds": update_seconds,  # steps 4 to 6
        }
        if run.is_evaluation_due(step):
            numbers["greedy_accuracy"] = run.evaluate()["greedy_accuracy"]
        run.record(numbers, sample_texts(batch_problems, grades), warnings(numbers))
        if run.is_save_due(step):
            run.save()

    curves = ("reward", "accuracy", "length", "kl_ref", "kl_behav", "entropy", "greedy_accuracy")
    return run.finish(curves, shlex.join(["python", "evaluate.py", config.model, config.out]))


# ---- flags ---------------------------------------------------------------------------------------

Correction = Literal["none", "ratio", "truncated", "retrace", "prefix"]


@dataclass
class Flags:
    """Flags of rl.py itself; what is None is filled in from TOY or PRETRAINED."""

    model: str = flag(
        "runs/warmup", "directory or hub id of the warm-up model, also the reference of the KL"
    )
    out: str = flag("runs/rl", "directory of the run")
    skip_ratio: float = flag(
        0.0, "share of the layers that mu skips; 0 is plain ReFT", low=0, high=0.99
    )
    correction: Correction | None = flag(
        None, "weights and traces for completions of mu (toy: prefix, else truncated)"
    )
    cap: float = flag(2.0, "upper bound C of the truncated weights pi_old / mu", low=1e-9)
    steps: int | None = flag(None, "rollout batches (toy: 20, else 1000)", low=1)
    rollout_batch: int | None = flag(None, "completions of a batch (toy: 128, else 32)", low=1)
    samples: int = flag(1, "completions a prompt; divides --rollout-batch", low=1)
    ppo_epochs: int = flag(2, "passes over each batch", low=1)
    minibatch: int | None = flag(
        None, "completions of one optimizer step (toy: 64, else 32)", low=1
    )
    lr: float | None = flag(
        None, "reached after 10 updates, then falls (toy: 1e-4, else 3e-7)", low=0
    )
    partial_reward: float = flag(
        0.1, "eq. (3): what a wrong answer of the right kind earns", low=0, high=1
    )
    kl_coef: float | None = flag(None, "beta of eq. (4) (toy and programs: 0.01, else 0.05)", low=0)
    gamma: float = flag(1.0, "discount of eqs. (5) and (6)", low=0, high=1)
    lam: float = flag(
        1.0,
        "GAE decay of eq. (6), 1 for group; ReFT's 0.95 fails on long completions",
        low=0,
        high=1,
    )
    clip: float = flag(0.2, "epsilon of eqs. (9) and (10)", low=1e-9)
    value_coef: float | None = flag(None, "alpha of eq. (11) (toy: 0.1, else 5)", low=0)
    advantage: Literal["gae", "group"] = flag(
        "gae", "group: relative to the samples of a question, no critic, gamma = lam = 1 (GRPO)"
    )
    objective: Literal["ppo", "self-training"] = flag(
        "ppo", "self-training: eq. (1) on what is right or annotated"
    )


@dataclass
class Config(TrainConfig, Flags):
    """All flags of rl.py."""

    def __post_init__(self):
        if self.model == "runs/warmup" and not Path(self.model).exists():
            first = "run `python warmup.py` first, or name a model with --model"
            raise InputError(f"runs/warmup does not exist: {first}")
        super().__post_init__()
        if self.engine == "python":
            self.fill_in({"kl_coef": 0.01})
        self.fill_in(TOY if self.task in TOY_STEPS else PRETRAINED)
        if self.advantage == "group":
            self.gamma = self.lam = 1.0  # every token gets the whole reward of its completion
        if self.advantage == "group" or self.objective == "self-training":
            self.value_coef = 0.0  # no critic
        if self.rollout_batch % self.samples or (self.advantage == "group" and self.samples < 2):
            rule = f"divide --rollout-batch {self.rollout_batch}, and be 2 or more for group"
            raise InputError(f"--samples is {self.samples}, it must {rule}")
        if Path(self.out).resolve() == Path(self.model).resolve():
            raise InputError(f"--out is {self.out}, it must be another folder than --model")


# ---- passes of the full model --------------------------------------------------------------------


def action_stats(model: Decoder, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a_t|s_t) and V_phi(s_t) of the full model, (N, T-1) each, 0 outside of the mask.

    tokens: (N, T); mask: (N, T-1). Logits are taken where somebody acted, and nowhere else.
    """
    hidden = model(tokens)[:, :-1][mask]  # (actions, d)
    actions = tokens[:, 1:][mask]  # (actions,)
    logp = token_logp(model.logits(hidden), actions)  # (actions,)
    values = model.values(hidden)  # (actions,)
    zeros = logp.new_zeros(mask.shape)  # (N, T-1)
    return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, values)


@torch.no_grad()
def batch_stats(model: Decoder, rollout: Rollout, micro_batch: int) -> Tensor:
    """`action_stats` of a whole batch, (2, N, T-1); rows of like length together."""
    stats = torch.zeros_like(rollout.logp_behav).repeat(2, 1, 1)  # (2, N, T-1)
    for rows, T in micro_batches(rollout.lengths, micro_batch):
        mask = rollout.action_mask[rows, : T - 1]  # (n, T-1)
        stats[:, rows, : T - 1] = torch.stack(action_stats(model, rollout.tokens[rows, :T], mask))
    return all_reduce(stats)  # each process has filled in its rows


def minibatches(count, config, step, generator):
    """Rows of one optimizer step, in another order in each pass, and its learning rate."""
    updates_a_step = config.ppo_epochs * math.ceil(config.rollout_batch / config.minibatch)
    update = (step - 1) * updates_a_step
    for _ in range(config.ppo_epochs):
        for rows in torch.randperm(count, generator=generator).split(config.minibatch):
            update += 1
            yield rows.to(config.device), learning_rate(config, step, update)


def freeze(reference):
    """No gradients, sharded; with autocast bf16 layers: the same numbers in half the memory."""
    reference.requires_grad_(False)
    reference.linear_maps = None  # it never skips
    if reference.autocast:
        for module in reference.layers.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
    shard(reference)


# ---- beyond the papers ---------------------------------------------------------------------------


def own_completions(reference, prompts, config):
    """Sampled (prompt, completion) pairs of the first FITTED problems, for `nested_pool`."""
    sampling = config.sampling(reference)
    return sample(reference, prompts[:FITTED], seed=config.seed, **sampling).pairs()


def group_relative(reward: Tensor, samples: int) -> Tensor:
    """Rewards relative to the other samples of their question, (N,) -> (N,).

    GRPO (arXiv 2402.03300, section 4.1.2) gives every token of sample i the same advantage,
    A_t = (r_i - mean(r)) / std(r). Here that is the reward of the last token: with V = 0 and
    gamma = lam = 1, GAE copies it to every token (plus later KL penalties, times traces).
    """
    groups = reward.double().view(-1, samples)  # (questions, samples); float64: equal rewards get 0
    centred = groups - groups.mean(1, keepdim=True)  # (questions, samples)
    scale = groups.std(1, keepdim=True, correction=0) + 1e-4  # (questions, 1)
    return (centred / scale).flatten()  # (N,)


def annotated_examples(problems, reference, config):
    """For self-training: (prompt, completion) of every problem, None where there is none."""
    if config.objective != "self-training":
        return []
    examples = encode_examples(problems, reference, config)
    rows = [prompt + completion for prompt, completion in examples]
    kept = set(fitting(rows, reference, 0, is_training=True))
    return [
        example if i in kept and problems[i].cot else None for i, example in enumerate(examples)
    ]


def right_examples(rollout, outcomes, annotated, chosen):
    """What self-training learns from: the right completions of a batch, and the annotated ones."""
    graded = zip(rollout.pairs(), outcomes, strict=True)
    right = [pair for pair, outcome in graded if outcome == "right"]
    return right + [annotated[i] for i in chosen if annotated[i] is not None]


def self_training_update(run, examples, updates):
    """Step 6 of online self-training (ReFT, section 4.2): eq. (1) on (prompt, completion) pairs."""
    numbers = [
        supervised_step(run, [examples[n] for n in rows.tolist()], lr)
        for rows, lr in updates
        if len(rows)  # without examples there is one empty part
    ]  # (loss, norm of its gradient) of each update
    loss, grad_norm = np.mean(numbers or [(0.0, 0.0)], axis=0).tolist()
    return {"policy_loss": loss, "grad_norm": grad_norm}


# ---- records -------------------------------------------------------------------------------------


def completion_stats(rollout, grades, reward, samples):
    """What became of the completions of a batch: means and shares over them, not over tokens."""
    shares = {name: grades.outcomes.count(name) / len(reward) for name in OUTCOMES}
    accuracy = shares.pop("right")
    groups = reward.view(-1, samples)  # (questions, samples)
    is_equal = (groups == groups[:, :1]).all(1)  # (questions,): these have no group advantage
    lengths = rollout.lengths - rollout.prompt_lens  # (N,): sampled tokens, EOS included
    return {
        "reward": reward.mean().item(),
        "accuracy": accuracy,  # of mu's samples; greedy_accuracy is the full model's
        "length": lengths.double().mean().item(),
        "equal_rewards": is_equal.double().mean().item(),
        **shares,
    }


def mismatch(logp_old, logp_behav, mask):
    """Estimates on mu's samples: how far mu is from pi_old, and the entropy of pi_old.

    rho is not capped. ess_tokens, the effective sample size (E rho)^2 / E rho^2, is that of single
    tokens: the weights of `prefix` are products of rho and spread more.
    """
    log_rho = (logp_old - logp_behav)[mask].double()  # (tokens,)
    rho = log_rho.exp()  # (tokens,)
    return {
        "kl_behav": (rho - 1 - log_rho).mean().item(),  # KL(mu||pi_old), low variance (k3)
        "entropy": -(rho * logp_old[mask]).mean().item(),  # of pi_old; at 0 nothing is explored
        "ess_tokens": (rho.mean() ** 2 / (rho**2).mean()).item(),  # 1 on-policy
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 a perfect critic, 0 one that knows the mean; nan: constant R."""
    target = returns[mask]  # (tokens,)
    residual = target - values[mask]  # (tokens,)
    if target.var() <= 1e-12:
        return math.nan
    return (1 - residual.var() / target.var()).item()


def sample_texts(problems, grades):
    """The first and the last completion of a batch, for samples.txt."""
    for n in (0, -1):
        problem = problems[n]
        gold = f"gold {problem.answer}"
        yield f"{grades.outcomes[n]}, {gold}\n{problem.question}\n>>> {grades.texts[n]}\n"


def warnings(numbers):
    """(name, text) of what a user should know of this batch."""
    if numbers["kl_behav"] > 0.05 or numbers["ess_tokens"] < 0.5:
        kl = f"KL(mu||pi) is {numbers['kl_behav']:.3f} per token"
        size = f"the effective sample size {numbers['ess_tokens']:.2f}"
        advice = "skip fewer layers, take --skip-with linear, or warm up with --layer-dropout"
        yield "mu", f"{kl} and {size}: {advice}"


if __name__ == "__main__":
    run_script(main, Config)
