"""Stage 2b: PPO with GAE, a KL penalty and importance-ratio correction, eqs. (2)-(11).

    python rl.py --skip-ratio 0.25      Nested-ReFT: completions are sampled with a quarter of the layers skipped
    python rl.py                        plain ReFT: the full model samples, on-policy
    python rl.py --advantage group --samples 8     without a critic: advantages relative to the samples of one question
    python rl.py --objective self-training         a baseline of ReFT: eq. (1) on right and annotated completions

One batch takes seven steps, numbered in `main`: 1 draw problems and a skip mask, 2 sample completions from mu, 3 reward
them, 4 take log-probabilities and values of the full model, 5 penalised rewards, advantages and returns, 6 PPO, 7 records.

Departures from ReFT, the paper (its code in brackets):
- KL penalty: the estimate log pi_old - log pi_ref at the sampled token (as the code); the paper writes the full KL.
- Losses: the token mean over the batch (the code: the mean of sequence means). The learning rate rises over 10 updates and
  falls linearly to 0: at a constant rate accuracy fell again late in runs with skipped layers.
- Critic: beside eq. (10) the value head alone is fitted to the returns of each batch, see `fit_value_head`; lam is 1. With
  ReFT's lam .95 and a V that knows nothing, A_t = lam^(L-t) r: long right completions are pushed down at their start.
- A completion cut at --max-new-tokens has no answer: reward 0 (the code pays it), and no bootstrapped value.
- A program is sampled whole (the code gives `def solution():` and the question as its docstring, and samples the body).
- gamma and lam in the usual sense of Schulman et al. The paper calls the reward discount lambda = 1 and the TD discount
  gamma = 0.95; the code has gamma = 1, lam = 0.95.
Departures from Nested-ReFT: its code is not public and the names of the corrections are ours; see `correction_terms`.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MEASURED, Decoder, add, gathered, load, measure_layers, sample_skip, shard, total
from reward import TOY_STEPS, InputError, load_problems
from rollout import OUTCOMES, Grades, Rollout, encode_prompts, flag, grade, run_script, sample, skip_pool, token_logp
from warmup import Run, TrainConfig, batch_indices, encode_examples, fingerprint, micro_batches, supervised_step

TOY = {"steps": 20, "rollout_batch": 128, "minibatch": 64, "lr": 1e-4, "kl_coef": 0.01, "value_coef": 0.1}
TOY |= {"correction": "prefix"}
# ReFT, section 4.3 and appendix B, and exps/paper_exps of its code (github.com/lqtrung1998/mwp_ReFT): batch, learning rate,
# epochs, clip, kl_coef (.01 for programs) and value_coef, which stands before the 1/2 of eq. (10). Steps and correction are
# ours; the paper's 300 epochs are 300 x problems / 32 steps.
PRETRAINED = {"steps": 1000, "rollout_batch": 32, "minibatch": 32, "lr": 3e-7, "kl_coef": 0.05, "value_coef": 5.0}
PRETRAINED |= {"correction": "truncated"}
Correction = Literal["none", "ratio", "truncated", "retrace", "prefix"]  # see `correction_terms`
LR_RAMP = 10  # optimizer steps over which the learning rate rises; over the run it falls linearly
RIDGE = 0.04  # of the critic's fit, times (features / completions)^2: chosen so that few completions do no harm
FIT_SHARE = 0.5  # how far the critic moves to the fit of a batch; all the way at the first one


@dataclass
class Config(TrainConfig):
    """Flags of rl.py; what is None is filled in from TOY or PRETRAINED."""

    model: str = flag("runs/warmup", "directory or hub id of the warm-up model, also the reference of the KL penalty")
    out: str = flag("runs/rl", "directory of the run")
    steps: int | None = flag(None, "rollout batches (toy: 20, else 1000)")
    skip_ratio: float = flag(0.0, "share of the layers that the behavior model mu skips; 0 is plain ReFT")
    objective: Literal["ppo", "self-training"] = flag("ppo", "self-training: eq. (1) on what is right or annotated")
    advantage: Literal["gae", "group"] = flag("gae", "group: relative to the samples of one question, no critic")
    correction: Correction | None = flag(None, "weights and traces for completions of mu (toy: prefix, else truncated)")
    target_kl_behav: float | None = flag(None, "the number of skipped layers follows KL(mu||pi) per token to it")
    cap: float = flag(2.0, "upper bound C of the truncated weights pi_old / mu")
    rollout_batch: int | None = flag(None, "completions of one batch (toy: 128, else 32)")
    samples: int = flag(1, "completions a prompt; divides --rollout-batch")
    ppo_epochs: int = flag(2, "passes over each batch")
    minibatch: int | None = flag(None, "completions of one optimizer step (toy: 64, else 32)")
    lr: float | None = flag(None, "learning rate, rises over 10 updates, falls to 0 (toy: 1e-4, else 3e-7)")
    kl_coef: float | None = flag(None, "beta of eq. (4) (toy and programs: 0.01, else 0.05)")
    gamma: float = flag(1.0, "discount of eqs. (5) and (6)")
    lam: float = flag(1.0, "GAE decay of eq. (6); below 1 prefix is biased. ReFT: 0.95, bad for long completions")
    clip: float = flag(0.2, "epsilon of eqs. (9) and (10)")
    value_coef: float | None = flag(None, "alpha of eq. (11) (toy: 0.1, else 5)")

    def __post_init__(self):
        super().__post_init__()
        programs = {"kl_coef": 0.01} if self.engine == "python" else {}
        self.fill_in(TOY if self.task in TOY_STEPS else PRETRAINED | programs)
        if self.advantage == "group":
            self.gamma = self.lam = 1.0  # every token gets the whole reward of its completion
        if self.advantage == "group" or self.objective == "self-training":
            self.value_coef = 0.0  # no critic
        if not self.samples or self.rollout_batch % self.samples or (self.advantage == "group" and self.samples < 2):
            rule = f"it must divide --rollout-batch {self.rollout_batch}, and be 2 or more for --advantage group"
            raise InputError(f"--samples is {self.samples}, {rule}")
        if Path(self.out).resolve() == Path(self.model).resolve():
            raise InputError(f"--out is {self.out}, it must be another folder than --model")


# ---- the equations, in the order of the papers ----------------------------------------------------------------------


def gae(rewards, values, mask, gamma, lam, trace=None) -> tuple[Tensor, Tensor]:
    """Advantages and returns, eqs. (5)-(7); all (N, T-1), column t belongs to the action at token t+1.

    trace: c_t of the correction, 1 when None. What follows the last action counts as 0, also for cut completions.
    """
    trace = torch.ones_like(rewards) if trace is None else trace
    values = values * mask  # V after the last action is 0: the mask is False there
    advantages = torch.zeros_like(rewards)
    next_value = next_trace = next_advantage = torch.zeros_like(rewards[:, 0])  # (N,)
    for t in reversed(range(rewards.shape[1])):
        delta = -values[:, t] + rewards[:, t] + gamma * next_value  # eq. (5), (N,)
        advantage = delta + gamma * lam * next_trace * next_advantage  # eq. (6), (N,); the trace of the NEXT action
        advantages[:, t] = advantage * mask[:, t]
        next_value, next_trace, next_advantage = values[:, t], trace[:, t], advantages[:, t]
    returns = trace * advantages + values  # eq. (7), (N, T-1)
    return advantages, returns


def group_relative(reward: Tensor, samples: int) -> Tensor:
    """Rewards relative to the other samples of their question, (N,) -> (N,); rows are ordered question by question.

    GRPO, arXiv 2402.03300, section 4.1.2: A_t = (r_i - mean(r_1..r_G)) / std(r_1..r_G) for every token t of sample i.
    Put at the last token, with V = 0 and gamma = lam = 1, eqs. (5) and (6) carry it to every token, there joined by the KL
    penalties still to come and by the traces of the correction. (GRPO has the KL in its loss.) Equal rewards give 0.
    """
    groups = reward.double().view(-1, samples)  # (questions, samples); in double equal rewards have exactly their mean
    centred = groups - groups.mean(1, keepdim=True)  # (questions, samples)
    return (centred / (groups.std(1, keepdim=True, correction=0) + 1e-4)).flatten()  # (N,)


def correction_terms(correction: str, logp_old, logp_behav, mask, cap) -> tuple[Tensor, Tensor]:
    """Weight w_t of eq. (9) and trace c_t of eqs. (6) and (7), (N, T-1) each; constants in the gradient.

    With rho_t = pi_old(a_t|s_t) / mu(a_t|s_t). The names are ours: the abstract of Nested-ReFT speaks of three variants of
    bias mitigation, and no code is public. Only `prefix` is unbiased (lam = 1, no whitening, first update of a batch).
    """
    if logp_behav is None or not logp_behav[mask].isfinite().all():
        raise FloatingPointError("logp_behav is missing or not finite: without log mu there are no importance ratios")
    rho = torch.where(mask, logp_old - logp_behav, 0.0).exp().detach()  # (N, T-1)
    one = torch.ones_like(rho)
    return {
        "none": (one, one),  # control: mu is ignored
        "ratio": (one, one),  # pi_theta / mu stands in eq. (8) instead
        "truncated": (rho.clamp(max=cap), one),  # bounded variance
        "retrace": (rho.clamp(max=cap), rho.clamp(max=1)),  # also repairs the continuation inside the advantage
        "prefix": (rho.cumprod(1), rho),  # prod_{i<=t} rho_i: also repairs how often mu comes to s_t
    }[correction]


def importance_ratio(logp_new, logp_old, logp_behav, correction: str) -> Tensor:
    """r_t of eq. (8), (N, T-1); with correction "ratio" pi_theta / mu takes its place."""
    return (logp_new - (logp_behav if correction == "ratio" else logp_old)).exp()  # eq. (8)


def policy_loss(logp_new, logp_old, logp_behav, advantages, mask, clip, correction, cap, denominator) -> Tensor:
    """Clipped surrogate of eq. (9), a scalar. Tensors (N, T-1); denominator: the tokens of the whole optimizer step."""
    weight, _ = correction_terms(correction, logp_old, logp_behav, mask, cap)  # (N, T-1)
    ratio = importance_ratio(logp_new, logp_old, logp_behav, correction)  # (N, T-1)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)  # (N, T-1)
    return -(weight * surrogate * mask).sum() / denominator  # eq. (9)


def value_loss(values, values_old, returns, mask, clip, denominator) -> Tensor:
    """Clipped squared error of V_phi, eq. (10), a scalar. Tensors (N, T-1)."""
    clipped = torch.clamp(values, values_old - clip, values_old + clip)  # (N, T-1)
    squared = torch.max((values - returns) ** 2, (clipped - returns) ** 2)  # (N, T-1)
    return 0.5 * (squared * mask).sum() / denominator  # eq. (10)


# ---- passes of the full model ---------------------------------------------------------------------------------------


def action_stats(model: Decoder, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a_t|s_t) and V_phi(s_t) of the full model on tokens (N, T), (N, T-1) each, 0 outside the mask (N, T-1)."""
    hidden = model(tokens)[:, :-1][mask]  # (actions, d)
    logp = token_logp(model.logits(hidden), tokens[:, 1:][mask])  # (actions,); no logits where nobody acted
    values = model.values(hidden)  # (actions,)
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (logp, values))


@torch.no_grad()
def batch_stats(model: Decoder, rollout: Rollout, micro_batch: int) -> tuple[Tensor, Tensor]:
    """`action_stats` of a whole batch, rows of like length together."""
    logp, values = torch.zeros_like(rollout.logp_behav), torch.zeros_like(rollout.logp_behav)  # (N, T-1)
    for rows, T in micro_batches(rollout.lengths, micro_batch):
        part = action_stats(model, rollout.tokens[rows, :T], rollout.action_mask[rows, : T - 1])
        logp[rows, : T - 1], values[rows, : T - 1] = part
    return total(logp), total(values)  # each process filled in its rows


def minibatches(count: int, config: Config, step: int, generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
    """Rows of one optimizer step, in random order, for each of the passes over a batch; and its learning rate."""
    updates = (step - 1) * config.ppo_epochs * math.ceil(config.rollout_batch / config.minibatch)
    for _ in range(config.ppo_epochs):
        for rows in torch.randperm(count, generator=generator).split(config.minibatch):
            updates += 1
            yield rows, config.lr * min(1, updates / LR_RAMP) * (1 - (step - 1) / config.steps)


def ppo_update(run: Run, rollout: Rollout, batch_tensors: tuple[Tensor, ...], batches: Iterator) -> dict[str, float]:
    """Step 6 of main, on logp_old, logp_behav, values_old, advantages, returns, (N, T-1) each; means over its tokens."""
    config, tokens, lengths, mask = run.config, rollout.tokens, rollout.lengths, rollout.action_mask
    sums, grad_norms = torch.zeros(4, dtype=torch.float64), []  # policy loss, value loss, clipped tokens, tokens
    for rows, lr in batches:
        rows, loss_sum = rows.to(tokens.device), torch.zeros((), device=tokens.device)
        denominator = int(mask[rows].sum())  # of the whole optimizer step: the micro-batch size changes nothing
        for part, T in micro_batches(lengths[rows], config.micro_batch):
            mb = rows[part]
            mb_mask = mask[mb, : T - 1]  # (n, T-1), as all that follow
            logp_old, logp_behav, values_old, advantages, returns = (x[mb, : T - 1] for x in batch_tensors)
            logp_new, values = action_stats(run.model, tokens[mb, :T], mb_mask)
            logps, how = (logp_new, logp_old, logp_behav), (config.clip, config.correction, config.cap)
            pg_loss = policy_loss(*logps, advantages, mb_mask, *how, denominator)  # eq. (9)
            v_loss = value_loss(values, values_old, returns, mb_mask, config.clip, denominator)  # eq. (10)
            loss = pg_loss + config.value_coef * v_loss  # eq. (11)
            loss.backward()
            loss_sum += loss.detach()
            ratio = importance_ratio(*logps, config.correction)
            clipped = ((ratio - 1) * advantages.sign() > config.clip) & mb_mask  # no gradient comes from there
            done = [pg_loss.item() * denominator, v_loss.item() * denominator, clipped.sum(), mb_mask.sum()]
            sums += torch.tensor(done, dtype=torch.float64)
        grad_norms.append(run.update(lr, loss_sum))
    policy, value, clipped, tokens = total(sums).tolist()
    losses = {"policy_loss": policy / tokens, "value_loss": value / tokens, "clip_fraction": clipped / tokens}
    return losses | {"grad_norm": sum(grad_norms) / len(grad_norms)}  # before it is clipped to 1


@torch.no_grad()
def fit_value_head(model: Decoder, rollout: Rollout, returns: Tensor, micro_batch: int, share: float):
    """The critic: V_phi moves a share of the way to the least-squares fit of these returns, (N, T-1); the trunk stays.

    V_phi = w h is linear in w, so eq. (10) without its clip has an exact minimum, one Newton step away:
    w += share * (H + ridge)^-1 sum_t h_t (R_t - V_phi(s_t)), H = sum_t h_t h_t^T, h_t with a 1 behind it for the bias.
    A completion has one reward, so N of them tell little about d > N weights: the ridge grows until only the bias moves.
    """
    mask, d = rollout.action_mask, model.config.hidden_size
    moments = torch.zeros(d + 1, d + 2, dtype=torch.float64, device=returns.device)  # H, and the sum beside it
    with gathered(model):
        for rows, T in micro_batches(rollout.lengths, micro_batch):
            mb_mask = mask[rows, : T - 1]  # (n, T-1)
            hidden = model(rollout.tokens[rows, :T])[:, :-1][mb_mask]  # (actions, d)
            residual = returns[rows, : T - 1][mb_mask] - model.values(hidden)  # (actions,)
            h = F.pad(hidden.double(), (0, 1), value=1.0)  # (actions, d + 1)
            moments += h.T @ torch.cat([h, residual[:, None]], 1)
    moments = total(moments)
    moments.diagonal()[:-1].mul_(1 + RIDGE * (d / len(mask)) ** 2).add_(1e-9)  # + 1e-9: a feature may always be 0
    move = share * torch.linalg.solve(moments[:, :-1], moments[:, -1])  # (d + 1,)
    if move.isfinite().all():
        add(model.value_head.weight, move[None, :-1])
        add(model.value_head.bias, move[-1:])


def self_training_update(run: Run, examples: list, batches: Iterator) -> dict[str, float]:
    """Step 6 of main for online self-training (ReFT, section 4.2): eq. (1) on (prompt, completion) pairs, if any."""
    steps = [supervised_step(run, [examples[n] for n in rows], lr) for rows, lr in batches if len(rows)]
    losses, grad_norms = zip(*steps, strict=True) if steps else ((0.0,), (0.0,))
    means = {"policy_loss": sum(losses) / len(losses), "grad_norm": sum(grad_norms) / len(grad_norms)}
    return means | {"value_loss": 0.0, "clip_fraction": 0.0}


def main(config: Config) -> dict:
    """Train, evaluate on the test problems, save; returns what evaluation.json holds."""
    problems = load_problems(config.task, "train", config.data, config.limit, config.engine)
    reference = load(config.model, config.device, config.dtype)  # pi_theta^(0)
    annotated = encode_examples(problems, reference, config) if config.objective == "self-training" else []
    prompts = encode_prompts(problems, reference, config, config.max_new_tokens, training=not annotated)
    if config.skip_layers == "cheap" and (config.skip_ratio or config.target_kl_behav):
        own = sample(reference, prompts[:MEASURED], seed=config.seed, **config.sampling(reference))
        measure_layers(reference, own.pairs())
    model, num_layers = copy.deepcopy(reference), len(reference.layers)
    level = config.skip_ratio * num_layers  # layers to skip; moves with --target-kl-behav
    sample_skip(num_layers, config.skip_ratio, pool=skip_pool(model, round(level), config))  # refuses none or too many
    run = Run("rl", config, model, fingerprint(problems, [prompts, annotated], reference), config.steps, level=level)
    freeze(reference)

    for step in run.steps():
        # 1. problems, and a new skip mask for every batch
        rng = np.random.default_rng((config.seed, 1, step))  # 1: batches; 0: the order of problems
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = batch_indices(config.seed, step, config.rollout_batch // config.samples, len(problems))
        batch = [problems[i] for i in chosen]
        count = round(run.state["level"])
        skip = sample_skip(num_layers, count / num_layers, generator, skip_pool(model, count, config))  # eq. (2)

        # 2. completions from the nested behavior model mu
        sampling = config.sampling(model) | {"num_samples": config.samples, "seed": int(rng.integers(2**62))}
        started = time.perf_counter()
        rollout = sample(model, [prompts[i] for i in chosen], skip=skip, **sampling)  # eq. (2)
        rollout_seconds = time.perf_counter() - started
        mask, logp_behav = rollout.action_mask, rollout.logp_behav  # (N, T-1) each

        # 3. the reward of each completion
        grades = grade(rollout, batch, model, config)
        reward = grades.rewards  # (N,), eq. (3)

        # 4. the full model: log pi_old, V_old and log pi_ref of every sampled token
        started = time.perf_counter()
        logp_old, values_old = batch_stats(model, rollout, config.micro_batch)  # (N, T-1) each
        logp_ref, _ = batch_stats(reference, rollout, config.micro_batch)  # (N, T-1)

        # 5. penalised rewards, advantages, returns
        end_reward = reward
        if config.advantage == "group":
            end_reward, values_old = group_relative(reward, config.samples), torch.zeros_like(values_old)  # no critic
        kl_ref = logp_old - logp_ref  # (N, T-1)
        rewards = -config.kl_coef * kl_ref  # eq. (4), (N, T-1): the penalty at every token,
        rewards[torch.arange(len(mask)), rollout.lengths - 2] += end_reward  # r at the last: tokens[lengths - 1]
        _, trace = correction_terms(config.correction, logp_old, logp_behav, mask, config.cap)
        advantages, returns = gae(rewards, values_old, mask, config.gamma, config.lam, trace)  # eqs. (5)-(7)
        if config.advantage == "gae":
            advantages = whiten(advantages, mask)  # after the returns, which keep their scale

        # 6. PPO: several passes over the batch; self-training: over its right and the annotated completions
        if config.objective == "ppo":
            batch_tensors = (logp_old, logp_behav, values_old, advantages, returns)
            losses = ppo_update(run, rollout, batch_tensors, minibatches(len(mask), config, step, generator))
            if config.advantage == "gae" and not run.left_out:  # a bad batch changes no weight
                fit_value_head(model, rollout, returns, config.micro_batch, FIT_SHARE if step > 1 else 1.0)
        else:
            examples = [pair for pair, r in zip(rollout.pairs(), reward.tolist(), strict=True) if r == 1]
            examples += [annotated[i] for i in chosen if problems[i].cot]
            losses = self_training_update(run, examples, minibatches(len(examples), config, step, generator))

        # 7. records
        numbers = {
            **outcome_shares(rollout, grades, config.samples),
            "kl_ref": masked_mean(kl_ref, mask).item(),  # of log pi_old - log pi_ref: how far from the warm-up model
            **mismatch(logp_old, logp_behav, mask, config.cap, reward),
            "explained_variance": explained_variance(values_old, returns, mask),
            **losses,
            "skipped_layers": skip.nonzero().flatten().tolist(),
            "rollout_tokens_per_second": int(mask.sum()) / rollout_seconds,  # sampled tokens, EOS included
            "rollout_seconds": rollout_seconds,  # step 2
            "update_seconds": time.perf_counter() - started,  # steps 4 to 6
        }
        if config.target_kl_behav is not None:
            one_layer = min(getattr(model.hf_config, "layer_kl", [0.0]))  # what it would cost, where none is skipped
            kl = numbers["kl_behav"] if count else one_layer
            most = min(len(skip_pool(model, num_layers, config)), num_layers - 3)
            run.state["level"] = next_level(run.state["level"], kl, config.target_kl_behav, most)
        said = "reward {:g}, gold {}\n{}\n>>> {}\n"
        texts = [said.format(reward[n], batch[n].answer, batch[n].question, grades.texts[n]) for n in (0, -1)]
        run.record(numbers, chosen, texts, warnings(numbers, step, config.lam))

    curves = ("reward", "accuracy", "length", "kl_ref", "kl_behav", "entropy", "greedy_accuracy")
    return run.finish(curves, f"python evaluate.py {config.model} {config.out}")


def freeze(reference: Decoder):
    """No gradients; where passes run in bf16 anyway, bf16 linear layers: the same numbers in half the memory."""
    reference.requires_grad_(False)
    if reference.autocast:
        for module in reference.layers.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
    shard(reference)


# ---- what is logged -------------------------------------------------------------------------------------------------


def outcome_shares(rollout: Rollout, grades: Grades, samples: int) -> dict[str, float]:
    """What became of the completions of a batch: means and shares over them, not over tokens."""
    shares = {outcome: grades.outcomes.count(outcome) / len(grades.outcomes) for outcome in OUTCOMES}
    groups = grades.rewards.view(-1, samples)  # (questions, samples)
    return {
        "reward": grades.rewards.mean().item(),
        "accuracy": shares.pop("right"),  # of mu's samples; greedy_accuracy (--eval-every) is that of the full model
        "length": (rollout.lengths - rollout.prompt_lens).double().mean().item(),  # sampled tokens, EOS included
        "equal_rewards": (groups == groups[:, :1]).all(1).double().mean().item(),  # of questions: no group advantage
        **shares,  # cut: no EOS within --max-new-tokens, see OUTCOMES for the others
    }


def warnings(numbers: dict, step: int, lam: float) -> Iterator[tuple[str, str]]:
    """(kind, text) of what a user should know of this batch."""
    knows = numbers["explained_variance"]
    if lam < 1 and step > 5 and numbers["length"] > 1 / (1 - lam) and knows < 0.1:
        short = f"--lam {lam:g} reaches {1 / (1 - lam):.0f} tokens back, completions have {numbers['length']:.0f}"
        yield "lam", f"{short}, and the critic explains {knows:.2f} of the returns: long ones fall behind; try --lam 1"
    if numbers["kl_behav"] > 0.05 or numbers["ess_tokens"] < 0.5:
        far = f"KL(mu||pi) is {numbers['kl_behav']:.3f} per token and the effective sample size {numbers['ess_tokens']:.2f}"
        yield "mu", f"{far}: skip fewer layers (--skip-ratio), or warm up with --layer-dropout"


def mismatch(logp_old: Tensor, logp_behav: Tensor, mask: Tensor, cap: float, reward: Tensor) -> dict[str, float]:
    """How far mu is from pi_old in this batch, raw: before any cap. Tensors (N, T-1), reward (N,).

    KL(mu||pi_old) and the entropy of pi_old at mu's states: unbiased estimates from its samples, no pass of their own.
    Effective sample size, as a share: (E w)^2 / E w^2 over tokens (w = rho_t) or completions (w = prod rho_t).
    """
    log_rho = torch.where(mask, logp_old - logp_behav, 0.0).double()  # (N, T-1)
    rho, sequence = log_rho[mask].exp(), log_rho.sum(1).exp()  # (tokens,), (N,)
    levels = {"min": 0.0, "p1": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}
    quantiles = torch.quantile(log_rho[mask], log_rho.new_tensor([*levels.values()])).tolist()
    return {
        "kl_behav": (rho - 1 - log_rho[mask]).mean().item(),  # never negative, of low variance (k3); healthy below .05
        "kl_behav_k1": -log_rho[mask].mean().item(),  # the same, plainly
        "entropy": -(rho * logp_old[mask]).mean().item(),  # falls slowly; near 0 nothing is explored any more
        **{f"log_ratio_{name}": x for name, x in zip(levels, quantiles, strict=True)},  # of log pi_old - log mu
        "above_cap": (rho > cap).double().mean().item(),  # share of tokens that --cap cuts
        "ess_tokens": (rho.mean() ** 2 / (rho**2).mean()).item(),  # 1 on-policy; below .5 half of the batch is wasted
        "ess_sequences": (sequence.mean() ** 2 / (sequence**2).mean()).item(),  # what prefix has to work with
        "retrace_trace": rho.clamp(max=1).mean().item(),  # how far retrace looks ahead, 1: to the end
        "reward_under_pi": ((sequence * reward).sum() / sequence.sum()).item(),  # self-normalised estimate
    }


def next_level(level: float, kl_behav: float, target: float, most: int) -> float:
    """--target-kl-behav: the layers to skip next, a real number; the geometric mean of KL comes to rest at the target."""
    error = math.log(target / max(kl_behav, 1e-9))
    return min(max(level + 0.5 * min(max(error, -1.0), 1.0), 0.0), max(most, 0.0))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the sampled tokens; padding and prompts do not count."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the sampled tokens of the whole batch, 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 one that knows nothing but the mean; nan where all R are equal."""
    residual, target = (returns - values)[mask], returns[mask]
    return (1 - residual.var() / target.var()).item() if target.var() > 1e-12 else math.nan


if __name__ == "__main__":
    run_script(main, Config)
