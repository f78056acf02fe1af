"""Stage 2a: sample completions from the nested behavior model mu, eq. (2), and grade them, eq. (3).

mu is the policy with the layers of `skip` left out, in prefill and in decode alike. So log mu of a
finished completion equals one masked forward pass over it. A row of a Rollout, and what rl.py makes
of it, for a prompt of 3 tokens and a completion of 2 tokens and EOS:

    column                0    1    2    3    4    5    6    7
    tokens       (N, T)   x0   x1   x2   a0   a1   EOS  pad  pad    prompt_lens = 3, lengths = 6
    action_mask  (N, T-1) .    .    T    T    T    .    .           True at column t: token t+1 was
                                                                    sampled, EOS included
    logp_behav   (N, T-1) 0    0    l0   l1   l2   0    0           l_t = log mu(a_t | s_t)
    values       (N, T-1)           V0   V1   V2                    V_phi(s_t), before a_t is chosen
    rewards      (N, T-1)           k0   k1   k2+r                  eq. (4): k_t the KL penalty
    advantages   (N, T-1)           A0   A1   A2                    eq. (6), and R_t of eq. (7)
"""

import argparse
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser

from model import (
    Decoder,
    Pairs,
    all_gather,
    all_reduce,
    check_checkpoint,
    encode_chats,
    process_group,
    rank,
    read_json,
    unsharded,
    world_size,
)
from reward import (
    TASKS,
    TOY_STEPS,
    InputError,
    Problem,
    judge,
    load_problems,
    make_prompt,
)
from sandbox import execute, judge_result


@dataclass(frozen=True)
class Rollout:
    """Completions of one batch, ordered prompt by prompt; drawn at the top of this file."""

    tokens: Tensor  # (N, T) int64: prompt, completion, padding
    prompt_lens: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64: prompt and completion, EOS included
    action_mask: Tensor  # (N, T-1) bool
    logp_behav: Tensor  # (N, T-1), 0 where no token was sampled
    finished: Tensor  # (N,) bool: ended by EOS, not cut at max_new_tokens
    skip: Tensor | None  # (num_layers,) bool: the mask of mu

    def pairs(self) -> Pairs:
        """The N (prompt, completion) pairs of token ids, EOS included."""
        spans = zip(
            self.tokens.tolist(), self.prompt_lens.tolist(), self.lengths.tolist(), strict=True
        )
        return [(row[:start], row[start:end]) for row, start, end in spans]


def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(a | s) = logit[a] - logsumexp(logits); logits: (..., vocab), tokens: (...)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability; logits: (R, vocab), uniform: (R,) in [0, 1).

    From the full softmax: with top-k or top-p mu would lose support, and no ratio could correct it.
    Temperature 0 is greedy; its log-probability is that at temperature 1.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    probs = logits.softmax(-1)  # (R, vocab)
    if temperature == 0:
        tokens = logits.argmax(-1)  # (R,)
    else:
        # Invert the CDF at the uniform number; in fp32 rounding would move the borders.
        cdf = probs.cumsum(-1, dtype=torch.float64)  # (R, vocab)
        point = uniform * cdf[:, -1]  # (R,)
        tokens = torch.searchsorted(cdf, point[:, None], right=True).squeeze(-1)  # (R,)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # rounding, or nan, may point past the last
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()  # token_logp, up to rounding


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
    """Complete every prompt `num_samples` times under mu: a_t ~ mu(. | s_t), eq. (2).

    prompts: lists of token ids. eos_id: one id, several, or [] for none. skip: (num_layers,) bool.
    seed: one int, or one a prompt. max_rows: so many rows run at a time, which bounds the memory.
    The noise is one uniform number per (seed, prompt, sample, position). So, up to rounding,
    completions depend neither on max_rows, nor on a row's neighbours, nor on how many processes
    share the rows.
    """
    # One block around the loop keeps the bf16 copies of the weights from step to step.
    with unsharded(model), model.mixed_precision():
        sampler = Sampler(
            model, prompts, max_new_tokens, eos_id, pad_id, num_samples, temperature, skip, seed,
            max_rows,
        )  # fmt: skip
        with torch.inference_mode(), sampler.bar:
            while sampler.waiting or sampler.live:
                sampler.admit()  # waiting rows take free slots: prefill, and their first token
                sampler.step()  # one more token for every live row
                sampler.retire()  # rows that have ended give their slots back
    return sampler.rollout()


# ---- the engine of `sample` ----------------------------------------------------------------------

PREFILL = 32  # prompts of one prefill
REFILL = 7 / 8  # rows are admitted when an eighth of the slots is free: a small prefill is slow
LOOK_EVERY = 16  # steps on a GPU between looks for ended rows, each of which waits for the GPU


class Sampler:
    """The N rows of a batch, and slots for those at work.

    Row n is sample n % num_samples of prompt n // num_samples.

    There is one row more than N: idle slots point at it. T is that of the longest prompt and
    max_new_tokens, and there is one column more: a row that has ended goes on writing behind its
    end, in column T at most, until it is retired.
    """

    def __init__(
        self, model, prompts, max_new_tokens, eos_id, pad_id, num_samples, temperature, skip, seed,
        max_rows,
    ):  # fmt: skip
        longest = max(map(len, prompts), default=0)
        if not longest or not all(prompts):
            raise ValueError("sample() needs at least one prompt, and no empty one")
        if longest + max_new_tokens > model.config.max_positions:
            length = f"{longest} prompt tokens + {max_new_tokens} new ones"
            raise ValueError(f"{length} > context {model.config.max_positions}")
        self.model = model
        self.temperature = temperature
        self.pad_id = pad_id
        self.num_samples = num_samples
        self.skip = None if skip is None else skip.cpu()  # is read on the host
        self.device = device = model.device

        # Rows: what each says so far, which token is EOS, and the noise that draws the tokens.
        rows = [torch.tensor(prompt) for prompt in prompts for _ in range(num_samples)]
        N, T = len(rows), longest + max_new_tokens
        rows.append(torch.tensor([pad_id]))  # row N
        tokens = pad_sequence(rows, batch_first=True, padding_value=pad_id)  # (N + 1, longest)
        tokens = F.pad(tokens, (0, max_new_tokens + 1), value=pad_id)
        self.tokens = tokens.to(device)  # (N + 1, T + 1)
        logp_dtype = torch.promote_types(model.embed.weight.dtype, torch.float32)
        self.logp_behav = torch.zeros(
            tokens.shape, dtype=logp_dtype, device=device
        )  # (N + 1, T + 1)
        self.prompt_lens = torch.tensor([len(row) for row in rows], device=device)  # (N + 1,)
        self.lengths = self.prompt_lens.clone()  # (N + 1,), grows
        self.limits = self.prompt_lens + max_new_tokens  # (N + 1,)
        self.is_done = torch.zeros(N + 1, dtype=torch.bool, device=device)
        eos = torch.tensor([eos_id] if isinstance(eos_id, int) else eos_id, dtype=torch.int64)
        self.is_eos = torch.isin(torch.arange(model.config.vocab_size), eos).to(device)  # (vocab,)
        noise = torch.zeros(tokens.shape, dtype=torch.float64)  # in fp32 tokens would share numbers
        seeds = prompt_seeds(seed, len(prompts)) if isinstance(seed, int) else seed
        for n in range(N):
            rng = np.random.default_rng((seeds[n // num_samples], n % num_samples))
            start = len(rows[n])
            noise[n, start : start + max_new_tokens] = torch.tensor(rng.random(max_new_tokens))
        self.noise = noise.to(device)  # (N + 1, T + 1)

        # Slots: the first `live` ones are at work on rows `slot_rows`; `cache` holds their keys.
        slots = min(max_rows or N, N)
        self.live = 0
        self.slot_rows = torch.full((slots,), N, device=device)  # (slots,)
        self.cache = model.new_cache(slots, T, self.skip)
        # Prompts in the order of their lengths have little padding among them in a prefill.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        mine = order[rank() :: world_size()]  # the prompts that this process completes
        self.waiting = [i * num_samples + j for i in mine for j in range(num_samples)]
        self.graphed_decode = graphed(self.decode) if device.type == "cuda" else None
        self.bar = tqdm(
            total=len(self.waiting), desc="sample", leave=False, delay=10, disable=rank() > 0
        )

    def emit(self, hidden, n):
        """Draw the next token of rows n, (R,); hidden: (R, d), at the last token of each."""
        column = self.lengths[n]  # (R,)
        action, logp = draw(self.model.logits(hidden), self.noise[n, column], self.temperature)
        self.tokens[n, column] = action  # a_t ~ mu(. | s_t), eq. (2)
        self.logp_behav[n, column] = logp  # log mu(a_t | s_t)
        self.lengths[n] += ~self.is_done[n]  # a row that is done stays as it is
        self.is_done[n] |= self.is_eos[action] | (self.lengths[n] == self.limits[n])

    def admit(self):
        """Waiting rows take free slots. A prompt runs once; its keys are copied to its samples."""
        while self.waiting and self.live <= REFILL * len(self.slot_rows):
            free = len(self.slot_rows) - self.live
            count = min(free, PREFILL * self.num_samples, len(self.waiting))
            n = torch.tensor(self.waiting[:count], device=self.device)  # (count,)
            prompts, copies = (n // self.num_samples).unique(return_inverse=True)
            columns = int(self.prompt_lens[n].max())
            cache = self.model.new_cache(len(prompts), columns, self.skip)
            tokens = self.tokens[prompts * self.num_samples, :columns]  # (prompts, columns)
            hidden = self.model(tokens, self.skip, cache)  # (prompts, columns, d)
            slots = slice(self.live, self.live + count)
            self.slot_rows[slots] = n
            self.cache[:, :, slots, :, :columns] = cache[:, :, copies]
            self.waiting = self.waiting[count:]
            self.live += count
            self.emit(hidden[copies, self.prompt_lens[n] - 1], n)

    def step(self):
        """Decode: on a GPU several times, at few sizes, for each of which a graph is captured."""
        if self.graphed_decode is None:
            longest = int(self.lengths[self.slot_rows[: self.live]].max())
            self.decode(self.live, longest)
            return
        power_of_two = 1 << (self.live - 1).bit_length()
        for _ in range(LOOK_EVERY):
            self.graphed_decode(min(len(self.slot_rows), power_of_two), self.cache.shape[4])

    def decode(self, slots, columns):
        """A token for each of the first slots. Reads no value back: a CUDA graph can hold it."""
        n = self.slot_rows[:slots]  # (slots,)
        last = self.lengths[n, None] - 1  # (slots, 1)
        cache = self.cache[:, :, :slots, :, :columns]
        hidden = self.model(self.tokens[n[:, None], last], self.skip, cache, last)  # (slots, 1, d)
        self.emit(hidden[:, 0], n)

    def retire(self):
        """Ended rows leave; the last live slots move into the holes, so the first ones are live."""
        is_ended = self.is_done[self.slot_rows[: self.live]]  # (live,)
        stay = self.live - int(is_ended.sum())
        if stay == self.live:
            return
        holes = is_ended[:stay].nonzero()[:, 0]
        movers = stay + (~is_ended[stay:]).nonzero()[:, 0]
        self.slot_rows[holes] = self.slot_rows[movers]
        self.cache[:, :, holes] = self.cache[:, :, movers]
        self.slot_rows[stay : self.live] = len(self.tokens) - 1  # row N
        self.bar.update(self.live - stay)
        self.live = stay

    def rollout(self):
        """The rollout of all rows; each process has filled in its share of them."""
        is_mine = self.is_done[:-1]  # (N,): all of ours are done, and none of another process
        tokens = all_reduce(self.tokens[:-1] * is_mine[:, None])  # (N, T + 1)
        logp_behav = all_reduce(self.logp_behav[:-1] * is_mine[:, None])  # (N, T + 1)
        lengths = all_reduce(self.lengths[:-1] * is_mine)  # (N,)
        prompt_lens = self.prompt_lens[:-1]  # (N,)
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0]  # (N,)
        T = int(lengths.max())
        column = torch.arange(T, device=self.device)  # (T,)
        is_written = column < lengths[:, None]  # (N, T): by length, never by id
        action_mask = (is_written & (column >= prompt_lens[:, None]))[:, 1:]  # (N, T-1)
        logp_behav = logp_behav[:, 1:T].masked_fill(~action_mask, 0)  # (N, T-1)
        tokens = tokens[:, :T].masked_fill(~is_written, self.pad_id)  # (N, T)
        finished = self.is_eos[last]  # (N,)
        return Rollout(tokens, prompt_lens, lengths, action_mask, logp_behav, finished, self.skip)


def prompt_seeds(seed, count):
    """A seed for each prompt, which it keeps when a batch is split among calls or processes."""
    return np.random.SeedSequence(seed).generate_state(count, np.uint64).tolist()


def graphed(decode):
    """`decode` as a CUDA graph for each size: one launch in place of hundreds.

    A graph keeps the addresses of its tensors, so they are written to and never replaced.
    """
    graphs, pool = {}, torch.cuda.graph_pool_handle()  # one pool of memory for all graphs

    def replay(*size: int):
        if size in graphs:
            graphs[size].replay()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode(*size)  # warms up, and is the step asked for: capturing computes nothing
        torch.cuda.current_stream().wait_stream(stream)
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size], pool=pool):
            decode(*size)

    return replay


# ---- prompts -------------------------------------------------------------------------------------

SYSTEM_PROMPTS = {  # nl: that of Qwen2.5-Math-Instruct; the one for programs is ours
    "nl": "Please reason step by step, and put your final answer within \\boxed{}.",
    "python": "Write a Python function solution() that returns the answer. "
    "Reply with the function alone.",
}


def load_split(config: "SharedConfig", split: str) -> list[Problem]:
    """The problems of --data ("train") or --test-data ("test")."""
    path, limit = config.test_data, config.test_limit
    if split == "train":
        path, limit = config.data, config.limit
    return load_problems(config.task, split, path, limit, config.engine)


def encode_prompts(
    problems: list[Problem], model: Decoder, config: "SharedConfig"
) -> list[list[int]]:
    """Token ids of every prompt: of a chat where `is_chat` says so, else of ReFT's prompt."""
    if not is_chat(model, config):
        ids_of_x = model.tokenizer("x").input_ids
        first = ids_of_x.index(model.encode(["x"])[0][0])
        bos_ids = ids_of_x[:first]  # what stands before any text; an EOS behind it is left away
        return [bos_ids + ids for ids in model.encode([make_prompt(p) for p in problems])]
    system = SYSTEM_PROMPTS[config.engine]
    try:
        chats = [[("system", system), ("user", problem.question)] for problem in problems]
        return encode_chats(model.tokenizer, chats)
    except InputError:  # a template without that role
        chats = [[("user", f"{system}\n\n{problem.question}")] for problem in problems]
        return encode_chats(model.tokenizer, chats)


def is_chat(model, config):
    """Whether prompts are a chat; auto: where the model's template ends a turn with an EOS."""
    if config.prompt_style == "reft":
        return False
    can_chat = turn_end(model) is not None
    if config.prompt_style == "chat" and not can_chat:
        reason = "no chat template ends answers with an EOS of --model"
        raise InputError(f"--prompt-style is chat, but {reason}; take reft")
    return can_chat


def turn_end(model):
    """The EOS with which the chat template ends an answer. None: a base model."""
    if not model.tokenizer.chat_template:
        return None
    # Templates do not tell how an answer ends: render one and look for its last EOS.
    turns = [("user", "1 + 1?"), ("assistant", "2")]
    ids = encode_chats(model.tokenizer, [turns], prompt=False)[0]
    return next((token for token in reversed(ids) if token in model.eos_ids), None)


def fitting(rows: list[list[int]], model: Decoder, new_tokens: int, is_training: bool) -> list[int]:
    """Indices of the rows that fit: `new_tokens` more in the context, every id in the embedding.

    Training leaves the others out and says how many; of test problems each has to fit (InputError).
    """
    context = model.config.max_positions - new_tokens
    vocab = model.config.vocab_size
    kept = [n for n, row in enumerate(rows) if len(row) <= context and max(row) < vocab]
    if len(kept) < len(rows):
        fault = (
            f"{len(rows) - len(kept)} of {len(rows)} problems exceed the {context} tokens that the "
            f"model's context and --max-new-tokens leave, or its embedding"
        )
        if not kept or not is_training:
            raise InputError(fault)
        print(f"left out: {fault}")
    return kept


# ---- grading -------------------------------------------------------------------------------------

# What becomes of a completion; the last three are for programs only.
OUTCOMES = ("right", "wrong", "no_answer", "cut", "error", "timeout", "killed")


class Grades(NamedTuple):
    """What N completions say, and what became of them; `reward_of` makes eq. (3) of it."""

    texts: list[str]
    answers: list[str | None]  # canonical text of each final answer
    outcomes: list[str]  # one of OUTCOMES each


def grade(
    rollout: Rollout, problems: list[Problem], model: Decoder, config: "SharedConfig"
) -> Grades:
    """Read and judge completions in words, or run programs. One that was cut has no answer."""
    texts = completion_texts(rollout, model)
    num_samples = len(texts) // len(problems)
    is_finished = rollout.finished.tolist()
    results = iter(())
    if config.engine == "python":
        programs = [text for text, ended in zip(texts, is_finished, strict=True) if ended]
        # The first process runs them, on all cores; so every process sees the same results.
        ran = execute(programs, config.unsafe_exec) if rank() == 0 else None
        results = iter(all_gather(ran)[0])
    answers, outcomes = [], []
    for n, text in enumerate(texts):
        problem = problems[n // num_samples]
        expected = problem.answer, config.task, problem.options
        outcome, answer = "cut", None
        if is_finished[n] and config.engine == "nl":
            outcome, answer = judge(text, *expected)
        elif is_finished[n]:
            outcome, answer = next(results)  # "ok", or what went wrong
            if outcome == "ok":
                outcome = judge_result(answer, *expected)
        answers.append(answer)
        outcomes.append(outcome)
    return Grades(texts, answers, outcomes)


def completion_texts(rollout, model):
    """The N completions as text, without the EOS at their end."""
    rows = []
    for _, ids in rollout.pairs():
        if ids[-1] in model.eos_ids:
            ids = ids[:-1]
        # An embedding may have more rows than there are tokens; decoding would drop such an id.
        rows.append([i if i < len(model.tokenizer) else model.eos_ids[0] for i in ids])
    return model.tokenizer.batch_decode(rows)


# ---- flags and scripts ---------------------------------------------------------------------------


class Terminal:
    """A stream whose reader may leave: `| tee` ends at the Ctrl-C that asks a run to save."""

    def __init__(self, stream):
        stream.reconfigure(errors="replace")  # characters that the terminal does not have
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write, if somebody reads."""
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        """Flush, if somebody reads."""
        with suppress(OSError):
            self.stream.flush()


class Help(str):
    """A line of --help that carries the range of its number: argparse takes no other metadata."""


def flag(default, text: str, low: float = -inf, high: float = inf):
    """A field of a Config: its default, its line in --help, and the range of its number."""
    if default is not None and not isinstance(default, bool):
        text = f"{text} (default: {default})"
    text = Help(text)
    text.low, text.high = low, high
    return field(default=default, metadata={"help": text})


MAX_SEED = 2**63 - 1


@dataclass
class SharedConfig:
    """Flags that mean the same in every script."""

    task: Literal[TASKS] | None = flag(
        None, "which problems (default: those of the run that made --model; else toy)"
    )
    test_data: str | None = flag(
        None, "test problems: a file or hub id (default: the run's, or the usual ones)"
    )
    test_limit: int | None = flag(None, "use only the first so many test problems", low=1)
    engine: Literal["nl", "python"] | None = flag(
        None, "python: programs (default: the run's, or nl: natural language)"
    )
    prompt_style: Literal["auto", "reft", "chat"] | None = flag(
        None, "default: the run's, or auto: a chat for chat models"
    )
    unsafe_exec: bool = flag(
        False, "run model-written programs even where the system cannot hold them back"
    )
    max_new_tokens: int | None = flag(
        None, "longest completion in tokens (toy: 64, toy-long: 128, else 400: ReFT's)", low=1
    )
    max_rows: int = flag(
        512, "completions sampled at a time; lower it to save memory, the samples stay", low=1
    )
    device: Literal["cpu", "cuda"] | None = flag(None, "default: cuda where there is one")
    dtype: Literal["float32", "float64", "bfloat16"] | None = flag(
        None, "default: bfloat16 on cuda, else float32"
    )

    takes_one_model = True  # else each of several models is asked for what it was trained on

    def __post_init__(self):
        """Check ranges before anything is read or written, then fill in what was not given."""
        for item in fields(self):
            check_range(item.name, getattr(self, item.name), item.metadata.get("help"))
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = self.dtype or ("bfloat16" if self.device == "cuda" else "float32")
        if self.device == "cuda" and not torch.cuda.is_available():
            reason = "torch finds no CUDA here"
            raise InputError(f"--device is cuda, but {reason}; take cpu, or a torch built for CUDA")
        if self.takes_one_model:
            self.inherit(self.model)

    def inherit(self, source):
        """Flags that were not given: those of the run that made `source`, else defaults.

        Then sets the threads, and refuses programs where they cannot be held back.
        """
        trained = {}
        if source is not None:
            check_checkpoint(source)
            file = Path(source, "run.json")
            trained = read_json(file) if file.exists() else {}
        names = ["engine", "prompt_style"]
        if self.task in (None, trained.get("task")):  # another task has other problems and lengths
            names += ["task", "data", "test_data", "max_new_tokens", "skip_with"]
        self.fill_in({name: trained.get(name) for name in names})
        if self.task is None and source is not None:
            tasks = ", ".join(TASKS)
            raise InputError(f"{source} does not say its task: name a --task, one of {tasks}")
        self.fill_in({"task": "toy", "engine": "nl", "prompt_style": "auto"})
        lengths = {"toy": 64, "toy-long": 128}
        self.fill_in({"max_new_tokens": lengths.get(self.task, 400)})
        if self.engine == "python":
            # Refused here, where programs cannot be held back, and not after an hour of training.
            execute(["def solution(): return 1"], self.unsafe_exec)
        if self.task in TOY_STEPS and "OMP_NUM_THREADS" not in os.environ:
            # Two take a quarter less time; beside a busy process 3 times as long, once 86 times.
            torch.set_num_threads(1)

    def fill_in(self, defaults):
        """Flags that were not given take these values."""
        for name, value in defaults.items():
            if getattr(self, name, None) is None:
                setattr(self, name, value)

    def sampling(self, model):
        """What `sample` needs to know of flags and tokenizer; any id serves as padding."""
        return {
            "eos_id": model.eos_ids,
            "pad_id": model.eos_ids[0],
            "max_new_tokens": self.max_new_tokens,
            "max_rows": self.max_rows,
        }


def flag_name(name):
    """--skip-ratio of skip_ratio."""
    return f"--{name.replace('_', '-')}"


def check_range(name, value, text):
    """InputError for a number outside of the range of its flag, and for an empty text."""
    if value == "":
        raise InputError(f"{flag_name(name)} is empty; give it a value or leave it out")
    if isinstance(value, int | float) and not text.low <= value <= min(
        text.high, sys.float_info.max
    ):
        span = f"between {text.low:g} and {text.high:g}"
        raise InputError(f"{flag_name(name)} is {value}, it must be {span}")


def run_script(main, config_class, parser=None):
    """Run a stage; an error is one line.

    Exit code 2: bad input, no memory, a failed save. 1: bad numbers, other errors of files.
    """
    sys.stdout = Terminal(sys.stdout)
    sys.stderr = Terminal(sys.stderr)
    parser = parser or new_parser(config_class)
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help lists the flags\n")
    try:
        with process_group():
            main(config_class(**vars(parser.parse_args())))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    except (OSError, FloatingPointError) as error:
        parser.exit(1, f"error: {error}\n")
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; on the CPU a plain one is raised.
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        flags = "--micro-batch, --max-rows or --max-new-tokens"
        advice = f"lower {flags}, or train with --gradient-checkpointing"
        parser.exit(2, f"error: out of memory; {advice}\n")
    except KeyboardInterrupt:
        parser.exit(130)


def new_parser(config_class):
    """A parser of the fields of a Config; a typo is an error, and -1e-5 is a number."""
    formatter = partial(argparse.HelpFormatter, max_help_position=30, width=100)
    parser = HfArgumentParser(config_class, allow_abbrev=False, formatter_class=formatter)
    parser._negative_number_matcher = re.compile(r"-[.\d]")
    return parser
