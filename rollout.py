"""Stage 2a: sample completions from the nested behavior model mu, eq. (2).

mu is the policy with the layers of `skip` left out, in prefill and in decode alike, so that log mu of a finished completion
equals one masked forward pass over it. One row of a Rollout, a prompt of 3 tokens and a completion of 2 tokens and EOS:

    column               0    1    2    3    4    5    6    7
    tokens      (N, T)   x0   x1   x2   a0   a1  EOS  pad  pad      prompt_lens = 3, lengths = 6
    action_mask (N, T-1)  .    .    T    T    T    .    .           True at column t: token t+1 was sampled, EOS too
    logp_behav  (N, T-1)  0    0   mu(a0) mu(a1) mu(EOS)  0    0    log mu(a_t | s_t), recorded while sampling
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser

from model import MEASURED, Decoder, check_checkpoint, gather, gathered, load, nested_kl, process_group, rank
from model import read_json, sample_skip, total, world_size
from reward import TASKS, TOY_STEPS, InputError, Problem, extract_answer, load_problems, make_prompt, score
from sandbox import execute, score_result


@dataclass(frozen=True)
class Rollout:
    """Completions of one batch; rows are ordered prompt by prompt. See the picture at the top of this file."""

    tokens: Tensor  # (N, T) int64: prompt, completion, padding
    prompt_lens: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64: prompt and completion, EOS included
    action_mask: Tensor  # (N, T-1) bool
    logp_behav: Tensor  # (N, T-1), 0 where no token was sampled
    finished: Tensor  # (N,) bool: ended by EOS, not cut at max_new_tokens
    skip: Tensor | None  # (num_layers,) bool: the mask of mu

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """The N (prompt, completion) pairs, EOS included."""
        spans = zip(self.tokens.tolist(), self.prompt_lens.tolist(), self.lengths.tolist(), strict=True)
        return [(row[:start], row[start:end]) for row, start, end in spans]


def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(a | s) = logit[a] - logsumexp(logits). logits: (..., vocab), at least fp32; tokens: (...)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability from the full softmax: no top-k, no top-p, or mu would lose support.

    logits: (R, vocab); uniform: (R,) float64 in [0, 1). Temperature 0 is greedy, its log-probability that at 1.
    """
    probs = (logits / temperature if temperature not in (0, 1) else logits).softmax(-1)  # (R, vocab)
    if temperature == 0:
        tokens = logits.argmax(-1)  # (R,)
    else:
        cdf = probs.cumsum(-1, dtype=torch.float64)  # (R, vocab); in fp32 rounding would move the borders
        tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(-1)  # (R,)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # rounding, or nan, may point past the last
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()


def prompt_seeds(seed: int, count: int) -> list[int]:
    """One seed a prompt, so that a prompt keeps its noise when the batch is split among calls or processes."""
    return np.random.SeedSequence(seed).generate_state(count, np.uint64).tolist()


OUTCOMES = ("right", "wrong", "no_answer", "cut", "error", "timeout", "killed")  # the last three: programs only
PREFILL = 32  # prompts of one prefill; sorted by length, they have little padding among them
LOOK_EVERY = {"cuda": 16}  # steps between looks for ended rows; each makes the host wait for a GPU. Elsewhere: 1


def sample(
    model: Decoder,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int | list[int],
    pad_id: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    skip: Tensor | None = None,
    seed: int | list[int] = 0,
    max_rows: int | None = None,
) -> Rollout:
    """Complete every prompt `num_samples` times with the layers of `skip` left out: a_t ~ mu(. | s_t), eq. (2).

    prompts: lists of token ids. eos_id: one id, several, or [] for none. temperature 0 is greedy. seed: one int, or one a
    prompt. max_rows: at most so many rows run at a time (memory); when some have ended, waiting ones take their place.
    The noise is one uniform number per (seed, prompt, sample, position), so the completions depend neither on max_rows nor
    on a row's neighbours, nor on the number of processes, which share out the rows.
    """
    device, longest = model.embed.weight.device, max(map(len, prompts), default=0)
    if not longest or not all(prompts):
        raise ValueError("sample() needs at least one prompt, and no empty one")
    if longest + max_new_tokens > model.config.max_positions:
        raise ValueError(f"{longest} prompt tokens + {max_new_tokens} new ones > context {model.config.max_positions}")
    seeds = prompt_seeds(seed, len(prompts)) if isinstance(seed, int) else seed
    eos = torch.tensor([eos_id] if isinstance(eos_id, int) else eos_id, dtype=torch.int64)
    is_eos = torch.isin(torch.arange(model.config.vocab_size), eos).to(device)  # (vocab,)

    # 1. rows: what row n says stands in tokens[n, :lengths[n]]; row N and column T are for what nobody reads
    N, T = len(prompts) * num_samples, longest + max_new_tokens
    rows = [torch.tensor(prompt) for prompt in prompts for _ in range(num_samples)]
    tokens = pad_sequence([*rows, torch.tensor([pad_id])], batch_first=True, padding_value=pad_id)  # (N + 1, longest)
    tokens = F.pad(tokens, (0, max_new_tokens + 1), value=pad_id).to(device)  # (N + 1, T + 1)
    prompt_lens = torch.tensor([*map(len, rows), 1], device=device)
    noise = torch.zeros(N + 1, T + 1, dtype=torch.float64)
    for n in range(N if temperature > 0 else 0):
        rng = np.random.default_rng((seeds[n // num_samples], n % num_samples))
        noise[n, len(rows[n]) :][:max_new_tokens] = torch.from_numpy(rng.random(max_new_tokens))
    noise, exact = noise.to(device), torch.promote_types(model.embed.weight.dtype, torch.float32)
    logp_behav = torch.zeros(N + 1, T + 1, dtype=exact, device=device)
    lengths, done = prompt_lens.clone(), torch.zeros(N + 1, dtype=torch.bool, device=device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # short ones first
    waiting = [i * num_samples + j for i in order[rank() :: world_size()] for j in range(num_samples)]

    # 2. slots: the first R of them are at work, each on the row that `row` says; its keys and values are in `cache`
    slots, R, every = min(max_rows or N, N), 0, LOOK_EVERY.get(device.type, 1)
    row, skipped = torch.full((slots,), N, device=device), None if skip is None else skip.cpu()

    def emit(hidden: Tensor, row: Tensor):
        """Draw the next token of some rows, (R,); hidden: (R, d) at their last tokens. Rows that are done stay."""
        cell = row, lengths[row]
        action, logp = draw(model.logits(hidden), noise[cell], temperature)
        tokens[cell], logp_behav[cell] = action, logp
        lengths[row] += ~done[row]
        done[row] |= is_eos[action] | (lengths[row] == prompt_lens[row] + max_new_tokens)

    def step(rows: int, width: int):
        """A token for each of the first `rows` slots. It reads no value back, so that a CUDA graph can hold it."""
        last = lengths[row[:rows], None] - 1  # (rows, 1)
        hidden = model(tokens[row[:rows, None], last], skipped, cache[:, :, :rows, :, :width], last)  # (rows, 1, d)
        emit(hidden[:, 0], row[:rows])

    def admit(new: list[int]):
        """Rows take the next slots: a prompt runs once for those of its samples, its keys and values are copied."""
        unique, copies = torch.tensor([n // num_samples for n in new], device=device).unique(return_inverse=True)
        new = torch.tensor(new, device=device)
        row[R : R + len(new)] = new
        width = int(prompt_lens[new].max())
        prompt_cache = model.new_cache(len(unique), width, skipped)
        hidden = model(tokens[unique * num_samples, :width], skipped, prompt_cache)  # (unique, width, d)
        cache[:, :, R : R + len(new), :, :width] = prompt_cache[:, :, copies]
        emit(hidden[copies, prompt_lens[new] - 1], new)

    # 3. decode; whoever has ended makes place for who waits
    decode = graphed(step) if device.type == "cuda" else step
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=model.autocast)  # casts the weights once for all
    bar = tqdm(total=len(waiting), desc="sample", leave=False, delay=10, disable=rank() > 0)  # shown after 10 seconds
    with gathered(model), torch.inference_mode(), autocast, bar:
        cache = model.new_cache(slots, T, skipped)
        while waiting or R:
            while waiting and R <= 0.875 * slots:  # not for each slot that falls free: a prefill of few rows is slow
                count = min(slots - R, PREFILL * num_samples, len(waiting))
                admit(waiting[:count])
                R, waiting = R + count, waiting[count:]
            ended = done[row[:R]]
            if ended.any():  # the last slots move into the holes
                stay = int((~ended).sum())
                holes, movers = ended[:stay].nonzero()[:, 0], stay + (~ended[stay:]).nonzero()[:, 0]
                row[holes], cache[:, :, holes] = row[movers], cache[:, :, movers]
                bar.update(R - stay)
                row[stay:R], R = N, stay
            if R:  # on a GPU in few sizes, for each of which a graph is captured
                size = (min(slots, 1 << (R - 1).bit_length()), T) if every > 1 else (R, int(lengths[row[:R]].max()))
                for _ in range(every):
                    decode(*size)

    # 4. every process has filled in its rows
    mine = done[:N, None]
    tokens, logp_behav = total(tokens[:N] * mine), total(logp_behav[:N] * mine)
    lengths = total(lengths[:N] * mine[:, 0])
    finished = is_eos[tokens.gather(1, lengths[:, None] - 1)][:, 0]
    column = torch.arange(int(lengths.max()), device=device)  # (T,) from here on
    action_mask = ((column >= prompt_lens[:N, None]) & (column < lengths[:, None]))[:, 1:]  # by length, never by id
    tokens = tokens[:, : len(column)].masked_fill(column >= lengths[:, None], pad_id)
    logp_behav = logp_behav[:, 1 : len(column)].masked_fill(~action_mask, 0)  # column t speaks of the token at t + 1
    return Rollout(tokens, prompt_lens[:N], lengths, action_mask, logp_behav, finished, skip)


def graphed(step: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`step` as a CUDA graph for each size: one launch in place of hundreds. A graph keeps the addresses of its tensors."""
    graphs, pool = {}, torch.cuda.graph_pool_handle()  # one pool: nothing in it is needed after a replay

    def replay(*size: int):
        if size in graphs:
            graphs[size].replay()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*size)  # warms up, and is the step that was asked for: capturing computes nothing
        torch.cuda.current_stream().wait_stream(stream)
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size], pool=pool):
            step(*size)

    return replay


def skip_pool(model: Decoder, count: int, config: "NestedConfig") -> list[int]:
    """The layers among which eq. (2) draws the `count` that mu leaves out, by --skip-layers.

    inner, the paper: all but the first and the last. cheap, ours: twice as many as are left out, those worth least.
    """
    pool = inner = list(range(1, len(model.layers) - 1))
    if config.skip_layers == "cheap" and count:
        pool = sorted(inner, key=lambda layer: model.hf_config.layer_kl[layer])[: 2 * count]
    elif config.skip_layers not in ("cheap", "inner"):
        pool = [int(layer) for layer in config.skip_layers.split(",")]
    if len({*pool} & {*inner}) < len(pool):
        raise InputError(f"--skip-layers {config.skip_layers}: must be different numbers from 1 to {len(inner)}")
    return pool


# ---- prompts --------------------------------------------------------------------------------------------------------

SYSTEM_PROMPTS = {  # nl: that of Qwen2.5-Math-Instruct; for programs it is ours
    "nl": "Please reason step by step, and put your final answer within \\boxed{}.",
    "python": "Write a Python function solution() that returns the answer. Reply with the function alone.",
}


def turn_end(model: Decoder) -> int | None:
    """The EOS with which the chat template ends an answer. None: a base model; some have a template with another EOS."""
    if not model.tokenizer.chat_template:
        return None
    (ids,) = model.encode_chats([[("user", "1 + 1?"), ("assistant", "2")]], prompt=False)
    return next((token for token in reversed(ids) if token in model.eos_ids), None)


def is_chat(model: Decoder, config: "SharedConfig") -> bool:
    """Whether prompts are a chat: --prompt-style, where it is "auto" what the checkpoint was trained on."""
    chat = config.prompt_style != "reft" and turn_end(model) is not None
    if config.prompt_style == "chat" and not chat:
        raise InputError("--prompt-style is chat, but no chat template ends answers with an EOS of --model; take reft")
    return chat


def encode_prompts(problems: list[Problem], model: Decoder, config: "SharedConfig", room, training=False) -> list:
    """Token ids of every prompt, in the style that `is_chat` finds; each must leave `room` for a completion."""
    if is_chat(model, config):
        system = SYSTEM_PROMPTS[config.engine]
        try:
            prompts = model.encode_chats([[("system", system), ("user", problem.question)] for problem in problems])
        except InputError:  # a template without that role
            prompts = model.encode_chats([[("user", f"{system}\n\n{problem.question}")] for problem in problems])
    else:
        ids = model.tokenizer("x").input_ids
        front = ids[: ids.index(model.encode(["x"])[0][0])]  # BOS, but no EOS behind, which some tokenizers add too
        prompts = [front + ids for ids in model.encode([make_prompt(problem) for problem in problems])]
    check_fit(prompts, model, room, training, problems, prompts)
    return prompts


def check_fit(rows: list[list[int]], model: Decoder, room: int, training: bool, problems: list[Problem], others: list):
    """InputError for rows that exceed context or embedding; few of training are taken out of `problems` and `others`."""
    most, known = model.config.max_positions, model.config.vocab_size
    bad = [n for n, row in enumerate(rows) if len(row) + room > most or max(row) >= known]
    if not bad:
        return
    new = f" with --max-new-tokens {room}" if room else ""
    what = f"{len(bad)} of {len(rows)} problems exceed the model's context of {most} tokens{new}, or its embedding"
    if not training or len(bad) >= 0.01 * len(rows):
        first = f"problem {bad[0] + 1} ({problems[bad[0]].question[:40]!r}...) of {len(rows[bad[0]])} tokens"
        raise InputError(f"{what}; the first is {first}")
    print(f"left out: {what}")
    for n in reversed(bad):
        del problems[n], others[n]


class Grades(NamedTuple):
    """What N completions say and earn."""

    texts: list[str]
    answers: list[str | None]  # canonical text of each final answer
    outcomes: list[str]  # one of OUTCOMES each
    rewards: Tensor  # (N,), eq. (3)


def grade(rollout: Rollout, problems: list[Problem], model: Decoder, config: "SharedConfig") -> Grades:
    """Rewards, eq. (3), of completions in words or of programs. One that was cut has no answer: reward 0."""
    known, mark = len(model.tokenizer), model.eos_ids[0]  # stands for ids without a token, which decoding would drop
    rows = [ids[:-1] if ids[-1] in model.eos_ids else ids for _, ids in rollout.pairs()]
    texts = model.tokenizer.batch_decode([[i if i < known else mark for i in row] for row in rows])
    num_samples = len(texts) // len(problems)
    finished = rollout.finished.tolist()
    if config.engine == "python":
        programs = [text for text, done in zip(texts, finished, strict=True) if done]
        # by one process: its programs have all cores, and everybody sees the same results
        ran = iter(gather(execute(programs, config.unsafe_exec) if rank() == 0 else [])[0])
    answers, outcomes, rewards = [], [], []
    for n, (text, done) in enumerate(zip(texts, finished, strict=True)):
        problem, status, answer, reward = problems[n // num_samples], "cut", None, 0.0
        if done and config.engine == "python":
            status, answer = next(ran)  # eq. (3):
            reward = score_result(answer, problem.answer, config.task, problem.options) if status == "ok" else 0.0
        elif done:
            status, answer = "ok", extract_answer(text, config.task, problem.options)
            reward = score(text, problem.answer, config.task, problem.options)  # eq. (3)
        answers.append(answer)
        outcomes.append({1.0: "right", 0.1: "wrong", 0.0: "no_answer"}[reward] if status == "ok" else status)
        rewards.append(reward)
    return Grades(texts, answers, outcomes, torch.tensor(rewards, device=rollout.tokens.device))


# ---- flags and scripts ----------------------------------------------------------------------------------------------


def flag(default, text: str):
    """A field of a Config: its default and its line in --help."""
    return field(default=default, metadata={"help": text})


RANGES = (  # low, high, and the flags of any script whose numbers must lie between them
    (1, inf, "limit test_limit max_new_tokens max_rows micro_batch steps batch rollout_batch ppo_epochs minibatch"),
    (0, inf, "seed samples save_every eval_every lr weight_decay kl_coef value_coef"),
    (1e-9, inf, "epochs clip cap target_kl_behav"),
    (0, 1, "gamma lam layer_dropout"),
    (0, 0.999999, "beta2 skip_ratio"),
)


@dataclass
class SharedConfig:
    """Flags that mean the same in every script."""

    task: Literal[TASKS] | None = flag(None, "which problems (default: those of the run that made --model; else toy)")
    test_data: str | None = flag(None, "test problems: a file or hub id (default: the run's, the usual ones)")
    test_limit: int | None = flag(None, "use only the first so many test problems")
    engine: Literal["nl", "python"] | None = flag(None, "python: programs (default: the run's, nl: natural language)")
    prompt_style: Literal["auto", "reft", "chat"] | None = flag(None, "default: the run's; auto: chat for chat models")
    unsafe_exec: bool = flag(False, "run model-written programs even where the system cannot hold them back")
    max_new_tokens: int | None = flag(None, "longest completion in tokens (toy: 64, toy-long: 128, else 400: ReFT's)")
    max_rows: int = flag(512, "completions sampled at a time; lower it to save memory, the samples stay")
    device: Literal["cpu", "cuda"] | None = flag(None, "default: cuda where there is one")
    dtype: Literal["float32", "float64", "bfloat16"] | None = flag(None, "default: bfloat16 on cuda, else float32")

    def __post_init__(self):
        """A value out of range ends the program before anything is read or written. What was not given is filled in."""
        for low, high, names in RANGES:
            for name in names.split():
                value = getattr(self, name, None)
                if value is not None and not (low <= value <= high and isfinite(value)):
                    raise InputError(f"--{name.replace('_', '-')} is {value}, it must be between {low:g} and {high:g}")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = self.dtype or ("bfloat16" if self.device == "cuda" else "float32")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device is cuda, but torch finds no CUDA here; take cpu, or a torch built for CUDA")
        if not hasattr(self, "runs"):  # of several runs each one says
            self.as_trained(getattr(self, "model", None))

    def as_trained(self, source: str | None):
        """Flags that were not given are those of the run that made `source`; one that differs from them is said."""
        if source == "runs/warmup" and not Path(source).exists():
            raise InputError("runs/warmup does not exist: run `python warmup.py` first, or name a model with --model")
        if source:
            check_checkpoint(source)
        trained = read_json(file) if source and (file := Path(source, "run.json")).exists() else {}
        defaults = {"task": None if source else "toy", "engine": "nl", "prompt_style": "auto"}
        if self.task in (None, trained.get("task")):  # another task has other problems and lengths
            defaults |= {"data": None, "test_data": None, "max_new_tokens": None}
        for name in [name for name in defaults if name in trained and name != "max_new_tokens"]:
            if getattr(self, name, None) not in (None, then := trained[name]):
                print(f"{source} was trained with --{name.replace('_', '-')} {then} (here: {getattr(self, name)})")
        self.fill_in({name: trained.get(name, default) for name, default in defaults.items()})
        if self.task is None:
            raise InputError(f"{source} does not say what it was trained on: name a --task, one of {', '.join(TASKS)}")
        self.max_new_tokens = self.max_new_tokens or {"toy": 64, "toy-long": 128}.get(self.task, 400)
        if self.engine == "python":
            execute(["def solution(): return 1"], self.unsafe_exec)  # refused here, not after an hour of training
        if self.task in TOY_STEPS and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # two gain a small model little, and on a busy CPU they wait for each other

    def fill_in(self, defaults: dict):
        """Flags that were not given take these values."""
        vars(self).update({name: x for name, x in defaults.items() if getattr(self, name, None) is None})

    def sampling(self, model: Decoder) -> dict:
        """What `sample` needs to know of the flags and of the model's tokenizer; any id serves as padding."""
        ids = {"eos_id": model.eos_ids, "pad_id": model.eos_ids[0]}
        return ids | {"max_new_tokens": self.max_new_tokens, "max_rows": self.max_rows}


@dataclass
class NestedConfig(SharedConfig):
    """Flags of the scripts that leave out layers, eq. (2)."""

    skip_ratio: float = flag(0.25, "share of the layers that the behavior model mu skips")
    skip_layers: str | None = flag(None, "among which: inner, cheap, or a list like 3,5,7 (toy: inner, else cheap)")

    def __post_init__(self):
        super().__post_init__()
        self.skip_layers = self.skip_layers or ("inner" if self.task in TOY_STEPS else "cheap")
        if not re.fullmatch(r"inner|cheap|\d+(,\d+)*", self.skip_layers):
            raise InputError(f"--skip-layers is {self.skip_layers}, it must be inner, cheap, or numbers like 3,5,7")


def run_script(main, config_class, parser: HfArgumentParser | None = None):
    """Run a stage. Bad input, no memory, a failed save: one line, exit code 2. Bad numbers, a failed log: 1."""
    parser = parser or HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help lists the flags\n")
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # -1e-5 is a number, too
    try:
        with process_group():
            main(config_class(**vars(parser.parse_args())))
    except (InputError, OSError, FloatingPointError) as error:
        parser.exit(2 if isinstance(error, InputError) else 1, f"error: {error}\n")
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, on the CPU a plain one
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        less = "lower --micro-batch, --max-rows or --max-new-tokens, or train with --gradient-checkpointing"
        parser.exit(2, f"error: out of memory; {less}\n")
    except KeyboardInterrupt:
        parser.exit(130)


@dataclass
class Config(NestedConfig):
    """Flags of rollout.py, which shows what mu writes beside pi."""

    model: str = flag("runs/warmup", "directory or hub id")
    test_limit: int | None = flag(64, "how many test problems")
    seed: int = flag(0, "seed of the mask and of the samples")


def main(config: Config) -> dict[str, tuple[Grades, float, float]]:
    """Print what each layer is worth and what pi and mu write; returns grades, tokens/s and exact KL per token of both."""
    model = load(config.model, config.device, config.dtype)
    problems = load_problems(config.task, "test", config.test_data, config.test_limit, config.engine)
    prompts, num_layers = encode_prompts(problems, model, config, config.max_new_tokens), len(model.layers)
    results, skip = {}, torch.zeros(num_layers, dtype=torch.bool)
    for name in ("pi", "mu"):
        sampling = config.sampling(model) | {"skip": skip, "seed": config.seed}
        sample(model, prompts[:8], **sampling)  # warms up
        started = time.perf_counter()
        rollout = sample(model, prompts, **sampling)
        speed = int(rollout.action_mask.sum()) / (time.perf_counter() - started)
        kl = nested_kl(model, rollout.pairs(), skip[None]).item()
        results[name] = grade(rollout, problems, model, config), speed, kl
        if name == "pi":
            worth = nested_kl(model, rollout.pairs()[:MEASURED], torch.eye(num_layers) > 0).tolist()
            model.hf_config.layer_kl = getattr(model.hf_config, "layer_kl", worth)  # that of the warm-up, if any
            pool = skip_pool(model, round(config.skip_ratio * num_layers), config)
            skip = sample_skip(num_layers, config.skip_ratio, torch.Generator().manual_seed(config.seed), pool)
    print("KL(mu||pi) per token without one layer:")
    for layer, (kl, skipped) in enumerate(zip(worth, skip.tolist(), strict=True)):
        print(f"{layer:5} {kl:9.4f} {'left out by mu ' * skipped}{'#' * round(60 * kl / max(worth))}")
    for n, problem in enumerate(problems[:4]):
        print(f"--- {problem.question} (gold: {problem.answer})")
        for name, (grades, _, _) in results.items():
            print(f"{name}, reward {grades.rewards[n]:g}: {grades.texts[n]!r}")
    print(f"--- {len(problems)} problems; mu leaves out layers {skip.nonzero().flatten().tolist()} of {num_layers}")
    for name, (grades, speed, kl) in results.items():
        accuracy = grades.outcomes.count("right") / len(problems)
        print(f"{name}: accuracy {accuracy:.3f}, {speed:,.0f} tokens/s, KL({name}||pi) {kl:.4f} per token")
    return results


if __name__ == "__main__":
    run_script(main, Config)
