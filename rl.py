"""Stage 2b: PPO with GAE, a KL penalty and importance-ratio correction, eqs. (2)-(11).

    python rl.py --skip-ratio 0.25      Nested-ReFT: completions are sampled with a quarter of the layers skipped
    python rl.py                        plain ReFT: the full model samples, on-policy
    python rl.py --advantage group --samples 8     without a critic: advantages relative to the samples of one question
    python rl.py --objective self-training         a baseline of ReFT: eq. (1) on right and annotated completions

One batch takes seven steps, numbered in `main`: 1 draw problems and a skip mask, 2 sample completions from mu, 3 reward
them, 4 take log-probabilities and values of the full model, 5 penalised rewards, advantages and returns, 6 PPO, 7 records.

Departures from ReFT, the paper (its code in brackets):
- KL penalty: the estimate log pi_old - log pi_ref at the sampled token (as the code); the paper writes the full KL.
- Losses: the token mean over the batch (the code: the mean of sequence means). The learning rate ramps up over 10 updates.
- A completion cut at --max-new-tokens has no answer: reward 0 (the code pays it), and no bootstrapped value.
- gamma and lam in the usual sense of Schulman et al. The paper calls the reward discount lambda = 1 and the TD discount
  gamma = 0.95; the code has gamma = 1, lam = 0.95, and so have we.
Departures from Nested-ReFT: its code is not public and the names of the corrections are ours; see `correction_terms`.
"""

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluate import draw_curves, evaluate, report
from model import Decoder, load, peak_memory, sample_skip, write_json
from processes import rank, shard, total
from reward import InputError, Problem, load_problems
from rollout import (
    OUTCOMES,
    Rollout,
    check,
    encode_prompts,
    flag,
    grade,
    layers_in,
    out_of_memory,
    run_script,
    sample_together,
    sampling_gap,
    token_logp,
)
from warmup import (
    LESS_MEMORY,
    TrainConfig,
    agree,
    append_record,
    batch_indices,
    encode_examples,
    fingerprint,
    leave_if_stopped,
    load_optimizer,
    make_optimizer,
    micro_batches,
    note_bad_batch,
    optimizer_step,
    save_checkpoint,
    start_run,
    start_trainer,
    supervised_step,
    until_stopped,
)

OBJECTIVES = ("ppo", "self-training")
ADVANTAGES = ("gae", "group")
CORRECTIONS = ("none", "ratio", "truncated", "retrace", "prefix")
# value_coef stands before the 1/2 of eq. (10), as in ReFT
TOY = {"steps": 20, "rollout_batch": 128, "minibatch": 64, "lr": 1e-4, "kl_coef": 0.01, "value_coef": 0.1}
PRETRAINED = {"steps": 1000, "rollout_batch": 32, "minibatch": 32, "lr": 3e-7, "kl_coef": 0.05, "value_coef": 5.0}
# In the study of the README only prefix keeps its accuracy over 60 batches with skipped layers: what follows an error of mu
# counts no more. Its weights are products over a completion, of 15 tokens in toy; over hundreds they would vary too much.
TOY |= {"correction": "prefix"}
PRETRAINED |= {"correction": "truncated"}
LR_RAMP = 10  # optimizer steps until the learning rate is constant


@dataclass
class Config(TrainConfig):
    """Flags of rl.py; what is None is filled in from TOY or PRETRAINED."""

    model: str = flag("runs/warmup", "directory or hub id of the warm-up model, also the reference of the KL penalty")
    out: str = flag("runs/rl", "directory of the run")
    steps: int | None = flag(None, "rollout batches (toy: 20, else 1000)")
    skip_ratio: float = flag(0.0, "share of the layers that the behavior model skips; 0 is plain ReFT")
    objective: str = flag("ppo", f"one of {', '.join(OBJECTIVES)} (supervised, on right and annotated completions)")
    advantage: str = flag("gae", f"one of {', '.join(ADVANTAGES)} (relative to the samples of one question: no critic)")
    correction: str | None = flag(None, f"one of {', '.join(CORRECTIONS)} (toy: prefix, else truncated)")
    rollout_dtype: str | None = flag(None, "float32 or bfloat16: what the layers sample in (default: as --dtype)")
    target_kl_behav: float | None = flag(
        None, "adapt the number of skipped layers so that KL(mu||pi) per token stays near"
    )
    cap: float = flag(2.0, "upper bound C of the truncated weights pi_old / mu")
    rollout_batch: int | None = flag(None, "completions of one batch (toy: 128, else 32)")
    samples: int = flag(1, "completions a prompt; divides --rollout-batch")
    ppo_epochs: int = flag(2, "passes over each batch")
    minibatch: int | None = flag(None, "completions of one optimizer step (toy: 64, else 32)")
    lr: float | None = flag(None, "learning rate, constant after its first steps (toy: 1e-4, else 3e-7)")
    kl_coef: float | None = flag(None, "beta of eq. (4) (toy and programs: 0.01, else 0.05)")
    gamma: float = flag(1.0, "discount of eqs. (5) and (6)")
    lam: float = flag(0.95, "GAE decay of eq. (6)")
    clip: float = flag(0.2, "epsilon of eqs. (9) and (10)")
    value_coef: float | None = flag(None, "alpha of eq. (11) (toy: 0.1, else 5)")

    def __post_init__(self):
        defaults = TOY if self.task == "toy" else PRETRAINED | ({"kl_coef": 0.01} if self.engine == "python" else {})
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.correction == "prefix" and (self.skip_ratio or self.target_kl_behav):
            self.lam = 1.0  # else its traces would not carry the reward back unbiased
        if self.advantage == "group":
            self.gamma = self.lam = 1.0  # every token gets the whole reward of its completion
        if self.advantage == "group" or self.objective == "self-training":
            self.value_coef = 0.0  # no critic
        super().__post_init__()
        check(self, "objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        check(self, "advantage", self.advantage in ADVANTAGES, f"one of {', '.join(ADVANTAGES)}")
        check(self, "correction", self.correction in CORRECTIONS, f"one of {', '.join(CORRECTIONS)}")
        for name in ("steps", "samples", "ppo_epochs", "minibatch", "rollout_batch"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "kl_coef", "value_coef"):
            check(self, name, 0 <= getattr(self, name) < math.inf, "at least 0, and finite")
        for name in ("gamma", "lam"):
            check(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        check(self, "rollout_dtype", self.rollout_dtype in (None, "float32", "bfloat16"), "float32 or bfloat16")
        check(self, "cap", self.cap > 0, "above 0")
        check(self, "target_kl_behav", self.target_kl_behav is None or self.target_kl_behav > 0, "above 0")
        check(self, "clip", self.clip > 0, "above 0")
        check(self, "skip_ratio", 0 <= self.skip_ratio < 1, "at least 0 and below 1")
        check(
            self,
            "samples",
            self.rollout_batch % self.samples == 0,
            f"a divisor of --rollout-batch {self.rollout_batch}",
        )
        check(self, "samples", self.advantage == "gae" or self.samples >= 2, "at least 2 for --advantage group")
        check(self, "out", Path(self.out).resolve() != Path(self.model).resolve(), "another folder than --model")


def main(config: Config) -> dict:
    """Train, evaluate on the test problems, save; returns what evaluation.json holds."""
    if config.model == "runs/warmup" and not Path(config.model).exists():
        raise InputError(
            f"{config.model} does not exist: run `python warmup.py` first, or name a checkpoint with --model"
        )
    problems = load_problems(config.task, "train", config.data, config.limit, config.engine)
    test_problems = load_problems(config.task, "test", config.test_data, config.limit, config.engine)
    reference, tokenizer, eos_ids = load(config.model, config.device, config.dtype)
    num_layers = len(reference.layers)
    # what changes from batch to batch and is in no weight: layers to skip (they move with --target-kl-behav), one warning
    state = {"level": config.skip_ratio * num_layers, "warned": False}
    trainer = start_trainer("rl", config, fingerprint(problems, reference), **state)
    resumed = trainer["step"] > 0
    model = load(config.out, config.device, config.dtype)[0] if resumed else copy.deepcopy(reference)
    model.gradient_checkpointing = config.gradient_checkpointing
    freeze(reference)  # pi_theta^(0)
    shard(model)
    shard(reference)
    optimizer = make_optimizer(model)
    # what cannot work is refused before anything is written
    sample_skip(num_layers, config.skip_ratio)
    prompts = encode_prompts(problems, tokenizer, model, eos_ids, config)
    encode_prompts(test_problems, tokenizer, model, eos_ids, config)
    annotated = {}  # number of a problem -> (prompt, chain of thought), for self-training
    if config.objective == "self-training" and any(problem.cot for problem in problems):
        numbers = [i for i, problem in enumerate(problems) if problem.cot]
        examples = encode_examples([problems[i] for i in numbers], tokenizer, model, eos_ids, config)
        annotated = dict(zip(numbers, examples, strict=True))
    if resumed:
        load_optimizer(optimizer, trainer.pop("optimizer"))
    out = start_run(config, trainer)

    if config.correction == "prefix" and config.lam == 1:
        print("lam is 1, as the theorem of --correction prefix needs")
    if config.advantage == "group":
        print("--advantage group: no critic; gamma and lam are 1, value_coef is 0")
    updates_a_batch = config.ppo_epochs * math.ceil(config.rollout_batch / config.minibatch)
    done, stop = trainer["step"], []  # stop: the signal that asked for the end
    bar = tqdm(
        range(done + 1, config.steps + 1), desc="rl", unit="batch", initial=done, total=config.steps, disable=rank() > 0
    )
    for step in until_stopped(bar, trainer, stop):
        # 1. problems, and a new skip mask for every batch
        started = time.perf_counter()
        rng = np.random.default_rng((config.seed, 1, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = batch_indices(config.seed, step, config.rollout_batch // config.samples, len(problems))
        batch = [problems[i] for i in chosen]
        skip = sample_skip(num_layers, round(trainer["level"]) / num_layers, generator)

        # 2. completions from the nested behavior model mu
        rollout_started = time.perf_counter()
        with layers_in(model, config.rollout_dtype):
            rollout = sample_together(
                model,
                [prompts[i] for i in chosen],
                max_new_tokens=config.max_new_tokens,
                eos_id=eos_ids,
                pad_id=eos_ids[0],
                num_samples=config.samples,
                skip=skip,  # eq. (2)
                seed=int(rng.integers(2**62)),
                max_rows=config.max_rows,
            )
        tokens, lengths, mask, logp_behav = rollout.tokens, rollout.lengths, rollout.action_mask, rollout.logp_behav
        rollout_seconds = time.perf_counter() - rollout_started

        # 3. rewards, at the last token of each completion
        texts, _, outcomes, final_reward = grade(rollout, batch, tokenizer, config)  # (N,), eq. (3)
        rewards = torch.zeros_like(logp_behav)  # (N, T-1)
        end_reward = final_reward if config.advantage == "gae" else group_relative(final_reward, config.samples)  # (N,)
        rewards[torch.arange(len(tokens), device=tokens.device), lengths - 2] = end_reward.to(rewards.dtype)

        # 4. the full model: log pi_old, V_old and log pi_ref of every sampled token
        update_started = time.perf_counter()
        logp_old, values_old = batch_stats(model, rollout, config.micro_batch)  # (N, T-1) each
        logp_ref, _ = batch_stats(reference, rollout, config.micro_batch)  # (N, T-1)
        if config.advantage == "group":
            values_old = torch.zeros_like(values_old)  # no critic

        # 5. penalised rewards, advantages, returns
        kl_ref = logp_old - logp_ref  # (N, T-1)
        rewards = rewards - config.kl_coef * kl_ref  # eq. (4)
        _, trace = correction_terms(config.correction, logp_old, logp_behav, mask, config.cap)
        advantages, returns = gae(rewards, values_old, mask, config.gamma, config.lam, trace)  # eqs. (5)-(7)
        if config.advantage == "gae":
            advantages = whiten(advantages, mask)  # after the returns, which keep their scale

        # 6. PPO: several passes over the batch; self-training: over its right and the annotated completions
        updates = (step - 1) * updates_a_batch
        if config.objective == "ppo":
            batch_tensors = (logp_old, logp_behav, values_old, advantages, returns)
            losses = ppo_update(model, optimizer, rollout, batch_tensors, config, generator, updates)
        else:
            spans = zip(
                tokens.tolist(), rollout.prompt_lens.tolist(), lengths.tolist(), final_reward.tolist(), strict=True
            )
            examples = [(row[:start], row[start:end]) for row, start, end, reward in spans if reward == 1]
            examples += [annotated[i] for i in chosen if i in annotated]
            losses = self_training_update(model, optimizer, examples, config, generator, updates)

        # 7. records: means over the sampled tokens, or over the completions, of the whole batch
        now = time.perf_counter()
        trainer["step"], trainer["seconds"] = step, trainer["seconds"] + now - started
        record = {
            "step": step,
            "seconds": trainer["seconds"],
            "reward": final_reward.mean().item(),
            "accuracy": (final_reward == 1).double().mean().item(),
            "length": (lengths - rollout.prompt_lens).double().mean().item(),
            **{outcome: outcomes.count(outcome) / len(outcomes) for outcome in OUTCOMES[1:]},  # the right: accuracy
            "finished": rollout.finished.double().mean().item(),
            "kl_ref": masked_mean(kl_ref, mask).item(),
            **mismatch(logp_old, logp_behav, mask, config.cap, final_reward),
            "explained_variance": explained_variance(values_old, returns, mask),
            **losses,
            "skipped_layers": skip.nonzero().flatten().tolist(),
            "rollout_tokens_per_second": int(mask.sum()) / rollout_seconds,
            "rollout_seconds": rollout_seconds,
            "update_seconds": now - update_started,
            "peak_memory_gb": peak_memory(tokens.device),
        }
        if config.rollout_dtype is not None:
            record["sampling_gap"] = sampling_gap(model, rollout).abs().mean().item()
        if not trainer["warned"] and (record["kl_behav"] > 0.05 or record["ess_tokens"] < 0.5):
            trainer["warned"] = True
            tqdm.write(
                f"warning: at step {step} KL(mu||pi) is {record['kl_behav']:.3f} per token and the effective sample size "
                f"{record['ess_tokens']:.2f}: skip fewer layers (--skip-ratio), or warm up with --layer-dropout"
            )
        if config.target_kl_behav is not None:
            trainer["level"] = next_level(trainer["level"], record["kl_behav"], config.target_kl_behav, num_layers)
        if config.eval_every and step % config.eval_every == 0:
            record["greedy_accuracy"] = evaluate(model, tokenizer, eos_ids, test_problems, config)["greedy_accuracy"]
        append_record(out / "metrics.jsonl", record)
        bar.set_postfix(
            reward=f"{record['reward']:.3f}",
            accuracy=f"{record['accuracy']:.3f}",
            loss=f"{record['policy_loss'] + config.value_coef * record['value_loss']:.3f}",
            tok_s=f"{record['rollout_tokens_per_second']:.0f}",
            refresh=False,
        )
        if step % 5 == 1 and rank() == 0:
            append_samples(out, step, [batch[0], batch[-1]], [texts[0], texts[-1]], final_reward[[0, -1]].tolist())
        note_bad_batch(out, trainer, record, chosen)
        if config.save_every and step % config.save_every == 0 and step < config.steps and not agree(stop):
            save_checkpoint(out, model, tokenizer, optimizer, trainer)

    save_checkpoint(out, model, tokenizer, optimizer, trainer)
    leave_if_stopped(out, trainer, stop)
    result = evaluate(model, tokenizer, eos_ids, test_problems, config)
    if rank() == 0:
        write_json(out / "evaluation.json", result)
        draw_curves(out, ("reward", "accuracy", "length", "kl_ref", "kl_behav", "entropy", "greedy_accuracy"))
    print(report(result, trainer["seconds"]))
    print(f"checkpoint: {out}    curves: {out / 'curves.png'}    next: python evaluate.py {config.model} {out}")
    return result


def freeze(reference: Decoder):
    """No gradients; where passes run in bf16 anyway, bf16 linear layers: the same numbers in half the memory."""
    reference.requires_grad_(False)
    if reference.autocast:
        for module in reference.layers.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()


@out_of_memory(LESS_MEMORY)
def ppo_update(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    batch_tensors: tuple[Tensor, ...],
    config: Config,
    generator: torch.Generator,
    updates: int,
) -> dict[str, float]:
    """Step 6 of main: ppo_epochs passes in random minibatches; returns the means over all tokens that were updated on.

    batch_tensors: logp_old, logp_behav, values_old, advantages, returns, (N, T-1) each; updates: optimizer steps so far.
    """
    tokens, lengths, mask = rollout.tokens, rollout.lengths, rollout.action_mask
    totals = torch.zeros(4, dtype=torch.float64)  # policy loss, value loss, clipped tokens, tokens
    grad_norms = []
    for _ in range(config.ppo_epochs):
        order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
        for rows in order.split(config.minibatch):
            denominator = int(mask[rows].sum())  # of the whole optimizer step: the micro-batch size changes nothing
            loss_sum = 0.0
            for part, T in micro_batches(lengths[rows], config.micro_batch):
                mb = rows[part]
                mb_mask = mask[mb, : T - 1]  # (n, T-1), as all that follow
                logp_old, logp_behav, values_old, advantages, returns = (x[mb, : T - 1] for x in batch_tensors)
                logp_new, values = action_stats(model, tokens[mb, :T], mb_mask, lengths[mb])
                pg_loss = policy_loss(
                    logp_new, logp_old, logp_behav, advantages, mb_mask,
                    config.clip, config.correction, config.cap, denominator,
                )  # fmt: skip
                v_loss = value_loss(values, values_old, returns, mb_mask, config.clip, denominator)
                loss = pg_loss + config.value_coef * v_loss  # eq. (11)
                loss.backward()
                loss_sum += loss.item()
                ratio = importance_ratio(logp_new.detach(), logp_old, logp_behav, config.correction)
                clipped = is_clipped(ratio, advantages, config.clip) & mb_mask
                sums = [pg_loss.item() * denominator, v_loss.item() * denominator, clipped.sum(), mb_mask.sum()]
                totals += torch.tensor(sums, dtype=torch.float64)
            updates += 1
            lr = config.lr * min(1, updates / LR_RAMP)
            grad_norms.append(optimizer_step(model, optimizer, lr, total(loss_sum)))
    policy_total, value_total, clipped_total, token_total = total(totals).tolist()
    return {
        "policy_loss": policy_total / token_total,
        "value_loss": value_total / token_total,
        "clip_fraction": clipped_total / token_total,
        "grad_norm": sum(grad_norms) / len(grad_norms),
        "nonfinite_updates": sum(map(math.isnan, grad_norms)),
    }


def self_training_update(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    examples: list[tuple[list[int], list[int]]],
    config: Config,
    generator: torch.Generator,
    updates: int,
) -> dict[str, float]:
    """Step 6 of main for online self-training (ReFT, section 4.2): eq. (1) on `examples`, in passes and minibatches as PPO.

    examples: (prompt, completion); where there is none, no weight changes. updates: optimizer steps so far.
    """
    losses, grad_norms = [], []
    for _ in range(config.ppo_epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order), config.minibatch):
            rows = order[first : first + config.minibatch]
            updates += 1
            lr = config.lr * min(1, updates / LR_RAMP)
            loss, norm = supervised_step(model, optimizer, [examples[n] for n in rows], lr, config.micro_batch)
            losses.append(loss)
            grad_norms.append(norm)
    return {
        "policy_loss": sum(losses) / max(len(losses), 1),
        "value_loss": 0.0,
        "clip_fraction": 0.0,
        "grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
        "nonfinite_updates": sum(map(math.isnan, grad_norms)),
    }


def append_samples(out: Path, step: int, problems: list[Problem], texts: list[str], rewards: list[float]):
    """A few completions of this batch into samples.txt, to be read by people."""
    with (out / "samples.txt").open("a", encoding="utf-8") as file:
        for problem, text, reward in zip(problems, texts, rewards, strict=True):
            file.write(f"--- step {step}, reward {reward:g}, gold {problem.answer}\n{problem.question}\n>>> {text}\n")


# ---- the equations --------------------------------------------------------------------------------------------------


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, trace: Tensor | None = None
) -> tuple[Tensor, Tensor]:
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


def correction_terms(
    correction: str, logp_old: Tensor, logp_behav: Tensor, mask: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
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


def importance_ratio(logp_new: Tensor, logp_old: Tensor, logp_behav: Tensor, correction: str) -> Tensor:
    """r_t of eq. (8), (N, T-1); with correction "ratio" pi_theta / mu takes its place."""
    return (logp_new - (logp_behav if correction == "ratio" else logp_old)).exp()  # eq. (8)


def policy_loss(
    logp_new: Tensor,
    logp_old: Tensor,
    logp_behav: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    correction: str,
    cap: float,
    denominator: Tensor | float,
) -> Tensor:
    """Clipped surrogate of eq. (9), a scalar. Tensors (N, T-1); denominator: the tokens of the whole optimizer step."""
    weight, _ = correction_terms(correction, logp_old, logp_behav, mask, cap)  # (N, T-1)
    ratio = importance_ratio(logp_new, logp_old, logp_behav, correction)  # (N, T-1)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)  # (N, T-1)
    return -(weight * surrogate * mask).sum() / denominator  # eq. (9)


def value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: Tensor | float
) -> Tensor:
    """Clipped squared error of V_phi, eq. (10), a scalar. Tensors (N, T-1)."""
    clipped = torch.clamp(values, values_old - clip, values_old + clip)  # (N, T-1)
    squared = torch.max((values - returns) ** 2, (clipped - returns) ** 2)  # (N, T-1)
    return 0.5 * (squared * mask).sum() / denominator  # eq. (10)


# ---- helpers --------------------------------------------------------------------------------------------------------


def action_stats(model: Decoder, tokens: Tensor, mask: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log pi(a_t|s_t) and V_phi(s_t) of the full model, (N, T-1) each, 0 outside the mask.

    tokens: (N, T); mask: (N, T-1); lengths: (N,), where they are known no work goes into padding. Logits are made for
    actions only.
    """
    hidden = model(tokens, lengths=lengths)[:, :-1][mask]  # (actions, d)
    logp = token_logp(model.logits(hidden), tokens[:, 1:][mask])  # (actions,)
    values = model.values(hidden)  # (actions,)
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (logp, values))


@out_of_memory("the pass before the update did not fit; lower --micro-batch")
@torch.no_grad()
def batch_stats(model: Decoder, rollout: Rollout, micro_batch: int) -> tuple[Tensor, Tensor]:
    """`action_stats` of a whole batch, rows of like length together."""
    logp, values = torch.zeros_like(rollout.logp_behav), torch.zeros_like(rollout.logp_behav)  # (N, T-1)
    for rows, T in micro_batches(rollout.lengths, micro_batch):
        part = action_stats(model, rollout.tokens[rows, :T], rollout.action_mask[rows, : T - 1], rollout.lengths[rows])
        logp[rows, : T - 1], values[rows, : T - 1] = part
    return total(logp), total(values)  # each process filled in its rows


def mismatch(logp_old: Tensor, logp_behav: Tensor, mask: Tensor, cap: float, reward: Tensor) -> dict[str, float]:
    """How far mu is from pi_old in this batch, raw: before any cap. Tensors (N, T-1), reward (N,).

    KL(mu||pi_old) and the entropy of pi_old are unbiased estimates from mu's samples: they need no pass of their own.
    Effective sample size, as a share: (E w)^2 / E w^2 over tokens (w = rho_t) or completions (w = prod rho_t).
    """
    log_rho = torch.where(mask, logp_old - logp_behav, 0.0).double()  # (N, T-1)
    rho, sequence = log_rho[mask].exp(), log_rho.sum(1).exp()  # (tokens,), (N,)
    p1, p50, p99 = torch.quantile(log_rho[mask], log_rho.new_tensor([0.01, 0.5, 0.99])).tolist()
    return {
        "kl_behav": (rho - 1 - log_rho[mask]).mean().item(),  # never negative, of low variance (k3)
        "kl_behav_k1": -log_rho[mask].mean().item(),
        "entropy": -(rho * logp_old[mask]).mean().item(),
        "log_ratio_min": log_rho[mask].min().item(),
        "log_ratio_p1": p1,
        "log_ratio_p50": p50,
        "log_ratio_p99": p99,
        "log_ratio_max": log_rho[mask].max().item(),
        "log_ratio_mean": log_rho[mask].mean().item(),
        "above_cap": (rho > cap).double().mean().item(),
        "ess_tokens": (rho.mean() ** 2 / (rho**2).mean()).item(),
        "ess_sequences": (sequence.mean() ** 2 / (sequence**2).mean()).item(),
        "retrace_trace": rho.clamp(max=1).mean().item(),
        "reward_under_pi": ((sequence * reward).sum() / sequence.sum()).item(),  # self-normalised estimate
    }


def next_level(level: float, kl_behav: float, target: float, num_layers: int) -> float:
    """--target-kl-behav: the number of layers to skip next, a real number that is rounded when the mask is drawn.

    Half a layer up or down at most, by the logarithm of target / KL, so that the geometric mean of the KL comes to rest at
    the target. Without skipped layers KL is 0 and the level rises.
    """
    error = math.log(target / max(kl_behav, 1e-9))
    return min(max(level + 0.5 * min(max(error, -1.0), 1.0), 0.0), max(num_layers - 3.0, 0.0))


def is_clipped(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Where the minimum of eq. (9) takes the clipped branch: no gradient comes from there."""
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the sampled tokens; padding and prompts do not count."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the sampled tokens of the whole batch, 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 one that knows nothing but the mean."""
    residual, target = (returns - values)[mask], returns[mask]
    return (1 - residual.var() / target.var().clamp(min=1e-12)).item()


if __name__ == "__main__":
    run_script(main, Config)
