"""Stage 2a: sample completions from the nested behavior model mu, eq. (2).

mu is the policy with the layers of `skip` left out, in prefill and in decode alike, so that log mu of a finished completion
equals one masked forward pass over it. One row of a Rollout, a prompt of 3 tokens and a completion of 2 tokens and EOS:

    column               0    1    2    3    4    5    6    7
    tokens      (N, T)   x0   x1   x2   a0   a1  EOS  pad  pad      prompt_lens = 3, lengths = 6
    action_mask (N, T-1)  .    .    T    T    T    .    .           True at column t: token t+1 was sampled, EOS too
    logp_behav  (N, T-1)  0    0   mu(a0) mu(a1) mu(EOS)  0    0    log mu(a_t | s_t), recorded while sampling

Run as a script it measures what skipping layers buys and what it costs:

    python rollout.py --model runs/warmup --skip-ratios 0 0.125 0.25 0.5
    python rollout.py --bench               beside transformers' generate() and the limit of the machine
    python rollout.py --keep-correct FILE   right completions of the training problems, for warmup.py --data FILE
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser

from model import Decoder, load, sample_skip, write_json
from processes import gather, gathered, process_group, rank, world_size
from reward import TASKS, InputError, Problem, extract_answer, load_problems, make_prompt, score, to_row
from sandbox import execute, score_number


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

    def completions(self, tokenizer) -> list[str]:
        """The N sampled texts, without special tokens."""
        spans = zip(self.tokens.tolist(), self.prompt_lens.tolist(), self.lengths.tolist(), strict=True)
        return tokenizer.batch_decode([row[start:end] for row, start, end in spans], skip_special_tokens=True)


def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(a | s) = logit[a] - logsumexp(logits). logits: (..., vocab), at least fp32; tokens: (...)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability from the full softmax: no top-k, no top-p, or mu would lose support.

    logits: (R, vocab); uniform: (R,) float64 in [0, 1), inverted through the cumulative distribution.
    Temperature 0 is greedy, with the log-probability at temperature 1.
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


def uniforms(seed: int, sample_index: int, count: int) -> Tensor:
    """The noise of one completion: (count,) float64 in [0, 1), one number a position."""
    return torch.from_numpy(np.random.default_rng((seed, sample_index)).random(count))


PREFILL = 32  # prompts of one prefill; sorted by length, they have little padding among them
LOOK_EVERY = {"cuda": 16}  # steps between looks for ended rows; each makes the host wait for a GPU. Elsewhere: 1


@contextlib.contextmanager
def out_of_memory(advice: str):
    """Running out of memory, on the GPU or the CPU, becomes one line that names the flag to turn."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise InputError(f"out of memory: {advice}") from error


@out_of_memory("sampling did not fit; lower --max-rows or --max-new-tokens")
@torch.no_grad()
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
    on a row's neighbours.
    """
    device, longest = model.embed.weight.device, max(map(len, prompts), default=0)
    if not longest or not all(prompts):
        raise ValueError("sample() needs at least one prompt, and no empty one")
    if longest + max_new_tokens > model.config.max_positions:
        raise ValueError(f"{longest} prompt tokens + {max_new_tokens} new ones > context {model.config.max_positions}")
    seeds = prompt_seeds(seed, len(prompts)) if isinstance(seed, int) else seed
    eos = torch.tensor([eos_id] if isinstance(eos_id, int) else eos_id, dtype=torch.int64)
    is_eos = torch.isin(torch.arange(model.config.vocab_size), eos).to(device)  # (vocab,)

    # N rows and T columns, and one more of each for what nobody reads: what an empty slot or an ended row still draws
    N, T = len(prompts) * num_samples, longest + max_new_tokens
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=pad_id)
    tokens = F.pad(tokens.repeat_interleave(num_samples, 0), (0, max_new_tokens + 1, 0, 1), value=pad_id).to(device)
    dtype = torch.promote_types(model.embed.weight.dtype, torch.float32)
    logp_behav = torch.zeros(N + 1, T + 1, dtype=dtype, device=device)  # in the column of its token, for now
    noise = torch.zeros(N + 1, T + 1, dtype=torch.float64)
    for n in range(N if temperature > 0 else 0):
        i, first = n // num_samples, len(prompts[n // num_samples])
        noise[n, first : first + max_new_tokens] = uniforms(seeds[i], n % num_samples, max_new_tokens)
    noise = noise.to(device)
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(num_samples)
    lengths, finished = prompt_lens.clone(), torch.zeros(N, dtype=torch.bool, device=device)

    # a slot works on one row: its newest token stands in column `newest`, its last one in column `end`, once there is one
    slots, R, every = min(max_rows or N, N), 0, LOOK_EVERY.get(device.type, 1)  # slots 0..R-1 are taken
    row = torch.full((slots,), N, device=device)
    newest, limit, end = torch.zeros(3, slots, dtype=torch.int64, device=device)  # limit: the last column it may fill
    mask = None if skip is None else skip.cpu()  # read at every step
    cache = model.new_cache(slots, T, mask)

    def emit(hidden: Tensor, taken: slice):
        """Draw the next token of some slots; hidden: (slots taken, d) at their newest tokens."""
        column = newest[taken] + 1
        cell = row[taken], column
        action, logp = draw(model.logits(hidden), noise[cell], temperature)
        tokens[cell], logp_behav[cell] = action, logp
        ends = (is_eos[action] | (column == limit[taken])) & (end[taken] == 0)
        end[taken] = torch.where(ends, column, end[taken])
        newest[taken] = column.clamp(max=T - 1)

    def step(rows: int, width: int):
        """A token for each of the first `rows` slots. It reads no value back, so that a CUDA graph can hold it."""
        column = newest[:rows, None]  # (rows, 1)
        token = tokens[row[:rows, None], column]  # (rows, 1)
        emit(model(token, mask, cache[:, :, :rows, :, :width], column)[:, 0], slice(rows))

    decode = graphed(step) if device.type == "cuda" else step
    queue = prefilled(model, prompts, num_samples, mask)
    # one autocast around all steps, so that the weights are cast to bf16 once a rollout and not once a token
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=model.autocast):
        while True:
            # 1. waiting rows take the free slots, several at a time
            arrivals = list(islice(queue, slots - R)) if R <= 0.875 * slots else []
            if arrivals:
                taken = slice(R, R + len(arrivals))
                row[taken] = torch.tensor([n for n, _, _ in arrivals], device=device)
                newest[taken] = prompt_lens[row[taken]] - 1
                limit[taken], end[taken] = newest[taken] + max_new_tokens, 0
                for slot, (_, _, prompt_cache) in enumerate(arrivals, R):
                    cache[:, :, slot, :, : prompt_cache.shape[3]] = prompt_cache
                emit(torch.stack([hidden for _, hidden, _ in arrivals]), taken)
                R = taken.stop
            if R == 0:
                break

            # 2. rows that have ended leave, and the last slots move into the holes
            ended = end[:R] > 0
            if ended.any():
                n, last = row[:R][ended], end[:R][ended]
                lengths[n], finished[n] = last + 1, is_eos[tokens[n, last]]
                stay = R - len(n)
                holes, movers = ended[:stay].nonzero()[:, 0], stay + (~ended[stay:]).nonzero()[:, 0]
                for state in (row, newest, limit, end):
                    state[holes] = state[movers]
                cache[:, :, holes] = cache[:, :, movers]
                row[stay:R] = N
                R = stay

            # 3. the others decode; on a GPU in few sizes, for each of which a graph is captured
            if R > 0:
                few = min(slots, 1 << (R - 1).bit_length()), T
                size = few if every > 1 else (R, int(newest[:R].max()) + 1)
                for _ in range(every):
                    decode(*size)

    column = torch.arange(int(lengths.max()), device=device)  # (T,) from here on
    action_mask = (column >= prompt_lens[:, None]) & (column < lengths[:, None])  # by length, never by id
    tokens = tokens[:N, : len(column)].masked_fill(column >= lengths[:, None], pad_id)
    action_mask = action_mask[:, 1:]  # column t speaks of the token at t + 1
    logp_behav = logp_behav[:N, 1 : len(column)].masked_fill(~action_mask, 0)
    return Rollout(tokens, prompt_lens, lengths, action_mask, logp_behav, finished, skip)


def prefilled(
    model: Decoder, prompts: list[list[int]], num_samples: int, skip: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every row, short prompts first: its number, its hidden state (d,) at the last prompt token, the cache of its prompt.

    A prompt runs once for all its samples, PREFILL prompts at a time, when their turn comes.
    """
    device = model.embed.weight.device
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for group in (by_length[start : start + PREFILL] for start in range(0, len(prompts), PREFILL)):
        tokens = pad_sequence([torch.tensor(prompts[i]) for i in group], batch_first=True).to(device)  # (U, width)
        cache = model.new_cache(*tokens.shape, skip)
        hidden = model(tokens, skip, cache)  # (U, width, d)
        for u, i in enumerate(group):
            end = len(prompts[i])
            for n in range(i * num_samples, (i + 1) * num_samples):
                yield n, hidden[u, end - 1], cache[:, :, u, :, :end]


def graphed(step: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`step` as a CUDA graph for each size it is called with: one launch in place of hundreds, each longer than its kernel.

    A graph keeps addresses: `step` must read and write the same tensors at every call, and reads no value back.
    """
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


@contextlib.contextmanager
def layers_in(model: Decoder, dtype: str | None):
    """Inside, the layers compute in `dtype` (None: as before). Weights, head and softmax keep theirs."""
    before = model.autocast
    model.autocast = before if dtype is None else dtype == "bfloat16"
    try:
        yield
    finally:
        model.autocast = before


@torch.no_grad()
def sampling_gap(model: Decoder, rollout: Rollout) -> Tensor:
    """log mu as recorded while sampling less log mu of one masked forward pass, (actions,): what --rollout-dtype costs."""
    gaps = []
    for n, length in enumerate(rollout.lengths.tolist()):  # one by one: (actions, vocab) can be large
        tokens, mask = rollout.tokens[n : n + 1, :length], rollout.action_mask[n : n + 1, : length - 1]
        logits = model.logits(model(tokens, rollout.skip)[:, :-1][mask])  # (actions, vocab)
        gaps.append(rollout.logp_behav[n : n + 1, : length - 1][mask] - token_logp(logits, tokens[:, 1:][mask]))
    return torch.cat(gaps)


def sample_together(
    model: Decoder, prompts: list[list[int]], *, pad_id: int, seed: int = 0, skip: Tensor | None = None, **options
) -> Rollout:
    """`sample`, where every process completes its share of the prompts and receives all rows, in their order."""
    first, end = (len(prompts) * number // world_size() for number in (rank(), rank() + 1))
    seeds = prompt_seeds(seed, len(prompts))[first:end]
    share = None
    with gathered(model):
        if first < end:  # there may be fewer prompts than processes
            share = sample(model, prompts[first:end], pad_id=pad_id, seed=seeds, skip=skip, **options)
    if world_size() == 1:
        return share
    parts = gather({name: x.cpu() for name, x in vars(share).items() if name != "skip"} if share else None)
    parts = [part for part in parts if part]

    def join(name: str) -> Tensor:
        rows = [part[name] for part in parts]
        if rows[0].dim() == 2:  # (n, T) of each process, to the longest T
            T, padding = max(x.shape[1] for x in rows), pad_id if name == "tokens" else 0
            rows = [F.pad(x, (0, T - x.shape[1]), value=padding) for x in rows]
        return torch.cat(rows).to(model.embed.weight.device)

    return Rollout(**{name: join(name) for name in parts[0]}, skip=skip)


# the system prompt of Qwen2.5-Math-Instruct; for programs it is ours
SYSTEM_PROMPTS = {
    "nl": "Please reason step by step, and put your final answer within \\boxed{}.",
    "python": "Write a Python function solution() that returns the answer. Reply with the function alone.",
}


def turn_end(tokenizer, eos_ids: list[int]) -> int | None:
    """The EOS with which the chat template ends an answer. None where it ends otherwise, or where there is no template.

    Then the model is a base model: some carry a template that they were not trained on (Qwen2.5), with another EOS.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
    return next((token for token in reversed(ids) if token in eos_ids), None)


def is_chat(tokenizer, eos_ids: list[int], config: "SharedConfig") -> bool:
    """Whether prompts are a chat: --prompt-style, where it is "auto" what the checkpoint was trained on."""
    if config.prompt_style == "chat" and not tokenizer.chat_template:
        raise InputError("--prompt-style is chat, but the tokenizer has no chat template; take auto or reft")
    return config.prompt_style == "chat" or (config.prompt_style == "auto" and turn_end(tokenizer, eos_ids) is not None)


def encode_prompts(
    problems: list[Problem],
    tokenizer,
    model: Decoder,
    eos_ids: list[int],
    config: "SharedConfig",
    max_new_tokens: int | None = None,
) -> list[list[int]]:
    """Token ids of every prompt, in the style that `is_chat` finds, with the special tokens that belong in front.

    InputError names the first problem that leaves no room for max_new_tokens (default: those of config) in the context.
    """
    max_new_tokens = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if is_chat(tokenizer, eos_ids, config):
        system = {"role": "system", "content": SYSTEM_PROMPTS[config.engine]}
        chats = [[system, {"role": "user", "content": problem.question}] for problem in problems]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        prompts = tokenizer(texts, add_special_tokens=False).input_ids  # the template writes BOS itself
    else:
        prompts = tokenizer([make_prompt(problem) for problem in problems]).input_ids
    room = model.config.max_positions - max_new_tokens
    for number, (prompt, problem) in enumerate(zip(prompts, problems, strict=True), 1):
        if len(prompt) > room:
            raise InputError(
                f"problem {number} ({problem.question[:40]!r}...) has {len(prompt)} tokens: the model's context of "
                f"{model.config.max_positions} less {max_new_tokens} new ones holds {room}; leave it out"
            )
        if max(prompt) >= model.config.vocab_size:
            token = tokenizer.convert_ids_to_tokens(max(prompt))
            raise InputError(f"problem {number}: its prompt holds {token!r}, which is not in the model's embedding")
    return prompts


class Grades(NamedTuple):
    """What N completions say and earn."""

    texts: list[str]
    answers: list[str | None]  # canonical text of each final answer
    outcomes: list[str]  # one of OUTCOMES each
    rewards: Tensor  # (N,), eq. (3)


OUTCOMES = ("right", "wrong", "no_answer", "cut", "error", "timeout", "killed")  # the last three: programs only


def grade(rollout: Rollout, problems: list[Problem], tokenizer, config: "SharedConfig") -> Grades:
    """Rewards, eq. (3), of completions in words or of programs. One that was cut has no answer: reward 0."""
    texts = rollout.completions(tokenizer)
    num_samples = len(texts) // len(problems)
    finished = rollout.finished.tolist()
    if config.engine == "python":
        programs = [text for text, done in zip(texts, finished, strict=True) if done]
        # by one process: its programs have all cores, and everybody sees the same results
        ran = iter(gather(execute(programs, config.unsafe_exec) if rank() == 0 else [])[0])
    answers, outcomes, rewards = [], [], []
    for n, (text, done) in enumerate(zip(texts, finished, strict=True)):
        problem = problems[n // num_samples]
        status, answer, reward = "cut", None, 0.0
        if done and config.engine == "python":
            status, answer = next(ran)
            if status == "ok":
                reward = score_number(answer, problem.answer, config.task, problem.options)  # eq. (3)
        elif done:
            status, answer = "ok", extract_answer(text, config.task, problem.options)
            reward = score(text, problem.answer, config.task, problem.options)  # eq. (3)
        answers.append(answer)
        outcomes.append({1.0: "right", 0.1: "wrong", 0.0: "no_answer"}[reward] if status == "ok" else status)
        rewards.append(reward)
    return Grades(texts, answers, outcomes, torch.tensor(rewards, device=rollout.tokens.device))


def make_folder(name: str) -> Path:
    """The folder of --out, made and tried out before any work goes into what it is to hold."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from error


def print_table(header: list, rows: list[list]):
    """Columns aligned on the right, the first one on the left."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))


# ---- flags ----------------------------------------------------------------------------------------------------------


def flag(default, text: str):
    """A field of a Config: its default and its line in --help."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text})


@dataclass
class SharedConfig:
    """Flags that mean the same in every script."""

    task: str = flag("toy", f"one of {', '.join(TASKS)}")
    test_data: str | None = flag(None, "test problems: a JSON file or hub id (default: the task's usual data set)")
    limit: int | None = flag(None, "use only the first so many problems of each split")
    engine: str = flag("nl", "chains of thought: nl (natural language) or python (programs)")
    prompt_style: str = flag("auto", "reft, chat (the tokenizer's chat template), or auto: chat for chat models")
    unsafe_exec: bool = flag(False, "run model-written programs even where the system cannot hold them back")
    max_new_tokens: int | None = flag(None, "longest completion in tokens (default: 64 for toy, else 400)")
    max_rows: int = flag(512, "completions sampled at a time; lower it to save memory, the samples stay")
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")
    dtype: str | None = flag(None, "float32, float64 or bfloat16 (default: bfloat16 on cuda, else float32)")

    def __post_init__(self):
        check(self, "task", self.task is None or self.task in TASKS, f"one of {', '.join(TASKS)}")
        check(self, "limit", self.limit is None or self.limit >= 1, "at least 1")
        check(self, "engine", self.engine in (None, "nl", "python"), "nl or python")
        check(self, "prompt_style", self.prompt_style in (None, "auto", "reft", "chat"), "auto, reft or chat")
        if self.engine == "python":
            execute(["def solution(): return 1"], self.unsafe_exec)  # refused here, not after an hour of training
        check(self, "dtype", self.dtype in (None, "float32", "float64", "bfloat16"), "float32, float64 or bfloat16")
        if (
            self.max_new_tokens is None and self.task is not None
        ):  # ReFT: 700 tokens of which at most 300 are the prompt
            self.max_new_tokens = 64 if self.task == "toy" else 400
        check(self, "max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1")
        check(self, "max_rows", self.max_rows >= 1, "at least 1")


def check(config, name: str, holds: bool, rule: str):
    """A value out of range ends the program before anything is read or written."""
    if not holds:
        raise InputError(f"--{name.replace('_', '-')} is {getattr(config, name)}, it must be {rule}")


def run_script(main, config_class, parser: HfArgumentParser | None = None):
    """Run a stage with the flags of its dataclass. A typo or bad input ends it with one line and exit code 2.

    Numbers that went bad and a disk that cannot be written end it with one line and exit code 1.
    """
    parser = parser or HfArgumentParser(config_class, allow_abbrev=False)
    try:
        config = config_class(**vars(parser.parse_args()))
        with process_group():
            main(config)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- what skipping buys and costs -----------------------------------------------------------------------------------


@dataclass
class Config(SharedConfig):
    """Flags of rollout.py."""

    model: str = flag("runs/warmup", "directory or hub id")
    out: str = flag("runs/rollout", "folder of rollout.json and rollout.png")
    skip_ratios: list[float] = flag([0.0, 0.125, 0.25, 0.5], "shares of all layers to skip")
    limit: int | None = flag(None, "problems of one round (default: 128), or of --keep-correct (default: all)")
    keep_correct: str | None = flag(None, "FILE: write the right completions of the training problems to it instead")
    data: str | None = flag(
        None, "training problems of --keep-correct: a JSON file or hub id (default: the usual ones)"
    )
    samples: int = flag(1, "completions a problem of --keep-correct, at temperature 1")
    rounds: int = flag(6, "timed rounds a ratio, each with a mask of its own")
    rollout_dtype: str | None = flag(None, "float32 or bfloat16: what the layers sample in (default: as --dtype)")
    bench: bool = flag(False, "compare sample() with transformers generate() and with the limit of the machine instead")
    shapes: list[str] = flag(["toy", "140m"], "random models of --bench, among toy, 140m, 1.5b")
    seed: int = flag(0, "seed of masks and sampling")

    def __post_init__(self):
        if self.limit is None and self.keep_correct is None:
            self.limit = 128
        super().__post_init__()
        check(self, "samples", self.samples >= 1, "at least 1")
        check(self, "data", self.data is None or self.keep_correct is not None, "left out without --keep-correct")
        check(self, "skip_ratios", all(0 <= ratio < 1 for ratio in self.skip_ratios), "between 0 and 1")
        check(self, "seed", self.seed >= 0, "at least 0")
        check(self, "rounds", self.rounds >= 1, "at least 1")
        check(self, "rollout_dtype", self.rollout_dtype in (None, "float32", "bfloat16"), "float32 or bfloat16")
        check(self, "shapes", {*self.shapes} <= {"toy", "140m", "1.5b"}, "among toy, 140m, 1.5b")


def main(config: Config) -> list[dict] | dict:
    """Per skip ratio: tokens/s, speed-up, KL(mu||pi) per token and the accuracy of mu. The ratios take turns."""
    if config.bench:
        from bench import bench  # it imports this file

        return bench(config)
    model, tokenizer, eos_ids = load(config.model, config.device, config.dtype)
    if config.keep_correct is not None:
        return keep_correct(model, tokenizer, eos_ids, config)
    problems = load_problems(config.task, "test", config.test_data, config.limit, config.engine)
    prompts, layers = encode_prompts(problems, tokenizer, model, eos_ids, config), len(model.layers)
    ratios = sorted({0.0, *config.skip_ratios})  # the full model is what the others are compared with
    out = make_folder(config.out)
    sums = {ratio: torch.zeros(4, dtype=torch.float64) for ratio in ratios}  # seconds, tokens, KL, right
    for round_ in tqdm(range(config.rounds + 1), desc="rounds", unit="round"):
        for ratio in ratios:
            skip = sample_skip(layers, ratio, torch.Generator().manual_seed(config.seed + round_))
            started = time.perf_counter()
            with layers_in(model, config.rollout_dtype):
                rollout = sample(
                    model,
                    prompts,
                    max_new_tokens=config.max_new_tokens,
                    eos_id=eos_ids,
                    pad_id=eos_ids[0],
                    skip=skip,
                    seed=config.seed + round_,
                    max_rows=config.max_rows,
                )
            seconds = time.perf_counter() - started
            right = grade(rollout, problems, tokenizer, config).outcomes.count("right")
            if round_ > 0:  # the first round warms up
                kl = 0.0
                for row, length in enumerate(rollout.lengths.tolist()):  # one by one: (actions, vocab) can be large
                    mask = rollout.action_mask[row : row + 1, : length - 1]
                    kl += exact_kl_behav(model, rollout.tokens[row : row + 1, :length], mask, skip).sum().item()
                sums[ratio] += torch.tensor([seconds, rollout.action_mask.sum(), kl, right], dtype=torch.float64)
    results = []
    for ratio, total in sums.items():
        seconds, tokens, kl, right = total.tolist()
        skipped = round(ratio * layers)
        results.append(
            {
                "skip_ratio": ratio,
                "layers_skipped": skipped,
                "tokens_per_second": tokens / seconds,
                "speed_up": tokens / seconds / (sums[0.0][1] / sums[0.0][0]).item(),
                "ideal_speed_up": layers / (layers - skipped),
                "kl_behav": kl / tokens,
                "accuracy": right / (config.rounds * len(problems)),
            }
        )
    header = ["skip ratio", "layers skipped", "tokens/s", "speed-up", "ideal", "KL(mu||pi)/token", "accuracy of mu"]
    formats = ("{:g}", "{}", "{:.0f}", "{:.2f}", "{:.2f}", "{:.4f}", "{:.3f}")
    print_table(header, [[f.format(v) for f, v in zip(formats, r.values(), strict=True)] for r in results])
    draw_ratios(out, results)
    return results


def keep_correct(model: Decoder, tokenizer, eos_ids: list[int], config: Config) -> dict:
    """Offline self-training (ReFT, section 4.2): right completions of the training problems, rows in ReFT's schema.

    Duplicates are left out, and so is what `to_row` cannot turn into a row. Returns the counts.
    """
    problems = load_problems(config.task, "train", config.data, config.limit, config.engine)
    prompts = encode_prompts(problems, tokenizer, model, eos_ids, config)
    seeds, size = prompt_seeds(config.seed, len(problems)), max(1, config.max_rows // config.samples)
    counts, seen = dict.fromkeys(("sampled", "right", "duplicates", "kept"), 0), set()  # seen: (problem, text)
    make_folder(str(Path(config.keep_correct).parent))
    with open(config.keep_correct, "w", encoding="utf-8") as file, layers_in(model, config.rollout_dtype):
        for first in tqdm(range(0, len(problems), size), desc="keep correct", unit="batch"):
            part = slice(first, first + size)
            rollout = sample(
                model,
                prompts[part],
                max_new_tokens=config.max_new_tokens,
                eos_id=eos_ids,
                pad_id=eos_ids[0],
                num_samples=config.samples,
                seed=seeds[part],
                max_rows=config.max_rows,
            )
            grades = grade(rollout, problems[part], tokenizer, config)
            for n, (text, outcome) in enumerate(zip(grades.texts, grades.outcomes, strict=True)):
                i = first + n // config.samples
                counts["sampled"] += 1
                if outcome != "right":
                    continue
                counts["right"] += 1
                if (i, text) in seen:
                    counts["duplicates"] += 1
                elif row := to_row(problems[i], text, config.task, config.engine, f"{config.task}_{i}"):
                    counts["kept"] += 1
                    file.write(json.dumps(row) + "\n")
                seen.add((i, text))
    print(
        f"{config.keep_correct}: {counts['kept']} of {counts['right']} right completions ({counts['sampled']} sampled); "
        f"{counts['duplicates']} came twice; the others have their answer neither in a box nor plainly in ReFT's last line"
    )
    return counts


@torch.no_grad()
def exact_kl_behav(
    model: Decoder, tokens: Tensor, mask: Tensor, skip: Tensor | None, log_pi: Tensor | None = None
) -> Tensor:
    """KL(mu || pi) at every state that mu visited, exact over the vocabulary, (actions,).

    tokens: (N, T); mask: (N, T-1); log_pi: (actions, vocab) of the full model where it is known already.
    """
    if skip is None or not skip.any():
        dtype = torch.promote_types(model.embed.weight.dtype, torch.float32)
        return torch.zeros(int(mask.sum()), dtype=dtype, device=tokens.device)
    if log_pi is None:
        log_pi = model.logits(model(tokens)[:, :-1][mask]).log_softmax(-1)  # (actions, vocab)
    log_mu = model.logits(model(tokens, skip)[:, :-1][mask]).log_softmax(-1)  # (actions, vocab)
    return (log_mu.exp() * (log_mu - log_pi)).sum(-1)


def new_figure(panels: int, width: float = 4.0):
    """Panels in rows of three, drawn into a file; needs no screen."""
    from matplotlib.figure import Figure  # half a second that a run without a figure does not pay

    columns, rows = min(panels, 3), -(-panels // 3)
    figure = Figure(figsize=(width * columns, 2.6 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_ratios(out: Path, results: list[dict]):
    """rollout.json and rollout.png: the speed-up beside its ideal, and what the nested models lose."""
    write_json(out / "rollout.json", results)
    figure, panels = new_figure(3)
    ratios = [result["skip_ratio"] for result in results]
    for panel, keys in zip(panels, (("speed_up", "ideal_speed_up"), ("kl_behav",), ("accuracy",)), strict=True):
        for key in keys:
            style = "--" if key.startswith("ideal") else ".-"
            panel.plot(ratios, [result[key] for result in results], style, label=key.replace("_", " "))
        panel.set(xlabel="skip ratio", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(out / "rollout.png", dpi=110)
    print(f"figure: {out / 'rollout.png'}")


# ---- --bench: sample() beside transformers' generate() and beside the limit of the machine --------------------------


if __name__ == "__main__":
    run_script(main, Config)
