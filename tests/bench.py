"""How fast this is, each thing beside what it is compared with: in turns in one process, the first round warms up.

python tests/bench.py                               sample() beside transformers' generate() and the limit of the machine
python tests/bench.py --shapes 1.5b                 on a GPU
python tests/bench.py --model runs/warmup --skip-ratios 0 0.125 0.25 0.5      what skipping layers buys and costs
python tests/bench.py --grading                     completions and programs graded a second
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import Decoder, load, nested_kl, sample_skip, write_json
from reward import TASKS, InputError, load_problems, make_target, score
from rollout import Rollout, SharedConfig, encode_prompts, flag, grade, run_script, sample
from sandbox import run_programs

SHAPES = {  # hidden, layers, heads, KV heads, MLP, vocabulary; then rows, longest prompt and new tokens of its workloads
    "toy": (64, 8, 4, 4, 192, 400, 128, 48, 64),
    "140m": (896, 8, 14, 2, 4864, 8000, 64, 64, 64),
    "1.5b": (1536, 28, 12, 2, 8960, 151936, 64, 128, 512),  # Qwen2.5-1.5B, for a GPU
}


@dataclass
class Config(SharedConfig):
    """Flags of bench.py."""

    model: str | None = flag(None, "directory or hub id of a trained model: what skipping its layers buys and costs")
    grading: bool = flag(False, "time reward.py and sandbox.py instead")
    shapes: list[str] = field(default_factory=lambda: ["toy", "140m"], metadata={"help": f"among {', '.join(SHAPES)}"})
    skip_ratios: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5], metadata={"help": "beside 0"})
    rounds: int = flag(6, "timed rounds, each with masks and samples of its own")
    limit: int | None = flag(256, "problems, completions or programs of one round")
    seed: int = flag(0, "seed of weights, prompts, masks and samples")
    out: str = flag("runs/bench", "folder of bench.json, and of skips.png with --model")

    def __post_init__(self):
        super().__post_init__()
        if self.rounds < 1 or not {*self.shapes} <= {*SHAPES}:
            raise InputError(f"--rounds must be at least 1 and --shapes among {', '.join(SHAPES)}")


def main(config: Config) -> dict[str, list[dict]]:
    """Measure, print tables, write bench.json; returns what it holds of numbers."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{device.type}, {machine}, {versions}, {config.rounds} rounds after a warm-up")
    if config.grading:
        results = {"grading": grading_speeds(config)}
    elif config.model is not None:
        results = {"skips": trained_skips(config)}
        draw(results["skips"], out / "skips.png")
    else:
        results = {"speeds": [], "skips": []}
        for shape in config.shapes:
            for name, rows in random_model(shape, device, config).items():
                results[name] += [{"shape": shape, **row} for row in rows]
    for rows in results.values():
        cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
        cells.insert(0, [name.replace("_", " ") for name in rows[0]])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    write_json(out / "bench.json", {"machine": f"{device.type}, {machine}", "versions": versions, **results})
    return results


# ---- the one loop that reads the clock ------------------------------------------------------------------------------


class Round(NamedTuple):
    units: float  # tokens, completions, programs, bytes or operations
    seconds: float
    result: object


def race(sides: dict[object, Callable], rounds: int) -> dict[object, list[Round]]:
    """In turns, side(number of the round) each: it returns a Rollout or how many units it did. Round 0 warms up."""
    done = {name: [] for name in sides}
    for number in tqdm(range(rounds + 1), ", ".join(map(str, sides)), unit="round", leave=False):
        for name, side in sides.items():
            started = time.perf_counter()
            result = side(number)
            units = int(result.action_mask.sum()) if isinstance(result, Rollout) else result  # waits for a GPU
            done[name].append(Round(units, time.perf_counter() - started, result))
    return {name: timed for name, (_, *timed) in done.items()}


def rate(rounds: list[Round]) -> float:
    """Units a second, both pooled over the rounds."""
    return sum(r.units for r in rounds) / sum(r.seconds for r in rounds)


# ---- random models: beside generate(), and beside the limit of the machine ------------------------------------------


def random_model(shape: str, device: torch.device, config: Config) -> dict[str, list[dict]]:
    """Tokens/s of sample() and generate(): same weights, prompts and EOS ids, in turns. Then what skipping layers buys."""
    hidden, layers, heads, kv_heads, mlp, vocab, rows, longest, new_tokens = SHAPES[shape]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp, "vocab_size": vocab}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": True}
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    torch.manual_seed(config.seed)
    model = Decoder(Qwen2Config(**sizes)).to(device, torch.float64 if dtype == "float64" else torch.float32)
    model.autocast = dtype == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        flags = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        theirs = AutoModelForCausalLM.from_pretrained(folder, **flags).to(device)

    rng = np.random.default_rng(config.seed)
    equal = rng.integers(vocab, size=(rows, longest)).tolist()
    mixed = [rng.integers(vocab, size=n).tolist() for n in rng.integers(longest // 4, longest + 1, rows // 8)]
    # random weights: the softmax is nearly uniform, so that these ids end a completion at 4 / new_tokens a token
    eos_ids = rng.permutation(vocab)[: vocab * 4 // new_tokens].tolist()
    fixed = {"prompts": equal, "num_samples": 1, "max_new_tokens": new_tokens, "eos_id": [], "pad_id": 0}
    rl = fixed | {"prompts": mixed, "num_samples": 8, "eos_id": eos_ids}
    limits, speeds = machine_limits(model, config.rounds), []
    for name, work in {"fixed": fixed, "rl": rl}.items():
        sides = {"sample": partial(complete, model, work), "generate": partial(generate, theirs, work)}
        done = race(sides, config.rounds)
        ours, other = map(rate, done.values())
        least = sum(least_seconds(model, one.result, work["num_samples"], *limits) for one in done["sample"])
        row = {"workload": name, "dtype": dtype, "rows": rows, "tokens_per_second": ours, "generate": other}
        of_the_limit = least / sum(one.seconds for one in done["sample"])
        speeds.append(row | {"ratio": ours / other, "of_the_limit": of_the_limit})
    return {"speeds": speeds, "skips": skip_speeds(model, fixed, {0.0, *config.skip_ratios, 1.0}, config)[0]}


def complete(model: Decoder, work: dict, seed: int, skip_ratio: float = 0.0) -> Rollout:
    """Our side. A skip ratio of 1 leaves out every layer."""
    skip = torch.ones(len(model.layers), dtype=torch.bool)
    if skip_ratio < 1:
        skip = sample_skip(len(model.layers), skip_ratio, torch.Generator().manual_seed(seed))
    return sample(model, **work, seed=seed, skip=skip)


def generate(theirs, work: dict, seed: int) -> int:
    """The other side, prompts padded on the left; returns the number of sampled tokens."""
    torch.manual_seed(seed)
    flags = {"max_new_tokens": work["max_new_tokens"], "num_return_sequences": work["num_samples"]}
    flags |= {"eos_token_id": work["eos_id"] or None, "pad_token_id": work["pad_id"]}
    theirs.generation_config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, **flags)
    prompts = [torch.tensor(prompt, device=theirs.device) for prompt in work["prompts"]]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    sampled = theirs.generate(ids, attention_mask=mask)[:, ids.shape[1] :]  # (N, new tokens)
    eos = torch.isin(sampled, torch.tensor(work["eos_id"], dtype=torch.int64, device=ids.device)).int()
    return int((eos.cumsum(1) == eos).sum())  # up to the first EOS, which counts


@torch.no_grad()
def machine_limits(model: Decoder, rounds: int) -> tuple[float, float]:
    """Bytes a second of a large copy, and operations a second of a product with many rows; the best round of each."""
    up, block = model.layers[0].mlp.up, torch.ones(2**26, device=model.embed.weight.device)
    x = torch.ones(2048, model.config.hidden_size, dtype=up.weight.dtype, device=block.device)

    def copy(_) -> int:
        block.clone()[0].item()  # waits for a GPU
        return 2 * block.nbytes

    def multiply(_) -> int:
        with torch.autocast(block.device.type, torch.bfloat16, enabled=model.autocast):
            up(x)[0, 0].item()
        return 2 * len(x) * up.weight.numel()

    done = race({"copy": copy, "product": multiply}, rounds)
    return tuple(max(one.units / one.seconds for one in rounds) for rounds in done.values())


def least_seconds(model: Decoder, rollout: Rollout, num_samples: int, bandwidth: float, speed: float) -> float:
    """What no sampler of this rollout can beat: the seconds to read what must be read, or to multiply, whichever is more.

    Read: the weights once a step, and for each token the keys and values before it. Operations: two a weight and token,
    and those of attention. Prompts count once for all their samples.
    """
    config, size = model.config, 2 if model.autocast else model.embed.weight.itemsize
    starts, ends = rollout.prompt_lens.double(), rollout.lengths.double()  # (N,)
    layers, head = sum(p.numel() for p in model.layers.parameters()), model.head.weight
    seen = ((ends * (ends - 1) - starts * (starts - 1)) / 2).sum().item()  # columns, over all sampled tokens
    passed = (starts / num_samples + ends - starts - 1).sum().item()  # tokens that go through the layers
    steps, sampled = (ends - starts).max().item(), (ends - starts).sum().item()
    width = 2 * config.num_layers * config.head_dim * seen
    bytes_ = steps * (layers * size + head.nbytes) + width * config.num_kv_heads * size
    operations = 2 * (layers * passed + head.numel() * sampled + width * config.num_heads)
    return max(bytes_ / bandwidth, operations / speed)


# ---- what skipping layers buys and costs ----------------------------------------------------------------------------


def skip_speeds(model: Decoder, work: dict, ratios: set[float], config: Config) -> tuple[list[dict], dict]:
    """A row per skip ratio, the speed-up beside its ideal, 1 / (1 - skipped * layers); and the rounds of each ratio.

    layers: the share of the layers in the seconds of a rollout, from rollouts that skip every layer (ratio 1), run in turn;
    1 where there are none.
    """
    sides = {ratio: lambda n, ratio=ratio: complete(model, work, config.seed + n, ratio) for ratio in sorted(ratios)}
    done, rows = race(sides, config.rounds), []
    speeds = {ratio: rate(rounds) for ratio, rounds in done.items()}
    layers = 1 - speeds[0.0] / speeds[1.0] if 1.0 in speeds else 1.0
    for ratio, speed in speeds.items():
        up, skipped = speed / speeds[0.0], round(ratio * len(model.layers))
        rest = 1 - skipped / len(model.layers) * layers
        row = {"skip_ratio": ratio, "layers_skipped": skipped, "tokens_per_second": speed, "speed_up": up}
        rows.append(row | {"ideal": 1 / rest, "of_the_ideal": up * rest})
    return rows, done


def trained_skips(config: Config) -> list[dict]:
    """Of a trained model also what skipping costs: KL(mu||pi) per token, exact, and the accuracy of mu."""
    model = load(config.model, config.device, config.dtype)
    problems = load_problems(config.task, "test", config.test_data, config.limit, config.engine)
    work = {"prompts": encode_prompts(problems, model, config, config.max_new_tokens), **config.sampling(model)}
    rows, done = skip_speeds(model, work, {0.0, *config.skip_ratios}, config)
    for row, rounds in zip(rows, done.values(), strict=True):
        row["kl_behav"] = float(
            np.mean([nested_kl(model, one.result.pairs(), one.result.skip[None]) for one in rounds])
        )
        right = [grade(one.result, problems, model, config).rewards == 1 for one in rounds]
        row["accuracy"] = torch.cat(right).double().mean().item()
    return rows


def draw(rows: list[dict], file: Path):
    """The speed-up beside its ideal, and what the nested models lose."""
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    panels = (("speed_up", "ideal"), ("kl_behav",), ("accuracy",))
    for panel, names in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            x, y = zip(*((row["skip_ratio"], row[name]) for row in rows), strict=True)
            panel.plot(x, y, "--" if name == "ideal" else ".-", label=name.replace("_", " "))
        panel.set(xlabel="skip ratio", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(file, dpi=110)
    print(f"figure: {file}")


# ---- grading --------------------------------------------------------------------------------------------------------


def grading_speeds(config: Config) -> list[dict]:
    """Completions that one core scores in a second, per task, and programs that run in a second on all cores."""
    count, sides = config.limit or 256, {}
    prose = "She sells 16 - 3 - 4 = 9 duck eggs a day.\nSo she makes 9 * 2 = $18 every day at the market.\n"
    options = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
    for task in TASKS:
        answers = ["a", "(b)", "c ) 30", "38"] if task == "mathqa" else ["18", "$1,080.", "0.25", "18 eggs"]
        batch = [(f"{prose}Therefore, the answer is: {answer}", answers[0]) for answer in answers]
        if task == "toy":
            batch = [(make_target(problem), problem.answer) for problem in load_problems("toy", "test")]
        batch = [(text, gold, task, options) for text, gold in (batch * count)[:count]]
        sides[f"completions, {task}"] = lambda _, batch=batch: len([score(*one) for one in batch])
    results = [str(2 * i + 1) for i in range(count)]
    for name, line in {"programs": "", "programs with sympy": "    import sympy\n"}.items():
        programs = [f"def solution():\n{line}    total = {i}\n    return total * 2 + 1" for i in range(count)]
        sides[name] = lambda _, programs=programs: count * (run_programs(programs, config.unsafe_exec) == results)
    return [{"what": name, "per_second": rate(rounds)} for name, rounds in race(sides, config.rounds).items()]


if __name__ == "__main__":
    run_script(main, Config)
