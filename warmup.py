"""Stage 1: supervised fine-tuning on chains of thought, eq. (1). Also holds what both training stages share.

    python warmup.py                                            a small decoder from scratch on generated problems (toy)
    python warmup.py --model Qwen/Qwen2.5-0.5B --task gsm8k     a pretrained one on GSM8K

Departure from ReFT: the loss is the token mean over the whole batch, not the mean of sequence means. Layer dropout is ours:
a share of the batches is trained with random inner layers left out, so that nested models stay close to the full one.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast

from evaluate import draw_curves, evaluate, report
from model import Decoder, load, named_in_errors, peak_memory, pick_device, remove_weights, sample_skip, write_json
from processes import collected, gather, like, rank, shard, total, whole, whole_model, world_size
from reward import InputError, Problem, load_problems, make_prompt, make_target
from rollout import (
    SharedConfig,
    check,
    encode_prompts,
    flag,
    is_chat,
    make_folder,
    out_of_memory,
    run_script,
    token_logp,
    turn_end,
)

TOY = {"batch": 32, "lr": 4e-3, "beta2": 0.95, "weight_decay": 0.1, "layer_dropout": 0.5, "epochs": 0.9}
# ReFT, section 4.3
PRETRAINED = {"batch": 48, "lr": 1e-5, "beta2": 0.999, "weight_decay": 0.0, "layer_dropout": 0.0, "epochs": 2.0}
DROPPED_SHARE = 0.25  # layer dropout leaves out a quarter of the layers
BAD_IN_A_ROW = 3  # batches with a loss or gradient that is not finite, before a run gives up
# a run may be resumed with other values of these: they change nothing beyond rounding
FREE_ON_RESUME = {"resume", "out", "device", "micro_batch", "max_rows", "gradient_checkpointing", "save_every"}
FREE_ON_RESUME |= {"eval_every", "unsafe_exec"}
LOGS = ("metrics.jsonl", "samples.txt", "bad_batches.jsonl")
LESS_MEMORY = "a training pass did not fit; lower --micro-batch or add --gradient-checkpointing"


@dataclass
class TrainConfig(SharedConfig):
    """Flags of both training stages."""

    data: str | None = flag(None, "training problems: a JSON file or hub id (default: the task's usual data set)")
    seed: int = flag(0, "seed of weights, data order, skip masks and sampling")
    micro_batch: int = flag(64, "rows of one pass (of each process); lower it to save memory, the gradient stays")
    gradient_checkpointing: bool = flag(
        False, "keep one activation a layer and compute the others again: slower, less memory"
    )
    save_every: int = flag(0, "steps between checkpoints; 0: one at the end")
    eval_every: int = flag(0, "steps between greedy evaluations on the test problems; 0: one at the end")
    resume: bool = flag(False, "go on from the checkpoint in --out, to the bit; start where there is none")

    def __post_init__(self):
        super().__post_init__()
        check(self, "micro_batch", self.micro_batch >= 1, "at least 1")
        check(self, "save_every", self.save_every >= 0, "at least 0")
        check(self, "eval_every", self.eval_every >= 0, "at least 0")
        check(self, "seed", self.seed >= 0, "at least 0")


@dataclass
class Config(TrainConfig):
    """Flags of warmup.py; what is None is filled in from TOY or PRETRAINED."""

    model: str | None = flag(
        None, "directory or hub id to start from (default: a small decoder from scratch, task toy)"
    )
    out: str = flag("runs/warmup", "directory of the run")
    steps: int | None = flag(None, "optimizer steps (default: as many as --epochs needs)")
    epochs: float | None = flag(None, "passes over the problems (toy: 0.9, pretrained: 2)")
    batch: int | None = flag(None, "problems of one optimizer step (toy: 32, pretrained: 48)")
    lr: float | None = flag(
        None, "learning rate: rises over a tenth of the steps, falls to 0 (toy: 4e-3, pretrained: 1e-5)"
    )
    beta2: float | None = flag(None, "AdamW decay of the squared gradient (toy: 0.95, pretrained: 0.999)")
    weight_decay: float | None = flag(None, "AdamW weight decay of the matrices (toy: 0.1, pretrained: 0)")
    layer_dropout: float | None = flag(None, "share of batches with random layers left out (toy: 0.5, pretrained: 0)")

    def __post_init__(self):
        for name, value in (TOY if self.model is None else PRETRAINED).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        check(self, "steps", self.steps is None or self.steps >= 1, "at least 1")
        check(self, "epochs", 0 < self.epochs < math.inf, "above 0, and finite")
        check(self, "batch", self.batch >= 1, "at least 1")
        check(self, "lr", 0 <= self.lr < math.inf, "at least 0, and finite")
        check(self, "beta2", 0 <= self.beta2 < 1, "at least 0 and below 1")
        check(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        check(self, "layer_dropout", 0 <= self.layer_dropout <= 1, "between 0 and 1")
        other = self.model is None or Path(self.out).resolve() != Path(self.model).resolve()
        check(self, "out", other, "another folder than --model")
        check(self, "task", self.model is not None or self.task == "toy", "toy unless --model names a pretrained model")


def main(config: Config) -> dict:
    """Train, evaluate on the test problems, save; returns what evaluation.json holds."""
    # 1. problems (x, e, y) and the model
    problems = load_problems(config.task, "train", config.data, config.limit, config.engine)
    test_problems = load_problems(config.task, "test", config.test_data, config.limit, config.engine)
    without = sum(not problem.cot for problem in problems)
    if without:
        raise InputError(
            f"{without} of {len(problems)} training problems have no chain of thought; warm-up needs one each"
        )
    trainer = start_trainer("warmup", config, fingerprint(problems))
    resumed = trainer["step"] > 0
    if config.model is None and not resumed:
        model, tokenizer, eos_ids = toy_model(config, problems)
    else:
        model, tokenizer, eos_ids = load(config.out if resumed else config.model, config.device, config.dtype)
    model.gradient_checkpointing = config.gradient_checkpointing
    examples = encode_examples(problems, tokenizer, model, eos_ids, config)
    encode_prompts(test_problems, tokenizer, model, eos_ids, config)  # too long? now, not after the training
    num_layers = len(model.layers)
    if config.layer_dropout and not 0 <= round(DROPPED_SHARE * num_layers) <= num_layers - 3:
        raise InputError(
            f"--layer-dropout {config.layer_dropout} needs more than the {num_layers} layers of this model"
        )
    shard(model)
    optimizer = make_optimizer(model, config.weight_decay, config.beta2)
    steps = config.steps or max(1, round(config.epochs * len(problems) / config.batch))
    if resumed:
        load_optimizer(optimizer, trainer.pop("optimizer"))
    out = start_run(config, trainer)

    done, stop = trainer["step"], []  # stop: the signal that asked for the end
    bar = tqdm(range(done + 1, steps + 1), desc="warm-up", unit="step", initial=done, total=steps, disable=rank() > 0)
    for step in until_stopped(bar, trainer, stop):
        started = time.perf_counter()

        # 2. a batch, and for a share of the batches a skip mask
        rng = np.random.default_rng((config.seed, 1, step))
        skip = None
        if rng.random() < config.layer_dropout:
            skip = sample_skip(num_layers, DROPPED_SHARE, torch.Generator().manual_seed(int(rng.integers(2**62))))
        chosen = batch_indices(config.seed, step, config.batch, len(examples))
        batch = [examples[i] for i in chosen]

        # 3. the loss and the update
        ramp, decay = min(1.0, step / (0.1 * steps)), 1 - (step - 1) / steps
        lr = config.lr * ramp * decay
        loss, grad_norm = supervised_step(model, optimizer, batch, lr, config.micro_batch, skip)

        # 4. the records
        seconds = time.perf_counter() - started
        trainer["step"], trainer["seconds"] = step, trainer["seconds"] + seconds
        record = {"step": step, "seconds": trainer["seconds"], "loss": loss, "lr": lr, "grad_norm": grad_norm}
        record["nonfinite_updates"] = int(math.isnan(grad_norm))
        record["tokens_per_second"] = sum(len(prompt) + len(completion) for prompt, completion in batch) / seconds
        record["peak_memory_gb"] = peak_memory(model.embed.weight.device)
        if config.eval_every and step % config.eval_every == 0:
            record["greedy_accuracy"] = evaluate(model, tokenizer, eos_ids, test_problems, config)["greedy_accuracy"]
        append_record(out / "metrics.jsonl", record)
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{record['tokens_per_second']:.0f}", refresh=False)
        note_bad_batch(out, trainer, record, chosen)
        if config.save_every and step % config.save_every == 0 and step < steps and not agree(stop):
            save_checkpoint(out, model, tokenizer, optimizer, trainer)

    # 5. checkpoint, evaluation, figure
    save_checkpoint(out, model, tokenizer, optimizer, trainer)
    leave_if_stopped(out, trainer, stop)
    result = evaluate(model, tokenizer, eos_ids, test_problems, config)
    if rank() == 0:
        write_json(out / "evaluation.json", result)
        draw_curves(out, ("loss", "greedy_accuracy"))
    print(report(result, trainer["seconds"]))
    print(f"checkpoint: {out}    next: {next_command(config)}")
    return result


def next_command(config: Config) -> str:
    """The command for stage 2, with the flags that this run needed."""
    flags = {"model": (config.out, "runs/warmup"), "task": (config.task, "toy"), "engine": (config.engine, "nl")}
    flags["prompt_style"] = (config.prompt_style, "auto")
    flags |= {name: (getattr(config, name), None) for name in ("data", "test_data")}
    words = [f"--{name.replace('_', '-')} {value}" for name, (value, default) in flags.items() if value != default]
    ratio = 0.25 if config.layer_dropout else 0.1  # without layer dropout nested models are much worse
    return " ".join(["python rl.py", f"--skip-ratio {ratio}", *words])


def toy_model(config: Config, problems: list[Problem]) -> tuple[Decoder, PreTrainedTokenizerFast, list[int]]:
    """A decoder of about half a million parameters with new weights, and a tokenizer trained on the problems.

    Byte-level BPE with digits apart, of a few hundred tokens, with ids of its own for padding and EOS.
    """
    bpe = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # no regex: tokens may span words
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    bpe.decoder = decoders.ByteLevel()
    texts = (make_prompt(problem) + make_target(problem, config.engine) for problem in problems[:4000])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=bytes_.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(config.seed)
    model = Decoder(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            intermediate_size=192,
            max_position_embeddings=256,
            initializer_range=0.12,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.autocast = config.dtype == "bfloat16"
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    return model.to(pick_device(config.device), dtype), tokenizer, [tokenizer.eos_token_id]


def encode_examples(
    problems: list[Problem], tokenizer, model: Decoder, eos_ids: list[int], config: SharedConfig
) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, completion with EOS) of every problem; in a chat the EOS is the one that ends a turn."""
    prompts = encode_prompts(problems, tokenizer, model, eos_ids, config, max_new_tokens=0)
    texts = [make_target(problem, config.engine) for problem in problems]
    targets = tokenizer(texts, add_special_tokens=False).input_ids
    chat_end = turn_end(tokenizer, eos_ids) if is_chat(tokenizer, eos_ids, config) else None
    eos_id = eos_ids[0] if chat_end is None else chat_end
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True), 1):
        if len(prompt) + len(target) + 1 > model.config.max_positions:
            raise InputError(
                f"training problem {number} has {len(prompt) + len(target) + 1} tokens with its chain of thought, "
                f"the model's context {model.config.max_positions}; leave it out"
            )
    return [(prompt, [*target, eos_id]) for prompt, target in zip(prompts, targets, strict=True)]


def collate(examples: list[tuple[list[int], list[int]]], device) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (N, T) right-padded, lengths (N,), action_mask (N, T-1) as in Rollout. Any id serves as padding: 0."""
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in examples], device=device)
    starts = torch.tensor([len(prompt) for prompt, _ in examples], device=device)
    rows = [torch.tensor(prompt + completion) for prompt, completion in examples]
    tokens = pad_sequence(rows, batch_first=True).to(device)
    column = torch.arange(1, tokens.shape[1], device=device)
    return tokens, lengths, (column >= starts[:, None]) & (column < lengths[:, None])


# ---- shared with rl.py ----------------------------------------------------------------------------------------------


@out_of_memory(LESS_MEMORY)
def supervised_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    examples: list[tuple[list[int], list[int]]],
    lr: float,
    micro_batch: int,
    skip: Tensor | None = None,
) -> tuple[float, float]:
    """One optimizer step on eq. (1) over (prompt, completion) pairs; returns the loss and the norm of its gradient."""
    tokens, lengths, action_mask = collate(examples, model.embed.weight.device)  # (N, T), (N,), (N, T-1)
    denominator = int(action_mask.sum())  # of the whole batch: the micro-batch size does not change the gradient
    loss_sum = 0.0
    for rows, T in micro_batches(lengths, micro_batch):
        mask = action_mask[rows, : T - 1]  # (n, T-1)
        hidden = model(tokens[rows, :T], skip, lengths=lengths[rows])[:, :-1][mask]  # (actions, d)
        logp = token_logp(model.logits(hidden), tokens[rows, 1:T][mask])  # (actions,): completion positions only
        loss = -logp.sum() / denominator  # eq. (1)
        loss.backward()
        loss_sum += loss.item()
    loss_sum = total(loss_sum)
    return loss_sum, optimizer_step(model, optimizer, lr, loss_sum)


def batch_indices(seed: int, step: int, batch: int, count: int) -> list[int]:
    """The `batch` problems of step 1, 2, ...: every epoch is a new permutation of all `count`, drawn from the seed."""
    first = (step - 1) * batch
    last = first + batch - 1
    epochs = {
        e: np.random.default_rng((seed, 0, e)).permutation(count) for e in range(first // count, last // count + 1)
    }
    return [int(epochs[i // count][i % count]) for i in range(first, first + batch)]


def micro_batches(lengths: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Rows of like length, `size` at a time, and the columns they need.

    Several processes share out the rows of each pass: all make the same number of passes, some of them perhaps without
    a row.
    """
    for rows in lengths.argsort(stable=True).split(size * world_size()):
        yield rows[rank() :: world_size()], int(lengths[rows[-1]])


def make_optimizer(model: Decoder, weight_decay: float = 0.0, beta2: float = 0.999) -> torch.optim.AdamW:
    """AdamW over fp32 (or float64) master weights; biases and norms do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)


def optimizer_step(model: Decoder, optimizer: torch.optim.Optimizer, lr: float, loss: float) -> float:
    """Clip the gradient to norm 1, step, clear; returns the norm before clipping.

    Where the loss or the norm is not finite, no weight and no moment of Adam changes, and the result is nan.
    """
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm if finite else math.nan


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict:
    """The state_dict of one process: every moment in one piece, on the first process."""
    state = optimizer.state_dict()
    moments = {i: {name: collected(x) for name, x in adam.items()} for i, adam in state["state"].items()}
    return state | {"state": moments}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """Read what `optimizer_state` returned; each process keeps its part of the moments."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {name: like(x, parameters[i]) for name, x in adam.items()} for i, adam in state["state"].items()}
    optimizer.load_state_dict(state | {"state": moments})


# ---- runs that survive, shared with rl.py ---------------------------------------------------------------------------


def until_stopped(bar: tqdm, trainer: dict, stop: list[int]) -> Iterator[int]:
    """The steps of `bar` up to its end, or until numbers go bad, or Ctrl-C or SIGTERM comes.

    The signal lets its step finish and goes into `stop`; a second one leaves at once.
    """

    def note(number, frame):
        if stop:
            os._exit(128 + number)
        stop.append(number)
        os.write(2, b"\nstopping after this step; once more to leave at once\n")  # print() is not safe in here

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in bar:
            yield step
            if agree(stop) or trainer["bad_in_a_row"] >= BAD_IN_A_ROW:
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(stop: list[int]) -> bool:
    """Was any process asked to stop? From here on all of them know."""
    heard = [number for numbers in gather(stop) for number in numbers]
    if heard and not stop:
        stop.append(heard[0])
    return bool(heard)  # not `stop`: a signal may have come since


def leave_if_stopped(out: Path, trainer: dict, stop: list[int]):
    """After the last save: end a run that was asked to stop, or whose numbers went bad."""
    if trainer["bad_in_a_row"] >= BAD_IN_A_ROW:
        raise FloatingPointError(
            f"{out}: loss or gradient was not finite in {trainer['bad_in_a_row']} batches in a row, the last one step "
            f"{trainer['step']}; none of them changed a weight. Look at these problems in {out / 'bad_batches.jsonl'} and "
            f"at the weights of --model; then try a lower --lr, or --dtype float32"
        )
    if stop:
        words = [*sys.argv, *(() if "--resume" in sys.argv else ("--resume",))]
        start = "python" if world_size() == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        print(f"stopped after step {trainer['step']}, saved in {out}; go on with: {start} {shlex.join(words)}")
        sys.exit(128 + stop[0])


def fingerprint(problems: list[Problem], reference: Decoder | None = None) -> list[int]:
    """Numbers that change when the problems or the reference's weights do."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}
    weights = (
        (p.detach().view(bits[p.dtype]).sum(dtype=torch.int64) for p in reference.parameters()) if reference else ()
    )
    return [zlib.crc32(repr(problems).encode()), *(int(total) for total in weights)]


def start_trainer(stage: str, config: TrainConfig, marks: list[int], **state) -> dict:
    """What trainer.pt holds: the state of a run besides its weights. `state`: what this stage adds to it.

    With --resume it is read from --out, where there is one, and holds the optimizer too. InputError names the flags that
    differ from those of that run, and says so if the data or the reference weights (`marks`) do.
    """
    file, now = Path(config.out) / "trainer.pt", asdict(config)
    new = {"stage": stage, "config": now, "marks": marks, "step": 0, "seconds": 0.0, "bad_in_a_row": 0, **state}
    if not config.resume:
        return new
    if not file.exists():
        print(f"nothing to resume in {config.out}: starting from the beginning")
        return new
    with named_in_errors(file):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["stage"] != stage:
            raise InputError(f"{file}: written by {saved['stage']}.py; {stage}.py cannot resume it")
        before, step = saved["config"], saved["step"]
    free = FREE_ON_RESUME | ({"steps"} if stage == "rl" else set())  # the learning rate of rl.py knows no end
    changed = [name for name in now if name not in free and now[name] != before.get(name)]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')} {now[name]} (there: {before.get(name)})" for name in changed)
        raise InputError(
            f"{config.out}: a run with other flags: {flags}; resume with the same ones or take another --out"
        )
    if stage == "rl" and now["steps"] < step:
        raise InputError(f"--steps is {now['steps']}, but the run in {config.out} has done {step} already")
    if saved["marks"] != marks:
        raise InputError(
            f"{config.out}: the training problems or the weights of --model are not those of this run any more"
        )
    return saved | {"config": now}


def start_run(config: TrainConfig, trainer: dict) -> Path:
    """The folder of a run with run.json in it; its logs are emptied, or cut to what they held at the checkpoint."""
    out = make_folder(config.out)
    if rank() > 0:
        return out
    if trainer["step"] == 0:  # an older run's state must not continue this one
        for file in ((out / "trainer.pt").resolve(), out / "trainer.pt"):
            file.unlink(missing_ok=True)
    for name in LOGS:
        size = trainer.get("log_sizes", {}).get(name, 0)
        if size > ((out / name).stat().st_size if (out / name).exists() else 0):
            raise InputError(f"{out / name}: shorter than it was at the checkpoint; restore it or take another --out")
        if (out / name).exists() or name == "metrics.jsonl":
            with (out / name).open("ab") as file:
                file.truncate(size)
    write_json(out / "run.json", asdict(config))
    return out


def append_record(file: Path, record: dict):
    """One more line of JSON, from the first process; a number that is not finite becomes null."""
    if rank() > 0:
        return
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(finite, allow_nan=False) + "\n")


def note_bad_batch(out: Path, trainer: dict, record: dict, chosen: list[int]):
    """Count batches in a row with an update that was not finite, and write down which problems (from 0) they held."""
    trainer["bad_in_a_row"] = trainer["bad_in_a_row"] + 1 if record["nonfinite_updates"] else 0
    if record["nonfinite_updates"]:
        append_record(out / "bad_batches.jsonl", {"problems": chosen, **record})


def save_checkpoint(out: Path, model: Decoder, tokenizer, optimizer: torch.optim.Optimizer, trainer: dict):
    """Save a run: the first process writes what all of them hold. The files are those of one process."""
    model, moments = whole_model(model), optimizer_state(optimizer)
    if rank() == 0:
        write_checkpoint(out, model, tokenizer, moments, trainer)
    gather(None)  # the others wait for it: torchrun ends all processes when one leaves


def write_checkpoint(out: Path, model: Decoder, tokenizer, moments: dict, trainer: dict):
    """A Hugging Face directory with value_head.pt and trainer.pt, all of it or nothing.

    The files are written to .checkpoints/step-N and brought to the disk. The names in `out` are links into
    .checkpoints/latest, itself a link that moves to the new checkpoint in one rename: whenever the process is killed, `out`
    holds one whole checkpoint. InputError when the disk is full; the previous checkpoint stays.
    """
    store = out / ".checkpoints"
    latest = store / "latest"
    folder = store / f"step-{trainer['step']}"
    try:
        remove_checkpoints(latest)  # what a kill left behind
        if folder.exists():  # the latest one itself
            folder = folder.with_name(f"{folder.name}-again")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        log_sizes = {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()}
        torch.save(trainer | {"optimizer": moments, "log_sizes": log_sizes}, folder / "trainer.pt")
        for path in (*folder.iterdir(), folder, *(out / name for name in log_sizes)):
            flush_to_disk(path)
        if not (out / "model.safetensors").is_symlink():
            remove_weights(out)  # of a checkpoint that is not ours
        for file in folder.iterdir():
            point(out / file.name, f".checkpoints/latest/{file.name}")
        point(latest, folder.name)  # the commit
        flush_to_disk(store)
    except Exception as error:  # OSError, and what torch, safetensors and tokenizers make of it
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{out}: the checkpoint cannot be written ({reason}); one that was saved before stays"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            remove_checkpoints(latest)


def remove_checkpoints(latest: Path):
    """Delete every checkpoint but the one that `latest` points to."""
    for folder in latest.parent.glob("step-*"):
        if folder.resolve() != latest.resolve():
            shutil.rmtree(folder)


def point(link: Path, target: str):
    """Make or move a symbolic link in one rename."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.is_dir() and not link.is_symlink():  # in a copy of a run, links have become what they pointed to
        shutil.rmtree(link)
    new = link.with_name(f"{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)


def flush_to_disk(path: Path):
    """Wait until a file or folder has reached the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


if __name__ == "__main__":
    run_script(main, Config)
