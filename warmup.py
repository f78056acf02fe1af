"""Stage 1: supervised fine-tuning on chains of thought, eq. (1). Also holds what both training stages share.

    python warmup.py                                            a small decoder from scratch on generated problems (toy)
    python warmup.py --model Qwen/Qwen2.5-0.5B --task gsm8k     a pretrained one on GSM8K

Departure from ReFT: the loss is the token mean over the whole batch, not the mean of sequence means. Layer dropout is ours:
a share of the batches is trained with random layers left out, so that nested models stay close to the full one.
"""

import fcntl
import functools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast

from evaluate import FREE, draw_curves, evaluate, make_folder
from model import MEASURED, Decoder, load, measure_layers, named_in_errors, nested_kl, peak_memory, sample_skip
from model import gather, gathered, rank, shard, total, whole, world_size, write_json
from reward import ANSWER_LINE, TOY_STEPS, InputError, Problem, load_problems, make_prompt, make_target
from rollout import NestedConfig, SharedConfig, check_fit, encode_prompts, flag, is_chat, run_script, skip_pool
from rollout import token_logp, turn_end

TOY = {"batch": 32, "lr": 4e-3, "beta2": 0.95, "weight_decay": 0.1, "layer_dropout": 0.5, "epochs": 0.9}
TOY |= {"skip_ratio": 0.25}
# ReFT, section 4.3 and appendix B: 2 epochs on GSM8K and SVAMP, 5 (programs: 2) on MathQA letters, 10 on MathQA numbers
PRETRAINED = {"batch": 48, "lr": 1e-5, "beta2": 0.999, "weight_decay": 0.0, "layer_dropout": 0.0, "epochs": 2.0}
PRETRAINED |= {"skip_ratio": 0.07}


@dataclass
class TrainConfig(NestedConfig):
    """Flags of both training stages."""

    data: str | None = flag(None, "training problems: a file or hub id (default: the run's, the usual ones)")
    limit: int | None = flag(None, "use only the first so many training problems")
    seed: int = flag(0, "seed of weights, data order, skip masks and sampling")
    micro_batch: int = flag(16, "rows of one pass (of each process); lower it to save memory, the gradient stays")
    gradient_checkpointing: bool = flag(False, "keep one activation a layer, compute the others again: less memory")
    save_every: int = flag(0, "steps between checkpoints; 0: one every 30 minutes, and one at the end")
    eval_every: int = flag(0, "steps between greedy evaluations on the test problems; 0: one at the end")
    resume: bool = flag(False, "go on from the checkpoint in --out, to the bit; start where there is none")


@dataclass
class Config(TrainConfig):
    """Flags of warmup.py; what is None is filled in from TOY or PRETRAINED."""

    model: str | None = flag(None, "directory or hub id to start from (default: a new small decoder, for toy tasks)")
    out: str = flag("runs/warmup", "directory of the run")
    steps: int | None = flag(None, "optimizer steps (default: as many as --epochs needs)")
    epochs: float | None = flag(None, "passes over the problems (toy: 0.9, pretrained: 2)")
    batch: int | None = flag(None, "problems of one optimizer step (toy: 32, pretrained: 48)")
    lr: float | None = flag(None, "reached after a tenth of the steps, then falls to 0 (toy: 4e-3, pretrained: 1e-5)")
    beta2: float | None = flag(None, "AdamW decay of the squared gradient (toy: 0.95, pretrained: 0.999)")
    weight_decay: float | None = flag(None, "AdamW weight decay of the matrices (toy: 0.1, pretrained: 0)")
    layer_dropout: float | None = flag(None, "share of batches with layers left out (toy: 0.5, pretrained: 0)")
    skip_ratio: float | None = flag(None, "share of the layers that they leave out (toy: 0.25, pretrained: 0.07)")

    def __post_init__(self):
        super().__post_init__()
        self.fill_in(TOY if self.model is None else PRETRAINED)
        if self.model is None and self.task not in TOY_STEPS:
            raise InputError(f"--task is {self.task}, without --model it must be one of {', '.join(TOY_STEPS)}")


def main(config: Config) -> dict:
    """Train, evaluate on the test problems, save; returns what evaluation.json holds."""
    # 1. problems (x, e, y) and the model
    problems = load_problems(config.task, "train", config.data, config.limit, config.engine)
    if without := sum(not problem.cot for problem in problems):
        raise InputError(f"{without} of {len(problems)} training problems have no chain of thought; each needs one")
    model = toy_model(config, problems) if config.model is None else load(config.model, config.device, config.dtype)
    model.value_head.requires_grad_(False)  # stage 1 has no critic
    examples, num_layers = encode_examples(problems, model, config), len(model.layers)
    if config.layer_dropout:
        if config.skip_layers == "cheap":
            measure_layers(model, examples[:MEASURED])
        pool = skip_pool(model, round(config.skip_ratio * num_layers), config)
        sample_skip(num_layers, config.skip_ratio, pool=pool)  # refuses to leave out none, or too many
    steps = config.steps or max(1, round(config.epochs * len(problems) / config.batch))
    marks = fingerprint(problems, examples, model if config.model else None)
    run = Run("warmup", config, model, marks, steps, config.weight_decay, config.beta2)

    for step in run.steps():
        # 2. a batch, and for a share of the batches a skip mask
        rng, skip = np.random.default_rng((config.seed, 1, step)), None
        if rng.random() < config.layer_dropout:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            skip = sample_skip(num_layers, config.skip_ratio, generator, pool)  # eq. (2)
        chosen = batch_indices(config.seed, step, config.batch, len(examples))
        batch = [examples[i] for i in chosen]

        # 3. the loss and the update
        lr = config.lr * min(1, step / (0.1 * steps), (steps + 1 - step) / (0.9 * steps))
        loss, grad_norm = supervised_step(run, batch, lr, skip)

        # 4. the records
        tokens = sum(len(prompt) + len(completion) for prompt, completion in batch)
        speed = tokens / (time.perf_counter() - run.started)
        numbers = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        if config.layer_dropout and config.eval_every and step % config.eval_every == 0:
            seeds = [torch.Generator().manual_seed(i) for i in range(8)]
            masks = [sample_skip(num_layers, config.skip_ratio, generator, pool) for generator in seeds]
            with gathered(model):  # KL(mu||pi) per token: how well the model can do without layers by now
                numbers["kl_behav"] = nested_kl(model, examples[:MEASURED], torch.stack(masks)).mean().item()
        run.record(numbers, chosen)
    ratio = f" --skip-ratio {config.skip_ratio:g}" if config.layer_dropout else ""
    then = f"python rl.py{ratio} --model {config.out}"
    return run.finish(("loss", "greedy_accuracy", "kl_behav"), then)


def toy_model(config: Config, problems: list[Problem]) -> Decoder:
    """A new decoder of half a million parameters, and a byte-level BPE, digits apart, trained on the problems."""
    bpe = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # no regex: tokens may span words
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    bpe.decoder = decoders.ByteLevel()
    texts = (make_prompt(problem) + make_target(problem, config.engine) for problem in problems[:4000])
    special = {"special_tokens": ["<pad>", "<eos>"], "initial_alphabet": bytes_.alphabet()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False, **special))
    marks = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **marks)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}  # a name that older transformers know too
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 192}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.12}
    torch.manual_seed(config.seed)
    model = Decoder(LlamaConfig(**sizes, **ids))
    model.autocast, model.tokenizer, model.eos_ids = config.dtype == "bfloat16", tokenizer, [tokenizer.eos_token_id]
    model.files = {"tokenizer.json": bpe.to_str().encode(), "tokenizer_config.json": json.dumps(kind).encode()}
    return model.to(config.device, torch.float64 if config.dtype == "float64" else torch.float32)


def encode_examples(problems: list[Problem], model: Decoder, config: SharedConfig) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, completion with EOS) of every problem; in a chat the EOS is the one that ends a turn."""
    prompts = encode_prompts(problems, model, config, room=0, training=True)
    chat, targets = is_chat(model, config), problems
    if chat and config.engine == "nl":  # as the system prompt asks
        bare = (replace(problem, cot=problem.cot.partition(ANSWER_LINE)[0]) for problem in problems)
        targets = [replace(problem, answer=f"\\boxed{{{problem.answer}}}") for problem in bare]
    targets = model.encode([make_target(problem, config.engine) for problem in targets])
    eos_id = turn_end(model) if chat else model.eos_ids[0]
    examples = [(prompt, [*target, eos_id]) for prompt, target in zip(prompts, targets, strict=True)]
    check_fit([prompt + target for prompt, target in examples], model, 0, True, problems, examples)
    return examples


def collate(examples: list[tuple[list[int], list[int]]], device) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (N, T) right-padded, lengths (N,), action_mask (N, T-1) as in Rollout. Any id serves as padding: 0."""
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in examples], device=device)
    starts = torch.tensor([len(prompt) for prompt, _ in examples], device=device)
    rows = [torch.tensor(prompt + completion) for prompt, completion in examples]
    tokens = pad_sequence(rows, batch_first=True).to(device)
    column = torch.arange(1, tokens.shape[1], device=device)
    return tokens, lengths, (column >= starts[:, None]) & (column < lengths[:, None])


# ---- shared with rl.py ----------------------------------------------------------------------------------------------


def supervised_step(run: "Run", examples: list, lr: float, skip: Tensor | None = None) -> tuple[float, float]:
    """One optimizer step on eq. (1) over (prompt, completion) pairs; returns the loss and the norm of its gradient."""
    tokens, lengths, action_mask = collate(examples, run.model.embed.weight.device)  # (N, T), (N,), (N, T-1)
    denominator = int(action_mask.sum())  # of the whole batch: the micro-batch size does not change the gradient
    loss_sum = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for rows, T in micro_batches(lengths, run.config.micro_batch):
        mask = action_mask[rows, : T - 1]  # (n, T-1)
        hidden = run.model(tokens[rows, :T], skip)[:, :-1][mask]  # (actions, d)
        logp = token_logp(run.model.logits(hidden), tokens[rows, 1:T][mask])  # (actions,): completion positions only
        loss = -logp.sum() / denominator  # eq. (1)
        loss.backward()
        loss_sum += loss.detach()
    return total(loss_sum).item(), run.update(lr, loss_sum)


def batch_indices(seed: int, step: int, batch: int, count: int) -> list[int]:
    """The `batch` problems of step 1, 2, ...: every epoch is a new permutation of all `count`, drawn from the seed."""
    where = [divmod(i, count) for i in range((step - 1) * batch, step * batch)]  # (epoch, place in it)
    epochs = {epoch: np.random.default_rng((seed, 0, epoch)).permutation(count) for epoch, _ in where}
    return [int(epochs[epoch][place]) for epoch, place in where]


def micro_batches(lengths: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Rows of like length, `size` at a time, and the columns they need; a process may get none, but makes the pass."""
    for rows in lengths.argsort(stable=True).split(size * world_size()):
        yield rows[rank() :: world_size()], int(lengths[rows[-1]])


def fingerprint(problems: list[Problem], tokens: list, reference: Decoder | None) -> dict[str, list[int]]:
    """Numbers that change with the problems, with their tokens (tokenizer, template, EOS) and with the weights."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}
    weights = reference.parameters() if reference else ()
    return {
        "the training problems": [len(problems), zlib.crc32(repr(problems).encode())],
        "their tokens": [zlib.crc32(repr(tokens).encode())],
        "the weights of --model": [int(p.detach().view(bits[p.dtype]).sum()) for p in weights],
    }


# ---- a run: resume, records, signals, checkpoints -------------------------------------------------------------------

BAD_IN_A_ROW = 3  # batches with a loss or gradient that is not finite, before a run gives up
SAVE_SECONDS = 1800  # between checkpoints without --save-every
LOGS = ("metrics.jsonl", "samples.txt", "bad_batches.jsonl")
STARTED = (*LOGS, "run.json")  # what a run holds before its first checkpoint
SAVED = ("trainer.pt", "config.json", "*.safetensors", "*.bin", "value_head.pt", "tokenizer*", "evaluation.json")
FREE_ON_RESUME = FREE | {"data", "test_data"}  # what files hold is compared, not where they are
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@functools.cache  # it may take a folder twice
def lock(folder: Path):
    """Keep a folder to this process until it ends, however it ends. Some network file systems can lock no folder."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out {folder} is in use by another run: name another folder") from error
    except OSError:
        pass


class Run:
    """A model in training and its folder. `state`: plain numbers that move from step to step and are saved with it."""

    def __init__(self, stage, config: TrainConfig, model: Decoder, marks, steps, decay=0.0, beta2=0.999, **state):
        """Resume from --out with --resume, where there is a run; else start. What is refused writes nothing."""
        self.config, self.model, self.last, self.out = config, model, steps, Path(config.out)
        self.tests = load_problems(config.task, "test", config.test_data, config.test_limit, config.engine)
        prompts = encode_prompts(self.tests, model, config, config.max_new_tokens)  # too long? now, not at the end
        model.gradient_checkpointing = config.gradient_checkpointing
        marks = marks | {"the test problems": [zlib.crc32(repr((self.tests, prompts, model.eos_ids)).encode())]}
        self.fixed = {"stage": stage, "config": asdict(config), "marks": marks}
        self.state = {"step": 0, "seconds": 0.0, "bad_in_a_row": [], "warned": [], **state}
        make_folder(config.out)
        if rank() == 0:
            lock(self.out.resolve())
        saved = self.read()
        gather(None)  # nobody writes before all have looked
        if saved:
            model.load_state_dict(saved["weights"])
            self.state = saved["state"]
        shard(model)
        # AdamW over fp32 (or float64) master weights; biases and norms do not decay
        weights = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in weights if p.dim() >= 2], "weight_decay": decay}]
        groups += [{"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)
        if saved:
            set_optimizer_state_dict(model, self.optimizer, saved["optimizer"], options=WHOLE)
        if rank() == 0:
            self.cut_logs(saved["log_sizes"] if saved else {})
            write_json(self.out / "run.json", asdict(config))
        self.updates = self.left_out = 0  # of one step; left out: not finite
        self.stop, self.saved = [], time.monotonic()  # the signal that asked for the end; when the last save was
        names = ("task", "device", "dtype", "lr", "layer_dropout", "skip_ratio", "advantage", "correction", "lam")
        flags = "".join(f", {name} {getattr(config, name)}" for name in names if hasattr(config, name))
        style, size = "chat" if is_chat(model, config) else "reft", sum(p.numel() for p in model.parameters())
        print(
            f"{stage}, {config.model or 'a new model'}: {size:,} parameters, {len(model.layers)} layers, {style} prompts"
            f"{flags}; {marks['the training problems'][0]} problems, {len(self.tests)} test problems; "
            f"steps {self.state['step'] + 1} to {steps}, saved in {self.out}"
            f"{'; if a step takes 30 s, give torchrun a --shutdown-timeout for Ctrl-C' * (world_size() > 1)}"
        )

    def read(self) -> dict | None:
        """trainer.pt, with --resume and where there is one. InputError: --out holds what would be lost, or what differs."""
        file, stage, now = self.out / "trainer.pt", self.fixed["stage"], self.fixed["config"]
        held = [path.name for name in (*SAVED, *STARTED) for path in self.out.glob(name)]
        if held and not self.config.resume:
            raise InputError(f"--out {self.out} holds a run or a model ({held[0]}): --resume, or name another folder")
        if not file.exists():
            if not {*held} <= {*STARTED}:
                raise InputError(f"--out {self.out} holds a model and no trainer.pt to resume; name another folder")
            if self.config.resume:
                print(f"nothing to resume in {self.out}: starting from the beginning")
            return None
        with named_in_errors(file):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if saved["stage"] != stage:
                raise InputError(f"{file}: written by {saved['stage']}.py; {stage}.py cannot resume it")
            free = {name: now[name] for name in FREE_ON_RESUME & now.keys()}
            before = asdict(type(self.config)(**(saved["config"] | free)))  # a flag it did not know has its default
            changed = [name for name in now if now[name] != before[name]]
            others = [f"--{name.replace('_', '-')} {now[name]} (there: {before[name]})" for name in changed]
            others += [name for name, mark in self.fixed["marks"].items() if saved["marks"][name] != mark]
        if others:
            raise InputError(f"{file}: of a run with other {', '.join(others)}; take the same or another --out")
        return saved

    def cut_logs(self, sizes: dict[str, int]):
        """Logs end where they did at the checkpoint; there are none where there is no checkpoint."""
        for name in LOGS:
            if (self.out / name).exists() or name == "metrics.jsonl":
                with (self.out / name).open("ab") as file:
                    if file.tell() < sizes.get(name, 0):
                        raise InputError(f"{self.out / name}: shorter than at the checkpoint; take another --out")
                    file.truncate(sizes.get(name, 0))

    def steps(self) -> Iterator[int]:
        """The steps that are left, until numbers go bad, or Ctrl-C or SIGTERM comes: that one finishes its step."""
        said = f"\nstopping after this step; once more to leave at once; {self.out} has what was saved, for --resume\n"

        def note(number, frame):
            if self.stop:
                os._exit(128 + number)  # the second one leaves at once
            self.stop.append(number)
            os.write(2, said.encode())  # print() is not safe in here

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        done, name = self.state["step"], self.fixed["stage"]
        self.bar = tqdm(range(done + 1, self.last + 1), name, self.last, initial=done, disable=rank() > 0)
        try:
            for step in self.bar:
                self.started, self.updates, self.left_out = time.perf_counter(), 0, 0
                yield step
                if self.stopped() or len(self.state["bad_in_a_row"]) >= BAD_IN_A_ROW:
                    break
        except GeneratorExit:  # the step failed; where it has changed no weight, what came before it is saved
            if 0 < self.state["step"] == step - 1 and not self.updates and world_size() == 1:
                self.save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stopped(self) -> bool:
        """Was any process asked to stop? From here on all of them know."""
        heard = [number for numbers in gather(list(self.stop)) for number in numbers]
        self.stop = heard[:1] or self.stop
        return bool(heard)  # not `self.stop`: a signal may have come since, to this process alone

    def update(self, lr: float, loss: Tensor) -> float:
        """Clip the gradient to norm 1, step, clear; returns the norm before. Not finite, or the loss: nan, and no step."""
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)).item()
        finite = math.isfinite(grad_norm) and math.isfinite(total(loss))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates, self.left_out = self.updates + finite, self.left_out + (not finite)
        return grad_norm if finite else math.nan

    def record(self, numbers: dict, problems: list[int], texts: Iterable[str] = (), warnings: Iterable = ()):
        """A line of metrics.jsonl, the bar, a checkpoint. texts: for samples.txt. warnings: (kind, text), one of a kind."""
        seconds, state, config = time.perf_counter() - self.started, self.state, self.config
        state["step"], state["seconds"] = state["step"] + 1, state["seconds"] + seconds
        step, bad = state["step"], self.left_out
        state["bad_in_a_row"] = [*state["bad_in_a_row"], bad] if bad else []
        line = {"step": step, "seconds": state["seconds"], **numbers, "nonfinite_updates": bad}
        line["peak_memory_gb"] = peak_memory(self.model.embed.weight.device)
        if config.eval_every and step % config.eval_every == 0:
            line["greedy_accuracy"] = evaluate(self.model, self.tests, config)["greedy_accuracy"]
        self.append("metrics.jsonl", line)
        for kind, text in warnings:
            if kind not in state["warned"]:
                state["warned"].append(kind)
                tqdm.write(f"warning: at step {step} {text}")
        if texts and step % 5 == 1 and rank() == 0:
            with (self.out / "samples.txt").open("a", encoding="utf-8") as file:
                file.writelines(f"--- step {step}, {text}" for text in texts)
        if bad:
            self.append("bad_batches.jsonl", {"problems": problems, **line})
        shown = ("reward", "accuracy", "loss", "policy_loss")
        self.bar.set_postfix({name: f"{line[name]:.3f}" for name in shown if name in line}, refresh=False)
        late = self.saved + SAVE_SECONDS < time.monotonic()
        due = step % config.save_every == 0 if config.save_every else gather(late)[0]
        if due and step < self.last and not bad and not self.stopped():
            self.save()

    def append(self, log: str, line: dict):
        """One more line of JSON, from the first process; a number that is not finite becomes null."""
        if rank() == 0:
            line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with (self.out / log).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def save(self):
        """The Hugging Face files, then the commit: trainer.pt, all that a resumed run needs. Each is whole, old or new."""
        weights, moments = get_state_dict(self.model, self.optimizer, options=WHOLE)  # on the first process
        if rank() == 0:
            new, logs = self.out / ".new", [self.out / name for name in LOGS if (self.out / name).exists()]
            state = self.fixed | {"state": self.state, "weights": weights, "optimizer": moments}
            try:
                shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
                self.model.save_pretrained(new, weights)
                torch.save(state | {"log_sizes": {log.name: log.stat().st_size for log in logs}}, new / "trainer.pt")
                for file in (*new.iterdir(), *logs):
                    with file.open("rb+") as opened:
                        os.fsync(opened.fileno())
                begun = (self.out / "trainer.pt").exists()  # if not, it comes first: a kill leaves something to resume
                for file in sorted(new.iterdir(), key=lambda file: (file.name == "trainer.pt") == begun):
                    os.replace(file, self.out / file.name)
            except Exception as error:  # OSError, and what torch and safetensors make of it
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"{self.out}: cannot save ({reason}); the checkpoint before stays") from error
            finally:
                shutil.rmtree(new, ignore_errors=True)
        gather(None)  # the others wait for it: torchrun ends all processes when one leaves
        self.saved = time.monotonic()

    def finish(self, curves: tuple[str, ...], then: str) -> dict:
        """The last checkpoint, evaluation and figure; a run that was asked to stop, or whose numbers went bad, ends here."""
        state, out = self.state, self.out
        if len(bad := state["bad_in_a_row"]) >= BAD_IN_A_ROW:  # what became of the weights replaces nothing
            what = f"{sum(bad)} updates of {len(bad)} batches in a row, up to step {state['step']}, were not finite"
            raise FloatingPointError(f"{out}: {what}; see bad_batches.jsonl, try a lower --lr; the last save stays")
        self.save()
        if self.stopped():
            words = [*sys.argv, *(() if "--resume" in sys.argv else ("--resume",))]
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this node
            many = f"torchrun{' --nnodes ...' * (local < world_size())} --nproc-per-node {local}"
            start = "python" if world_size() == 1 else many
            print(f"stopped after step {state['step']}, saved in {out}; go on with: {start} {shlex.join(words)}")
            sys.exit(128 + self.stop[0])
        print(f"checkpoint: {out}    next: {then}")
        result = evaluate(self.model, self.tests, self.config, out=out)
        if rank() == 0:
            draw_curves(out, curves)
        low, high = result["greedy_interval"]
        outcomes = ", ".join(f"{name.replace('_', ' ')} {x:.3f}" for name, x in result["greedy_outcomes"].items())
        print(
            f"greedy accuracy on {result['problems']} test problems: {result['greedy_accuracy']:.3f} "
            f"(95% interval {low:.3f}-{high:.3f}; {outcomes}); trained for {state['seconds']:.0f} s"
        )
        return result


if __name__ == "__main__":
    run_script(main, Config)
