"""PPO and the sampler once more, slowly and from the equations alone: row by row, token by token, in float64."""

import copy
import math
import random
from collections import Counter
from itertools import accumulate
from typing import get_args

import numpy as np
import pytest
import torch
from families import CONFIGS
from transformers import LlamaConfig

import rl
from evaluate import read_metrics
from model import Decoder, load
from rollout import grade, sample
from warmup import Run

SKIP, CLIP, CAP, ALPHA, BETA, LR, EPOCHS, GAMMA, LAM, SAMPLES = 0.25, 0.05, 1.1, 3.0, 0.5, 0.03, 2, 0.9, 0.8, 2


# ---- one update of PPO ----------------------------------------------------------------------------------------------


def row_stats(model, tokens, start, skip=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(log pi(a_t|s_t), V(s_t)) of each sampled token of one row."""
    hidden = model(tokens[None], skip)[0]
    logp = model.logits(hidden).log_softmax(-1)
    return [(logp[t - 1, tokens[t]], model.values(hidden)[t - 1]) for t in range(start, len(tokens))]


def weight_trace(correction: str, rho: list[float], t: int) -> tuple[float, float]:
    """w_t and c_t of the table of corrections."""
    return {
        "none": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "truncated": (min(rho[t], CAP), 1.0),
        "retrace": (min(rho[t], CAP), min(1.0, rho[t])),
        "prefix": (math.prod(rho[: t + 1]), rho[t]),
    }[correction]


@torch.no_grad()
def naive_rows(policy, reference, rollout, reward, correction, advantage) -> list[list[dict]]:
    """For each token of each row what stands still during the updates: eqs. (3)-(7), as sums and not as a recursion."""
    rows = []
    for n, (length, start) in enumerate(zip(rollout.lengths.tolist(), rollout.prompt_lens.tolist(), strict=True)):
        tokens = rollout.tokens[n, :length]
        old, ref = row_stats(policy, tokens, start), row_stats(reference, tokens, start)
        mu = [logp.item() for logp, _ in row_stats(policy, tokens, start, rollout.skip)]
        logp_old, V = [logp.item() for logp, _ in old], [value.item() for _, value in old]
        end, L, gamma, lam = reward[n], len(old), GAMMA, LAM
        if advantage == "group":
            group = reward[n - n % SAMPLES :][:SAMPLES]
            mean = sum(group) / SAMPLES
            end = (end - mean) / (math.sqrt(sum((r - mean) ** 2 for r in group) / SAMPLES) + 1e-4)
            gamma = lam = 1.0
            V = [0.0] * L
        r = [-BETA * (logp_old[t] - ref[t][0].item()) + (end if t == L - 1 else 0.0) for t in range(L)]
        rho = [math.exp(logp_old[t] - mu[t]) for t in range(L)]
        w, c = zip(*(weight_trace(correction, rho, t) for t in range(L)), strict=True)
        delta = [r[t] + gamma * [*V, 0.0][t + 1] - V[t] for t in range(L)]
        A = [
            sum((gamma * lam) ** (k - t) * math.prod(c[t + 1 : k + 1]) * delta[k] for k in range(t, L))
            for t in range(L)
        ]
        kept = zip(logp_old, mu, V, w, A, (V[t] + c[t] * A[t] for t in range(L)), strict=True)
        rows.append([dict(zip(("old", "mu", "V", "w", "A", "R"), x, strict=True)) for x in kept])
    if advantage == "gae":  # whitened over all tokens of the batch
        flat = [token["A"] for row in rows for token in row]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((A - mean) ** 2 for A in flat) / len(flat) + 1e-8)
        rows = [[token | {"A": (token["A"] - mean) / deviation} for token in row] for row in rows]
    return rows


def naive_gradient(model, rollout, rows, chosen, correction, alpha, sums) -> list[torch.Tensor]:
    """The gradient of eq. (11) over the chosen rows; adds up in `sums` what metrics.jsonl has the means of."""
    tokens, loss = sum(len(rows[n]) for n in chosen), 0.0
    for n in chosen:
        stats = row_stats(model, rollout.tokens[n, : rollout.lengths[n]], int(rollout.prompt_lens[n]))
        for (logp, value), kept in zip(stats, rows[n], strict=True):
            ratio = (logp - kept["mu" if correction == "ratio" else "old"]).exp()  # eq. (8)
            bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
            policy = -kept["w"] * min(ratio * kept["A"], bounded * kept["A"])  # eq. (9)
            near = value.clamp(kept["V"] - CLIP, kept["V"] + CLIP)
            critic = max((value - kept["R"]) ** 2, (near - kept["R"]) ** 2) / 2  # eq. (10)
            loss = loss + policy + alpha * critic  # eq. (11)
            clipped = bool(bounded * kept["A"] < ratio * kept["A"])
            sums.update(policy_loss=policy.item(), value_loss=critic.item(), clip_fraction=clipped, tokens=1)
            sums["value clipped"] += bool((near - kept["R"]) ** 2 > (value - kept["R"]) ** 2)
    return torch.autograd.grad(loss / tokens, list(model.parameters()), materialize_grads=True)


@pytest.fixture(scope="module")
def tiny(toy_run):
    """A random decoder of four layers whose many EOS ids end completions at all lengths."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = Decoder(LlamaConfig(**sizes, vocab_size=400, max_position_embeddings=128, initializer_range=0.5)).double()
    model.tokenizer, model.eos_ids = load(toy_run, None, None).tokenizer, list(range(1, 400, 6))
    return model


@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("correction", get_args(rl.Correction))
def test_an_update_is_that_of_the_equations(tiny, tmp_path, monkeypatch, correction, advantage):
    """The second batch of a run: its policy is not the reference, its critic not zero, mu not pi."""
    drawn, updates, reward = [], [], [1.0, 0.1, 0.0, 1.0, 0.1, 0.1]  # the last two: a group of equals
    monkeypatch.setattr(rl, "load", lambda *args: copy.deepcopy(tiny))
    monkeypatch.setattr(
        rl, "grade", lambda *args: grade(*args)._replace(rewards=torch.tensor(reward, dtype=torch.float64))
    )
    monkeypatch.setattr(Run, "save", lambda run: None)
    monkeypatch.setattr(Run, "finish", lambda *args: {})

    def sampling(model, *args, **flags):
        drawn.append((copy.deepcopy(model), sample(model, *args, **flags)))
        return drawn[-1][1]

    def update(run, *args, real=Run.update):
        before = copy.deepcopy(run.model)  # with its gradients
        updates.append(
            (before, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.model.parameters()])
        )
        norm = real(run, *args)
        updates[-1] += ([p.detach().clone() for p in run.model.parameters()], norm)
        return norm

    def in_order(count, *rest, real=rl.minibatches):
        return [(torch.arange(count).split(4)[i % 2], lr) for i, (_, lr) in enumerate(real(count, *rest))]

    for where, name, spy in ((rl, "sample", sampling), (Run, "update", update), (rl, "minibatches", in_order)):
        monkeypatch.setattr(where, name, spy)
    flags = {
        "steps": 2,
        "rollout_batch": 6,
        "samples": SAMPLES,
        "minibatch": 4,
        "micro_batch": 3,
        "limit": 9,
        "test_limit": 2,
    }
    flags |= {"skip_ratio": SKIP, "clip": CLIP, "cap": CAP, "value_coef": ALPHA, "kl_coef": BETA, "lr": LR}
    flags |= {"ppo_epochs": EPOCHS, "gamma": GAMMA, "lam": LAM, "max_new_tokens": 8, "dtype": "float64"}
    rl.main(rl.Config(model="tiny", task="toy", out=str(tmp_path), correction=correction, advantage=advantage, **flags))

    (policy, rollout), sums = drawn[1], Counter()
    rows = naive_rows(policy, tiny, rollout, reward, correction, advantage)
    assert len({len(row) for row in rows}) > 2 and (advantage == "group" or policy.value_head.weight.any())
    for i, (model, gradients, _, _) in enumerate(updates[4:]):
        alpha = ALPHA if advantage == "gae" else 0.0
        chosen = ([0, 1, 2, 3], [4, 5])[i % 2]
        expected = naive_gradient(model, rollout, rows, chosen, correction, alpha, sums)
        for found, wanted in zip(gradients, expected, strict=True):
            assert (found - wanted).abs().max() < 1e-10
    assert sums["clip_fraction"] > 3 and (sums["value clipped"] or advantage == "group")
    record = read_metrics(tmp_path)[1]
    for name in ("policy_loss", "value_loss", "clip_fraction"):
        assert record[name] == pytest.approx(sums[name] / sums["tokens"], abs=1e-9), name
    assert record["grad_norm"] == pytest.approx(sum(norm for *_, norm in updates[4:]) / 4)

    first, second = ([torch.zeros_like(p) for p in tiny.parameters()] for _ in range(2))  # moments of AdamW
    for i, (model, gradients, after, norm) in enumerate(updates, 1):
        assert norm == pytest.approx(math.sqrt(sum((g**2).sum().item() for g in gradients)), rel=1e-12)
        lr = LR * i / 10 * (1.0 if i <= 4 else 0.5)  # ten updates up; the second batch of two has half
        for g, m, v, p, q in zip(gradients, first, second, model.parameters(), after, strict=True):
            g = g / max(1.0, norm)  # clipped to norm 1
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            step = lr * m / (1 - 0.9**i) / ((v / (1 - 0.999**i)).sqrt() + 1e-8)
            assert (q - (p - step)).abs().max() < 1e-7
    assert max(norm for *_, norm in updates) > 1


# ---- the sampler ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_completion(model, prompt, uniforms, eos_ids, temperature, skip) -> tuple[list[int], list[float]]:
    """No cache, no batch: one pass over the prefix a token. The smallest token whose share of the CDF exceeds u."""
    tokens, logps = list(prompt), []
    for u in uniforms:
        logits = model.logits(model(torch.tensor([tokens]), skip))[0, -1]
        probs = (logits / (temperature or 1.0)).softmax(-1).tolist()
        cdf = list(accumulate(probs))
        at = next(i for i, c in enumerate(cdf) if c > u * cdf[-1]) if temperature else probs.index(max(probs))
        tokens.append(at)
        logps.append(math.log(probs[at]))
        if at in eos_ids:
            break
    return tokens, logps


@pytest.mark.parametrize("seed", range(16))
def test_sample_gives_what_the_naive_sampler_gives(seed):
    dice = random.Random(seed)
    torch.manual_seed(seed)
    model = Decoder(CONFIGS[dice.choice(list(CONFIGS))]()).double()
    prompts = [[dice.randrange(97) for _ in range(dice.randint(1, 9))] for _ in range(dice.randint(1, 4))]
    eos_ids = dice.sample(range(97), dice.choice([0, 1, 4, 20]))
    num_samples, new_tokens, temperature = dice.randint(1, 3), dice.randint(1, 9), dice.choice([1.0, 1.0, 0.6, 1.7, 0])
    skip = dice.choice([None, torch.tensor([dice.random() < 0.4 for _ in range(4)])])
    seeds = [dice.randrange(2**40) for _ in prompts]
    how = {"max_new_tokens": new_tokens, "eos_id": eos_ids, "num_samples": num_samples, "temperature": temperature}
    rollout = sample(model, prompts, **how, pad_id=0, skip=skip, seed=seeds, max_rows=dice.choice([None, 1, 2, 3]))
    assert len(rollout.tokens) == len(prompts) * num_samples
    for n, (prompt, completion) in enumerate(rollout.pairs()):
        i, j = divmod(n, num_samples)
        uniforms = np.random.default_rng((seeds[i], j)).random(new_tokens)
        tokens, logps = naive_completion(model, prompts[i], uniforms, eos_ids, temperature, skip)
        assert prompt + completion == tokens and bool(rollout.finished[n]) == (tokens[-1] in eos_ids)
        assert rollout.logp_behav[n][rollout.action_mask[n]].tolist() == pytest.approx(logps, abs=1e-10)
