"""Stage 1: supervised fine-tuning on chains of thought, eq. (1). Below: `Run`, of all training.

    python warmup.py                                            a small decoder from scratch (toy)
    python warmup.py --model Qwen/Qwen2.5-0.5B --task gsm8k     a pretrained one on GSM8K

Departure from ReFT: every token of a batch counts the same; its code averages over each sequence,
then over the sequences. Layer dropout is ours: a share of the batches is trained with random layers
left out, so that nested models stay close to the full one.
"""

import fcntl
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import OPTConfig, PreTrainedTokenizerFast

from evaluate import draw_curves, evaluate, make_folder, print_table
from model import (
    FITTED,
    Decoder,
    Pairs,
    all_gather,
    all_reduce,
    barrier,
    empty_maps,
    full_tensor,
    is_measured,
    load,
    measure_layers,
    named_in_errors,
    rank,
    sample_skip,
    shard,
    skip_pool,
    world_size,
    write_json,
)
from reward import (
    ANSWER_LINE,
    TOY_STEPS,
    InputError,
    Problem,
    make_prompt,
    make_target,
)
from rollout import (
    MAX_SEED,
    SharedConfig,
    encode_prompts,
    fitting,
    flag,
    flag_name,
    is_chat,
    load_split,
    run_script,
    token_logp,
    turn_end,
)

TOY = {
    "batch": 32,
    "lr": 6e-3,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "layer_dropout": 0.75,
    "skip_ratio": 0.25,
    "epochs": 0.6,
}
TOY_SHAPE = {  # of an OPT: on a CPU a training step takes .7 of that of a like Llama
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "ffn_dim": 288,
    "enable_bias": False,
    "dropout": 0.0,
    "max_position_embeddings": 256,
}
# batch and lr: ReFT, section 4.3 and appendix B. Its warm-ups have 2 epochs on GSM8K and SVAMP, 5
# (programs: 2) on MathQA with letters, 10 on MathQA with numbers.
PRETRAINED = {
    "batch": 48,
    "lr": 1e-5,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "layer_dropout": 0.0,
    "skip_ratio": 0.07,
    "epochs": 2.0,
}


def supervised_step(
    run: "Run", examples: list, lr: float, skip: Tensor | None = None
) -> tuple[float, float]:
    """One optimizer step on eq. (1); returns the loss and the norm of its gradient.

    examples: (prompt, completion) pairs of token ids. skip: (num_layers,) bool, or None.
    """
    tokens, lengths, action_mask = collate(examples, run.device)  # (N, T), (N,), (N, T-1)
    count = int(action_mask.sum())  # of the whole step: the micro-batch size changes no gradient
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
    for rows, T in micro_batches(lengths, run.config.micro_batch):
        mask = action_mask[rows, : T - 1]  # (n, T-1)
        hidden = run.model(tokens[rows, :T], skip)[:, :-1][mask]  # (actions of these rows, d)
        logits = run.model.logits(hidden)  # (actions, vocab): completion positions only
        logp = token_logp(logits, tokens[rows, 1:T][mask])  # (actions,)
        loss = -logp.sum() / count  # eq. (1)
        loss.backward()
        loss_sum += loss.detach()
    return all_reduce(loss_sum).item(), run.update(lr, loss_sum)


def collate(examples: list, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (N, T) right-padded, lengths (N,), action_mask (N, T-1) as in a Rollout."""
    rows = [torch.tensor(prompt + completion) for prompt, completion in examples]
    tokens = pad_sequence(rows, batch_first=True).to(device)  # (N, T); any id serves as padding
    starts = torch.tensor([len(prompt) for prompt, _ in examples], device=device)  # (N,)
    lengths = torch.tensor([len(row) for row in rows], device=device)  # (N,)
    column = torch.arange(1, tokens.shape[1], device=device)  # (T-1,), of the predicted token
    action_mask = (column >= starts[:, None]) & (column < lengths[:, None])  # (N, T-1)
    return tokens, lengths, action_mask


def learning_rate(config: "Config", step: int, steps: int) -> float:
    """Rises over the first tenth of the steps, then falls to 0 (ReFT, section 4.3)."""
    rise = step / (0.1 * steps)
    fall = (steps + 1 - step) / (0.9 * steps)
    return config.lr * min(1, rise, fall)


def main(config: "Config") -> dict:
    """Train, evaluate on the test problems, save; returns what evaluation.json holds."""
    # 1. problems (x, e, y), the model, and the layers that layer dropout may leave out
    problems = load_split(config, "train")
    if without := sum(not problem.cot for problem in problems):
        count = f"{without} of {len(problems)} training problems"
        raise InputError(f"{count} have no chain of thought; each needs one")
    if config.model is None:
        model = toy_model(config, problems)
    else:
        model = load(config.model, config.device, config.dtype)
    model.value_head.requires_grad_(False)  # stage 1 has no critic
    examples = encode_examples(problems, model, config)
    kept = fitting([prompt + target for prompt, target in examples], model, 0, is_training=True)
    problems, examples = [problems[i] for i in kept], [examples[i] for i in kept]
    check_batch("--batch", config.batch, problems)
    num_layers = len(model.layers)
    pool = nested_pool(model, config, lambda: examples[:FITTED])
    steps = config.steps or max(1, round(config.epochs * len(problems) / config.batch))
    contents = fingerprint(problems, examples, model if config.model else None)
    run = Run("warmup", config, model, contents, steps, config.weight_decay, config.beta2, pool)
    pool = run.state["pool"]  # on --resume that of the checkpoint

    for step in run.steps():
        # 2. a batch, and for a share of the batches a skip mask
        rng = np.random.default_rng((config.seed, 1, step))  # 1: of a step; 0: of `batch_indices`
        skip = None
        if rng.random() < config.layer_dropout:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            skip = sample_skip(num_layers, config.skip_ratio, generator, pool)  # eq. (2)
        chosen = batch_indices(config.seed, step, config.batch, len(examples))
        batch = [examples[i] for i in chosen]

        # 3. the loss and the update
        lr = learning_rate(config, step, steps)
        loss, grad_norm = supervised_step(run, batch, lr, skip)

        # 4. the records; evaluating and saving are not counted as time of training
        seconds = run.stop_clock()
        tokens = sum(len(prompt) + len(completion) for prompt, completion in batch)
        numbers = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / seconds,
        }
        if run.is_evaluation_due(step):
            numbers["greedy_accuracy"] = run.evaluate()["greedy_accuracy"]
        run.record(numbers)
        if run.is_save_due(step):
            run.save()
    ratio = f" --skip-ratio {config.skip_ratio:g}" if config.layer_dropout else ""
    next_command = f"python rl.py{ratio} --model {shlex.quote(config.out)}"
    return run.finish(("loss", "greedy_accuracy"), next_command)


# ---- what surrounds the loop: flags, a new model, token ids --------------------------------------


@dataclass
class TrainConfig(SharedConfig):
    """Flags of every training script."""

    data: str | None = flag(
        None, "training problems: a file or hub id (default: the run's, or the usual ones)"
    )
    limit: int | None = flag(None, "use only the first so many training problems", low=1)
    seed: int = flag(0, "of weights, data order, skip masks and samples", low=0, high=MAX_SEED)
    micro_batch: int = flag(
        16, "rows of one pass of a process; lower it to save memory, the gradient stays", low=1
    )
    gradient_checkpointing: bool = flag(
        False, "keep one activation a layer and compute the others again: less memory"
    )
    save_every: int = flag(
        0, "steps between checkpoints; 0: one every 30 minutes, and one at the end", low=0
    )
    eval_every: int = flag(
        0, "steps between greedy evaluations on the test problems; 0: one at the end", low=0
    )
    resume: bool = flag(False, "go on from the checkpoint in --out; start where there is none")
    skip_layers: str | None = flag(
        None, "layers that may be skipped: inner, cheap, or 3,5,7 (toy: inner, else cheap)"
    )
    skip_with: Literal["identity", "linear"] | None = flag(
        None,
        "what stands in their place (default: that of a run on this task; toy: identity, "
        "else linear)",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task in TOY_STEPS:  # the paper
            self.fill_in({"skip_layers": "inner", "skip_with": "identity"})
        self.fill_in({"skip_layers": "cheap", "skip_with": "linear"})
        if not re.fullmatch(r"inner|cheap|\d+(,\d+)*", self.skip_layers):
            words = "inner, cheap, or numbers like 3,5,7"
            raise InputError(f"--skip-layers is {self.skip_layers}, it must be {words}")


@dataclass
class Flags:
    """Flags of warmup.py itself; what is None is filled in from TOY or PRETRAINED."""

    model: str | None = flag(
        None, "directory or hub id to start from (default: a new small decoder, for toy tasks)"
    )
    out: str = flag("runs/warmup", "directory of the run")
    steps: int | None = flag(None, "optimizer steps (default: as many as --epochs needs)", low=1)
    epochs: float | None = flag(
        None, "passes over the problems (toy: 0.6, toy-long: 0.8, pretrained: 2)", low=1e-9
    )
    batch: int | None = flag(
        None, "problems of one optimizer step (toy: 32, pretrained: 48)", low=1
    )
    lr: float | None = flag(
        None,
        "reached after a tenth of the steps, then falls to 0 (toy: 6e-3, pretrained: 1e-5)",
        low=0,
    )
    layer_dropout: float | None = flag(
        None, "share of batches with layers left out (toy: 0.75, pretrained: 0)", low=0, high=1
    )
    skip_ratio: float | None = flag(
        None,
        "share of layers that they leave out, with --layer-dropout (toy: 0.25, pretrained: 0.07)",
        low=0,
        high=0.99,
    )
    beta2: float | None = flag(
        None,
        "AdamW decay of the squared gradient (toy: 0.95, pretrained: 0.999)",
        low=0,
        high=0.999999,
    )
    weight_decay: float | None = flag(
        None, "AdamW weight decay of the matrices (toy: 0.1, pretrained: 0)", low=0
    )


@dataclass
class Config(TrainConfig, Flags):
    """All flags of warmup.py."""

    def __post_init__(self):
        super().__post_init__()
        if self.model is None and self.task == "toy-long":
            self.fill_in({"epochs": 0.8})
        self.fill_in(TOY if self.model is None else PRETRAINED)
        if self.layer_dropout == 0:
            self.skip_ratio = 0.0
        if self.model is None and self.task not in TOY_STEPS:
            tasks = ", ".join(TOY_STEPS)
            raise InputError(f"--task is {self.task}, without --model it must be one of {tasks}")


def toy_model(config: Config, problems: list[Problem]) -> Decoder:
    """A new decoder of half a million parameters, and a byte-level BPE trained on the problems.

    Its positions are learned: those behind the longest problem of the warm-up stay random.
    """
    bpe = Tokenizer(models.BPE())
    # A number is one token, which keeps chains short; other tokens may span words.
    numbers = pre_tokenizers.Digits(individual_digits=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([numbers, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=byte_level.alphabet(),
    )
    texts = [make_prompt(p) + make_target(p, config.engine) for p in problems[:4000]]
    bpe.train_from_iterator(texts, trainer)
    special_tokens = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special_tokens)
    torch.manual_seed(config.seed)
    model = Decoder(
        OPTConfig(
            **TOY_SHAPE,
            vocab_size=len(tokenizer),
            init_std=0.12,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.autocast = config.dtype == "bfloat16"
    model.tokenizer = tokenizer
    model.eos_ids = [tokenizer.eos_token_id]
    # The name of the class is one that older versions of transformers have, too.
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}
    model.files = {
        "tokenizer.json": bpe.to_str().encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config).encode(),
    }
    return model.to(config.device, torch.float64 if config.dtype == "float64" else torch.float32)


def encode_examples(problems: list[Problem], model: Decoder, config: SharedConfig) -> Pairs:
    """Token ids of (prompt, completion with EOS) of every problem."""
    prompts = encode_prompts(problems, model, config)
    eos_id = model.eos_ids[0]
    targets = problems
    is_turn = is_chat(model, config)
    if is_turn:
        eos_id = turn_end(model)
        if config.engine == "nl":
            targets = [boxed(problem) for problem in problems]
    texts = [make_target(problem, config.engine) for problem in targets]
    # some templates let every answer begin inside of a thought
    if is_turn and model.tokenizer.decode(prompts[0]).rstrip().endswith("<think>"):
        texts = [close_thought(text) for text in texts]
    completions = model.encode(texts)
    return [(prompt, [*ids, eos_id]) for prompt, ids in zip(prompts, completions, strict=True)]


def boxed(problem):
    """The answer in a box, as a chat's system prompt asks: "... the answer is: \\boxed{18}"."""
    cot = problem.cot.partition(ANSWER_LINE)[0]
    return replace(problem, cot=cot, answer=f"\\boxed{{{problem.answer}}}")


def close_thought(target):
    """The chain of thought is the thought, the answer comes behind it; a program is an answer."""
    if "</think>" in target:  # a completion that --keep-correct has kept
        return target
    if ANSWER_LINE in target:
        return target.replace(ANSWER_LINE, f"\n</think>\n{ANSWER_LINE}")
    return f"\n</think>\n\n{target}"


# ---- what both stages need of model and data -----------------------------------------------------


def nested_pool(model: Decoder, config: TrainConfig, get_pairs: Callable) -> list[int]:
    """The layers that mu may skip, see `skip_pool`; they are measured, and get maps, if need be.

    get_pairs: returns (prompt, completion) pairs; called only if there is something to measure.
    InputError for a --skip-ratio or --skip-layers that cannot be.
    """
    num_layers = len(model.layers)
    count = round(config.skip_ratio * num_layers)
    is_cheap = config.skip_layers == "cheap"
    allowed = None if is_cheap else skip_pool(model, count, config.skip_layers)
    sample_skip(num_layers, config.skip_ratio, pool=allowed)  # for its InputError: now, not later
    if config.resume and Path(config.out, "trainer.pt").exists():
        return []  # `Run` takes pool, costs and maps from there
    is_kept = config.skip_ratio > 0 and is_measured(model, config.skip_with)
    if not is_kept:
        # stale: the weights are about to change, or these are of the other kind of skipping
        model.linear_maps = model.hf_config.layer_kl = None
        if config.skip_ratio > 0 and (is_cheap or config.skip_with == "linear"):
            measure_layers(model, get_pairs(), config.skip_with)
    pool = skip_pool(model, count, config.skip_layers)
    return all_gather(pool)[0]  # rounding may differ; all processes must skip the same layers


def check_batch(name, size, problems):
    """InputError for a batch larger than the data, before it takes memory."""
    if size > len(problems):
        raise InputError(f"{name} asks for {size} problems a batch, there are {len(problems)}")


def batch_indices(seed: int, step: int, batch: int, count: int) -> list[int]:
    """The `batch` problems of step 1, 2, ...: every epoch is a new permutation of all `count`."""
    epoch, start = divmod((step - 1) * batch, count)
    # a batch reaches into the next epoch at most, see `check_batch`
    permutations = [np.random.default_rng((seed, 0, epoch + i)).permutation(count) for i in (0, 1)]
    return np.concatenate(permutations)[start : start + batch].tolist()


def micro_batches(lengths: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Rows of like length, `size` at a time, and the columns they need.

    Process r takes every n-th row. All make the same number of passes, some with no rows: FSDP
    gathers weights in every pass, and waits for every process.
    """
    for rows in lengths.argsort(stable=True).split(size * world_size()):
        yield rows[rank() :: world_size()], int(lengths[rows[-1]])


def fingerprint(problems, token_ids, reference):
    """Numbers that change with the problems, with their token ids and with the weights."""
    weights = reference.parameters() if reference else ()
    return {
        "the training problems": [len(problems), zlib.crc32(repr(problems).encode())],
        "their tokens": [zlib.crc32(repr(token_ids).encode())],
        "the weights of --model": [torch.hash_tensor(p).view(torch.int64).item() for p in weights],
    }


# ---- a run: its folder, clock, records, signals and checkpoints ----------------------------------

BAD_STEPS = 3  # in a row with a loss or gradient that is not finite: a run gives up
SAVE_SECONDS = 1800  # between checkpoints without --save-every
REPEAT_SECONDS = 1  # a scheduler and torchrun both pass on one signal: that is no second one
LOGS = ("metrics.jsonl", "samples.txt")
# What a folder may hold before the first checkpoint, and what it must not hold then.
STARTED = (*LOGS, "run.json")
SAVED = (
    "trainer.pt",
    "config.json",
    "*.safetensors",
    "*.bin",
    "value_head.pt",
    "linear_maps.pt",
    "tokenizer*",
    "evaluation.json",
)
# Flags that change nothing but rounding, or where files lie (what they hold is compared), or the
# length of the run. All others stay as they are on --resume.
FREE_ON_RESUME = (
    "out",
    "model",
    "data",
    "test_data",
    "resume",
    "device",
    "save_every",
    "eval_every",
    "micro_batch",
    "max_rows",
    "gradient_checkpointing",
    "unsafe_exec",
    "steps",
    "epochs",
)
UNSHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Run:
    """A model in training and its folder.

    state: plain numbers, of the steps so far and of what was measured; a checkpoint holds them.
    tests: the test problems.
    """

    def __init__(
        self,
        stage,
        config,
        model,
        contents,
        steps,
        weight_decay=0.0,
        beta2=0.999,
        pool=(),
        tests=None,
    ):
        """Go on from --out with --resume; else start. What is refused has written nothing.

        contents: what a resumed run must share, see `fingerprint`. steps: of the whole run. pool:
        of `nested_pool`. tests: what to evaluate on; None: the test problems.
        """
        self.stage = stage
        self.config = config
        self.model = model
        self.last_step = steps
        self.out = Path(config.out)
        self.device = model.device
        prompts = []
        if tests is None:
            tests = load_split(config, "test")
            prompts = encode_prompts(tests, model, config)
            fitting(prompts, model, config.max_new_tokens, is_training=False)
        self.tests = tests
        text = repr((tests, prompts, model.eos_ids))
        self.contents = {**contents, "the test problems": [zlib.crc32(text.encode())]}
        layer_kl = getattr(model.hf_config, "layer_kl", None)
        self.state = {"step": 0, "seconds": 0.0, "bad_steps": 0, "warned": []}
        self.state |= {"pool": pool, "layer_kl": layer_kl}
        self.signal = 0  # the first one to this process that asked for the end
        self.last_save = time.monotonic()
        model.gradient_checkpointing = config.gradient_checkpointing

        make_folder(self.out)
        if rank() == 0:
            lock(self.out.resolve())
        saved = self.open_folder()
        barrier()  # nobody writes before all have looked
        if saved is not None:
            has_maps = "linear_maps.weight" in saved["weights"]
            model.linear_maps = empty_maps(model) if has_maps else None
            model.load_state_dict(saved["weights"])
            self.state = saved["state"]
            model.hf_config.layer_kl = self.state["layer_kl"]
        shard(model)
        self.optimizer = make_optimizer(model, weight_decay, beta2)
        if saved is not None:
            moments = saved["optimizer"]
            set_optimizer_state_dict(model, self.optimizer, moments, options=UNSHARDED)
        if rank() == 0:
            self.cut_logs(saved["log_sizes"] if saved else {})
            write_json(self.out / "run.json", asdict(config))
            if self.state["step"] < steps:  # of weights that are about to change
                (self.out / "evaluation.json").unlink(missing_ok=True)
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{stage}: {size:,} parameters, {self.contents['the training problems'][0]} problems, "
            f"{len(self.tests)} test problems, steps {self.state['step'] + 1} to {steps}, "
            f"{config.dtype} on {config.device}; the flags are in {self.out}/run.json"
        )

    def open_folder(self):
        """The checkpoint to go on from, if any. InputError: --out holds what would be lost."""
        paths = [path for name in (*SAVED, *STARTED) for path in self.out.glob(name)]
        if paths and not self.config.resume:
            raise InputError(
                f"--out {self.out} holds a run or a model ({paths[0].name}): --resume, or name "
                "another folder"
            )
        if (self.out / "trainer.pt").exists():
            return self.read_checkpoint()
        if any(path.name not in STARTED for path in paths):
            raise InputError(
                f"--out {self.out} holds a model and no trainer.pt to resume; name another folder"
            )
        if self.config.resume:
            print(f"nothing to resume in {self.out}: starting from the beginning")
        return None

    def read_checkpoint(self):
        """trainer.pt. InputError names what differs from this run."""
        file = self.out / "trainer.pt"
        flags = asdict(self.config)
        free = {name: flags[name] for name in FREE_ON_RESUME if name in flags}
        with named_in_errors(file):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if saved["stage"] != self.stage:
                raise InputError(
                    f"{file}: written by {saved['stage']}.py; {self.stage}.py cannot resume it"
                )
            # Flags that the run did not have yet take their defaults.
            earlier = asdict(type(self.config)(**{**saved["config"], **free}))
            contents, steps = saved["contents"], saved["steps"]
        differences = [
            f"{flag_name(name)} {flags[name]} (there: {earlier[name]})"
            for name in flags
            if flags[name] != earlier[name]
        ]
        differences += [name for name in self.contents if contents.get(name) != self.contents[name]]
        if differences:
            words = f"of a run with other {', '.join(differences)}"
            raise InputError(f"{file}: {words}; take the same or another --out")
        if self.last_step < steps:
            raise InputError(
                f"{file}: of a run of {steps} steps, --steps {self.last_step} is fewer"
            )
        if self.last_step > steps:
            change = f"{self.last_step} steps in place of {steps}"
            print(f"{change}: the learning rate goes on as in a run of {self.last_step} steps")
        return saved

    def cut_logs(self, sizes):
        """Logs end where they did at the checkpoint, and are empty where there is none."""
        (self.out / "metrics.jsonl").touch()
        for log in self.logs():
            if log.stat().st_size < sizes.get(log.name, 0):
                raise InputError(f"{log}: shorter than at the checkpoint; take another --out")
        for log in self.logs():
            os.truncate(log, sizes.get(log.name, 0))

    def logs(self):
        """The logs that exist."""
        return [self.out / name for name in LOGS if (self.out / name).exists()]

    def steps(self):
        """The steps that are left, until numbers go bad or a signal asks for the end."""
        done = self.state["step"]
        numbers = range(done + 1, self.last_step + 1)
        self.bar = tqdm(numbers, self.stage, self.last_step, initial=done, disable=rank() > 0)
        self.catch_signals()
        is_failed = True
        try:
            for step in self.bar:
                self.started = time.perf_counter()
                self.nonfinite_updates = 0
                yield step
                if self.stop_signal() or self.state["bad_steps"] >= BAD_STEPS:
                    break
            is_failed = False
        finally:
            if is_failed:
                self.release_signals()

    def catch_signals(self):
        """From here to the last file: the first signal asks for the end, a second one leaves."""
        note = (
            "\nstopping as soon as this step or file is done; once more to leave at once: "
            f"{self.out} then has what was saved before, for --resume\n"
        ).encode()

        def on_signal(number, frame):
            if not self.signal:
                self.signal = number
                self.signal_time = time.monotonic()
                with suppress(OSError):  # `| tee` ends at the same Ctrl-C, and the pipe with it
                    os.write(2, note)  # print() is not safe in here
            elif time.monotonic() - self.signal_time >= REPEAT_SECONDS:
                os._exit(128 + number)

        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, on_signal)

    def release_signals(self):
        """Signals do what they did before the run."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop_signal(self):
        """The signal that asked any of the processes to stop, or 0; all get the same answer."""
        return max(all_gather(self.signal))

    def update(self, lr: float, loss: Tensor) -> float:
        """Clip the gradient to norm 1, step, clear; returns the norm before.

        Where the norm or the loss is not finite no weight changes, and nan is returned.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        grad_norm = full_tensor(norm).item()
        is_finite = math.isfinite(grad_norm) and math.isfinite(all_reduce(loss).item())
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.nonfinite_updates += not is_finite
        return grad_norm if is_finite else math.nan

    def stop_clock(self):
        """The seconds of this step so far, which `record` counts as its time."""
        self.seconds = time.perf_counter() - self.started
        return self.seconds

    def is_evaluation_due(self, step):
        """Whether --eval-every asks for an evaluation behind this step."""
        return self.config.eval_every > 0 and step % self.config.eval_every == 0

    def evaluate(self, out=None):
        """Greedy accuracy of the full model on the test problems, as `evaluate.evaluate` has it."""
        return evaluate(self.model, self.tests, self.config, out=out)

    def record(self, numbers: dict, texts: Iterable[str] = (), warnings: Iterable = ()):
        """A line of metrics.jsonl and of the bar; texts: for samples.txt, at steps 1, 6, ...

        warnings: (name, text) pairs; of each name the first text of a run is printed.
        """
        state = self.state
        state["step"] += 1
        state["seconds"] += self.seconds
        state["bad_steps"] = state["bad_steps"] + 1 if self.nonfinite_updates else 0
        line = {
            "step": state["step"],
            "seconds": state["seconds"],
            **numbers,
            "nonfinite_updates": self.nonfinite_updates,
        }
        for name, text in warnings:
            if name not in state["warned"]:
                state["warned"].append(name)
                tqdm.write(f"warning: at step {state['step']} {text}")
        shown = [name for name in ("reward", "accuracy", "loss", "policy_loss") if name in line]
        self.bar.set_postfix({name: f"{line[name]:.3f}" for name in shown}, refresh=False)
        if rank() > 0:
            return
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None  # JSON has no nan
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if texts and state["step"] % 5 == 1:
            with (self.out / "samples.txt").open("a", encoding="utf-8") as file:
                file.writelines(f"--- step {state['step']}, {text}" for text in texts)

    def is_save_due(self, step):
        """Whether a checkpoint is due: not of a step with bad numbers, nor just before the end."""
        if self.config.save_every:
            is_due = step % self.config.save_every == 0
        else:
            is_late = time.monotonic() - self.last_save > SAVE_SECONDS
            is_due = all_gather(is_late)[0]
        is_last = step == self.last_step or self.stop_signal() > 0
        return is_due and not is_last and not self.nonfinite_updates

    def save(self):
        """Write all files beside the old ones, then move them into their places.

        Each is whole, old or new. trainer.pt alone holds all that a resumed run needs. It is
        renamed last; in the first save first: a kill then leaves something to resume.
        """
        # On the first process, whole; the others hold nothing.
        weights, moments = get_state_dict(self.model, self.optimizer, options=UNSHARDED)
        new = self.out / ".new"
        trainer = self.out / "trainer.pt"
        has_checkpoint = trainer.exists()
        if rank() == 0:
            checkpoint = {
                "stage": self.stage,
                "config": asdict(self.config),
                "contents": self.contents,
                "steps": self.last_step,
                "state": self.state,
                "weights": weights,
                "optimizer": moments,
                "log_sizes": {log.name: log.stat().st_size for log in self.logs()},
            }
            try:
                shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
                self.model.save_pretrained(new, weights)
                others = list(new.iterdir())
                torch.save(checkpoint, new / "trainer.pt")
                for file in (*new.iterdir(), *self.logs()):
                    with file.open("rb+") as opened:
                        os.fsync(opened.fileno())
                ours = [new / "trainer.pt"]
                for file in others + ours if has_checkpoint else ours + others:
                    os.replace(file, self.out / file.name)
            except Exception as error:  # OSError, and what torch and safetensors make of it
                reason = " ".join(str(error).split())[:200]
                rest = "the one before stays" if has_checkpoint else "there is none yet"
                raise InputError(f"{self.out}: no checkpoint ({reason}); {rest}") from error
            finally:
                shutil.rmtree(new, ignore_errors=True)
        barrier()  # torchrun ends all processes when one leaves
        self.last_save = time.monotonic()

    def finish(self, curves: tuple[str, ...], next_command: str) -> dict:
        """The last checkpoint, the evaluation and the figure; returns what evaluation.json holds.

        FloatingPointError: numbers went bad, and nothing replaces the last checkpoint.
        """
        try:
            step = self.state["step"]
            if self.state["bad_steps"] >= BAD_STEPS:
                cause = f"{BAD_STEPS} steps in a row, up to {step}, had numbers that are not finite"
                raise FloatingPointError(
                    f"{self.out}: {cause}; try a lower --lr; the last checkpoint stays"
                )
            self.save()
            if not self.stop_signal():
                print(f"checkpoint: {self.out}    next: {next_command}")
                result = self.evaluate(self.out)
                print(f"trained for {self.state['seconds']:.0f} s")
                print_table([result])
                if rank() == 0:
                    draw_curves(self.out, curves)
            if number := self.stop_signal():
                print(f"stopped after step {step}, saved; go on with: {resume_command()}")
                sys.exit(128 + number)
        finally:
            self.release_signals()
        return result


def make_optimizer(model, weight_decay, beta2):
    """AdamW over fp32 (or float64) master weights; biases and norms do not decay."""
    weights = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in weights if p.dim() >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, beta2), fused=True)
    for p in weights:  # also of layers that no step has trained yet, as --resume expects
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


@functools.cache  # a process may take its folder twice
def lock(folder):
    """Keep a folder to this process until it ends, however it ends."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out {folder} is in use by another run: name another folder") from error
    except OSError:
        pass  # some network file systems can lock no folder


def resume_command():
    """The command that goes on with this run."""
    start = "python" if world_size() == 1 else f"torchrun --nproc-per-node {world_size()}"
    words = [word for word in sys.argv if word != "--resume"]
    return f"{start} {shlex.join(words)} --resume"


if __name__ == "__main__":
    run_script(main, Config)
