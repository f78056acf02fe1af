"""How fast this is, each thing beside what it is compared with, in turns in one process.

    python tests/tools/bench.py                       a random model: sample() beside generate() of
                                                      transformers, and what skipping layers buys
    python tests/tools/bench.py --shape 1.5b          the same in the shape of Qwen2.5-Math-1.5B
    python tests/tools/bench.py --grading             completions and programs graded a second

Writes bench.json, and skips.png: tokens/s against the skip ratio.
"""

import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, OPTConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[2]))

from evaluate import make_folder, print_table
from model import Decoder, LinearMaps, sample_skip, write_json
from reward import TASKS, judge
from rollout import Rollout, flag, run_script, sample
from sandbox import run_programs
from warmup import TOY_SHAPE, TrainConfig

SHAPES = {
    "toy": OPTConfig(**TOY_SHAPE, vocab_size=400),
    "1.5b": Qwen2Config(  # Qwen2.5-Math-1.5B, for a GPU
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
WORK = {  # rows, tokens of the longest prompt, new tokens
    "toy": (128, 48, 64),
    "1.5b": (64, 128, 512),
}


@dataclass
class Config(TrainConfig):
    """Flags of bench.py."""

    model = None  # no flag: the models are random
    grading: bool = flag(False, "time reward.py and sandbox.py instead")
    shape: Literal["toy", "1.5b"] = flag("toy", "of the random models")
    skip_ratios: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    rounds: int = flag(6, "timed rounds, each with masks and samples of its own", low=1)
    test_limit: int = flag(256, "problems, completions or programs of one round", low=1)
    out: str = flag("runs/bench", "folder of bench.json and the figures")


def main(config: Config):
    """Measure, print tables, write bench.json."""
    out = make_folder(config.out)
    machine = f"cpu, {torch.get_num_threads()} threads"
    if config.device == "cuda":
        machine = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    setting = f"{machine}, {config.dtype}, {versions}, {config.rounds} rounds after a warm-up"
    print(setting)
    if config.grading:
        tables = {"grading": grading_speeds(config)}
    else:
        tables = random_tables(config)
        draw(tables["skips"], out / "skips.png")
    for name, rows in tables.items():
        print(name)
        print_table(rows)
    write_json(out / "bench.json", {"setting": setting, **tables})


def race(sides: dict, rounds: int) -> dict:
    """Units a second of each side; side(round) returns how many units it did. Round 0 warms up."""
    units, seconds = Counter(), Counter()
    for number in tqdm(range(rounds + 1), ", ".join(map(str, sides)), leave=False):
        for name, side in sides.items():
            started = time.perf_counter()
            done = side(number)  # a number read back: the GPU has finished
            elapsed = time.perf_counter() - started
            if number > 0:
                units[name] += done
                seconds[name] += elapsed
    return {name: units[name] / seconds[name] for name in sides}


# ---- sample() beside generate() ------------------------------------------------------------------


def random_tables(config: Config) -> dict[str, list]:
    """Tokens/s of both sides for each workload, and of ours for each skip ratio."""
    ours, theirs = random_models(config)
    works = workloads(config.shape)
    rows = []
    for name, work in works.items():
        sides = {
            "sample": lambda seed, work=work: count_sampled(sample(ours, **work, seed=seed)),
            "generate": lambda seed, work=work: generate(theirs, work, seed),
        }
        speeds = race(sides, config.rounds)
        ratio = speeds["sample"] / speeds["generate"]
        rows.append({"workload": name, **speeds, "ratio": ratio})
    skips = skip_speeds(ours, works["fixed"], config)
    return {"workloads": rows, "skips": skips, "training": [training_speeds(ours, config)]}


def random_models(config: Config) -> tuple[Decoder, torch.nn.Module]:
    """A random Decoder, and transformers' model of the same weights."""
    torch.manual_seed(0)
    weights_dtype = torch.float64 if config.dtype == "float64" else torch.float32
    ours = Decoder(SHAPES[config.shape])
    ours = ours.to(config.device, weights_dtype)
    ours.autocast = config.dtype == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        dtype = getattr(torch, config.dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return ours, theirs.to(config.device)


def workloads(shape: str) -> dict[str, dict]:
    """Arguments of `sample`. fixed: all rows alike; rl: 8 samples of prompts of all lengths."""
    rows, longest, new_tokens = WORK[shape]
    vocab = SHAPES[shape].vocab_size
    rng = np.random.default_rng(0)
    equal = rng.integers(vocab, size=(rows, longest)).tolist()
    lengths = rng.integers(longest // 4, longest + 1, rows // 8)
    mixed = [rng.integers(vocab, size=length).tolist() for length in lengths]
    # Random weights give a nearly uniform softmax: these ids end a completion after
    # new_tokens / 4 tokens on average.
    eos_ids = rng.permutation(vocab)[: vocab * 4 // new_tokens].tolist()
    shared = {"max_new_tokens": new_tokens, "pad_id": 0}
    return {
        "fixed": {"prompts": equal, "num_samples": 1, "eos_id": [], **shared},
        "rl": {"prompts": mixed, "num_samples": 8, "eos_id": eos_ids, **shared},
    }


def count_sampled(rollout: Rollout) -> int:
    """Sampled tokens, EOS included."""
    return int(rollout.action_mask.sum())


def generate(theirs, work: dict, seed: int) -> int:
    """The other side, prompts padded on the left; returns the number of sampled tokens."""
    torch.manual_seed(seed)
    prompts = [torch.tensor(prompt, device=theirs.device) for prompt in work["prompts"]]
    masks = [torch.ones_like(prompt) for prompt in prompts]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")  # (prompts, longest)
    mask = pad_sequence(masks, batch_first=True, padding_side="left")
    theirs.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=work["max_new_tokens"],
        num_return_sequences=work["num_samples"],
        eos_token_id=work["eos_id"] or None,
        pad_token_id=work["pad_id"],
    )
    sampled = theirs.generate(ids, attention_mask=mask)[:, ids.shape[1] :]  # (N, new tokens)
    eos_ids = torch.tensor(work["eos_id"], dtype=torch.int64, device=ids.device)
    is_eos = torch.isin(sampled, eos_ids).int()
    return int((is_eos.cumsum(1) == is_eos).sum())  # up to the first EOS, which counts


# ---- a training pass beside its matrix products --------------------------------------------------


def training_speeds(model: Decoder, config: Config) -> dict:
    """Tokens/s of a pass forward and backward and of its products alone; the share it reaches."""
    device = model.embed.weight.device
    tokens = torch.randint(model.config.vocab_size, (config.micro_batch, 32), device=device)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2] + [model.head.weight]
    inputs = [torch.randn(tokens.numel(), p.shape[1]).to(p) for p in matrices]  # (tokens, in)
    gradients = [torch.randn(tokens.numel(), p.shape[0]).to(p) for p in matrices]  # (tokens, out)

    def train(_):
        logits = model.logits(model(tokens))
        logits.logsumexp(-1).sum().backward()
        model.zero_grad()
        return tokens.numel()

    @torch.no_grad()
    def multiply(_):
        for weight, x, gradient in zip(matrices, inputs, gradients, strict=True):
            torch.mm(x, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, x)
        return tokens.numel()

    speeds = race({"training": train, "products": multiply}, 5 * config.rounds)
    return {**speeds, "share": speeds["training"] / speeds["products"]}


# ---- what skipping layers buys -------------------------------------------------------------------


def skip_speeds(model: Decoder, work: dict, config: Config) -> list[dict]:
    """A row for each skip ratio: tokens/s with nothing and with maps in place of skipped layers.

    ideal: if a skipped layer cost nothing. The share of the layers in a rollout is known from
    rollouts that skip all of them.
    """
    num_layers = len(model.layers)
    maps = LinearMaps(model.config).to(model.embed.weight.device)
    if model.autocast:
        maps.bfloat16()

    def side(seed: int, ratio: float, linear_maps: LinearMaps | None) -> int:
        skip = torch.ones(num_layers, dtype=torch.bool)
        if ratio < 1:
            skip = sample_skip(num_layers, ratio, torch.Generator().manual_seed(seed))
        model.linear_maps = linear_maps
        return count_sampled(sample(model, **work, skip=skip, seed=seed))

    sides = {"none": partial(side, ratio=1.0, linear_maps=None)}
    for ratio in (0.0, *config.skip_ratios):
        sides[ratio, "identity"] = partial(side, ratio=ratio, linear_maps=None)
        sides[ratio, "linear"] = partial(side, ratio=ratio, linear_maps=maps)
    speeds = race(sides, config.rounds)
    full = speeds[0.0, "identity"]
    layers_share = 1 - full / speeds["none"]
    rows = []
    for ratio in (0.0, *config.skip_ratios):
        skipped = round(ratio * num_layers)
        rows.append(
            {
                "skip_ratio": ratio,
                "layers_skipped": skipped,
                "identity": speeds[ratio, "identity"],
                "linear": speeds[ratio, "linear"],
                "ideal": full / (1 - layers_share * skipped / num_layers),
            }
        )
    return rows


def draw(rows: list[dict], file: Path):
    """Tokens/s against the skip ratio."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    panel = figure.add_subplot()
    ratios = [row["skip_ratio"] for row in rows]
    for name in ("identity", "linear", "ideal"):
        panel.plot(ratios, [row[name] for row in rows], ".-", label=name)
    panel.legend()
    panel.set(xlabel="skip ratio", title="tokens per second", ylim=(0, None))
    figure.savefig(file, dpi=110)
    print(f"figure: {file}")


# ---- grading -------------------------------------------------------------------------------------

REASONING = """She sells 16 - 3 - 4 = 9 duck eggs a day.
So she makes 9 * 2 = $18 every day at the market.
Therefore, the answer is: """
ANSWERS = ("18", "$1,080.", "c ) 30", "18 eggs")
OPTIONS = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
PROGRAM = "def solution():\n    {line}\n    total = {number}\n    return total - total + 7"


def grading_speeds(config: Config) -> list:
    """Completions that one core judges in a second, per task, and programs that all cores run."""
    count = config.test_limit

    def judge_all(number: int, task: str) -> int:
        for i in range(count):
            judge(REASONING + ANSWERS[i % len(ANSWERS)], "18", task, OPTIONS)
        return count

    def run_all(number: int, line: str) -> int:
        programs = [PROGRAM.format(line=line, number=i) for i in range(count)]
        return run_programs(programs, config.unsafe_exec).count("7")

    sides = {f"completions, {task}": partial(judge_all, task=task) for task in TASKS}
    for line in ("import math", "import sympy"):
        sides[f"programs, {line}"] = partial(run_all, line=line)
    speeds = race(sides, config.rounds)
    return [{"what": name, "per_second": speed} for name, speed in speeds.items()]


if __name__ == "__main__":
    run_script(main, Config)
