"""How fast `sample()` is: beside transformers' `generate()`, beside the limit of the machine, and with layers skipped.

python rollout.py --bench                               toy and 140m shapes, random weights
python rollout.py --bench --shapes 1.5b                 for a GPU
python rollout.py --bench --rollout-dtype bfloat16      layers in bf16, weights in fp32
"""

import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from model import Decoder, pick_device, sample_skip, write_json
from rollout import Config, Rollout, layers_in, make_folder, print_table, sample, sampling_gap

SHAPES = {  # hidden, layers, heads, KV heads, MLP, vocabulary; then rows, longest prompt and new tokens of its workloads
    "toy": (64, 8, 4, 4, 192, 400, 128, 48, 64),
    "140m": (896, 8, 14, 2, 4864, 8000, 64, 64, 64),
    "1.5b": (1536, 28, 12, 2, 8960, 151936, 64, 128, 512),  # Qwen2.5-1.5B, for a GPU
}


def bench(config: Config) -> dict:
    """Tokens/s of sample() and generate(): same weights, prompts and EOS ids, in turns. Then what skipping layers buys."""
    device, out = pick_device(config.device), make_folder(config.out)
    dtype = config.rollout_dtype or config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    results = {
        "device": f"{device.type}, {machine}",
        "dtype": dtype,
        "rounds": config.rounds,
        "speeds": [],
        "skips": [],
    }
    results["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        ", ".join(map(str, (results["device"], dtype, results["versions"], f"{config.rounds} rounds after a warm-up")))
    )
    for shape in config.shapes:
        hidden, layers, heads, kv_heads, mlp, vocab, rows, longest, new_tokens = SHAPES[shape]
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp, "vocab_size": vocab}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": True}
        torch.manual_seed(config.seed)
        model = Decoder(Qwen2Config(**sizes)).to(device)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            flags = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
            theirs = AutoModelForCausalLM.from_pretrained(folder, **flags).to(device)

        rng = np.random.default_rng(config.seed)
        equal = rng.integers(vocab, size=(rows, longest)).tolist()
        mixed = [rng.integers(vocab, size=n).tolist() for n in rng.integers(longest // 4, longest + 1, rows // 8)]
        # random weights: the softmax is nearly uniform, so that these ids end a completion at 4 / new_tokens a token
        eos_ids = rng.permutation(vocab)[: vocab * 4 // new_tokens].tolist()
        workloads = {
            "fixed": {"prompts": equal, "num_samples": 1, "max_new_tokens": new_tokens, "eos_id": []},
            "rl": {"prompts": mixed, "num_samples": 8, "max_new_tokens": new_tokens, "eos_id": eos_ids},
        }
        with layers_in(model, dtype):
            limits = machine_limits(model)
            for name, work in workloads.items():
                sides = {"sample": partial(complete, model, work), "generate": partial(generate, theirs, work)}
                (speed, peak), (speed_hf, peak_hf) = race(sides, config.rounds, device).values()
                rollout = complete(model, work, seed=1)
                least = least_seconds(model, rollout, work["num_samples"], *limits)
                with layers_in(model, "float32"):
                    gap = sampling_gap(model, rollout).abs().max().item()
                row = {"shape": shape, "workload": name, "rows": rows, "tokens_per_second": speed}
                row |= {"generate": speed_hf, "ratio": speed / speed_hf, "peak_GB": peak, "generate_peak_GB": peak_hf}
                row |= {"of_the_limit": speed * least / int(rollout.action_mask.sum()), "largest_logp_gap": gap}
                results["speeds"].append(row)
            results["skips"] += skip_speeds(model, shape, workloads["fixed"], config)
    for key in ("speeds", "skips"):
        cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in results[key]]
        print_table([name.replace("_", " ") for name in results[key][0]], cells)
    write_json(out / "bench.json", results)
    return results


def complete(model: Decoder, work: dict, seed: int, skip_ratio: float = 0.0) -> Rollout:
    """Our side. A skip ratio of 1 leaves out every layer."""
    layers = len(model.layers)
    skip = torch.ones(layers, dtype=torch.bool)
    if skip_ratio < 1:
        skip = sample_skip(layers, skip_ratio, torch.Generator().manual_seed(seed))
    return sample(model, **work, pad_id=0, seed=seed, skip=skip)


def generate(theirs, work: dict, seed: int) -> int:
    """The other side, prompts padded on the left; returns the number of sampled tokens."""
    torch.manual_seed(seed)
    theirs.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=work["max_new_tokens"],
        num_return_sequences=work["num_samples"],
        eos_token_id=work["eos_id"] or None,
        pad_token_id=0,
    )
    prompts = [torch.tensor(prompt, device=theirs.device) for prompt in work["prompts"]]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    sampled = theirs.generate(ids, attention_mask=mask)[:, ids.shape[1] :]  # (N, new tokens)
    eos = torch.isin(sampled, torch.tensor(work["eos_id"], dtype=torch.int64, device=ids.device)).int()
    return int((eos.cumsum(1) == eos).sum())  # up to the first EOS, which counts


def race(sides: dict, rounds: int, device: torch.device) -> dict:
    """Name -> (tokens a second, peak GB), tokens and seconds pooled. In turns, side(seed=...) each; round 0 warms up."""
    sums = {name: [0, 0.0, 0.0] for name in sides}  # tokens, seconds, peak
    for round_ in tqdm(range(rounds + 1), desc=", ".join(map(str, sides)), unit="round", leave=False):
        for name, side in sides.items():
            peak_gigabytes(device)
            started = time.perf_counter()
            result = side(seed=round_)
            tokens = int(result.action_mask.sum()) if isinstance(result, Rollout) else result  # waits for a GPU
            seconds = time.perf_counter() - started
            if round_ > 0:
                old = sums[name]
                sums[name] = [old[0] + tokens, old[1] + seconds, max(old[2], peak_gigabytes(device))]
    return {name: (tokens / seconds, peak) for name, (tokens, seconds, peak) in sums.items()}


def peak_gigabytes(device: torch.device) -> float:
    """Most memory held since the last call: on a GPU, or by this process (Linux; elsewhere nan)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return peak


def fastest(run: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of ten runs."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        run().flatten()[0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@torch.no_grad()
def machine_limits(model: Decoder) -> tuple[float, float]:
    """Bytes a second of a large copy, and operations a second of a product with many rows, in the dtype of the layers."""
    up, block = model.layers[0].mlp.up, torch.ones(2**26, device=model.embed.weight.device)
    x = torch.ones(2048, model.config.hidden_size, device=block.device)
    with torch.autocast(block.device.type, torch.bfloat16, enabled=model.autocast):
        operations = 2 * len(x) * up.weight.numel() / fastest(lambda: up(x))
    return 2 * block.nbytes / fastest(block.clone), operations


def least_seconds(model: Decoder, rollout: Rollout, num_samples: int, bandwidth: float, rate: float) -> float:
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
    return max(bytes_ / bandwidth, operations / rate)


def skip_speeds(model: Decoder, shape: str, work: dict, config: Config) -> list[dict]:
    """Speed-up per skip ratio beside its ideal, 1 / (1 - r * layers).

    `layers`: the share of the layers in the seconds of a rollout, from rollouts that skip every layer, run in turn.
    """
    ratios = sorted({0.0, *config.skip_ratios, 1.0})
    sides = {ratio: partial(complete, model, work, skip_ratio=ratio) for ratio in ratios}
    speeds = {ratio: speed for ratio, (speed, _) in race(sides, config.rounds, model.embed.weight.device).items()}
    layers, rows = 1 - speeds[0.0] / speeds[1.0], []
    for ratio in ratios[:-1]:
        up, skipped = speeds[ratio] / speeds[0.0], round(ratio * len(model.layers)) / len(model.layers)
        row = {
            "shape": shape,
            "skip_ratio": ratio,
            "tokens_per_second": speeds[ratio],
            "layers": layers,
            "speed_up": up,
        }
        rows.append(row | {"ideal": 1 / (1 - skipped * layers), "of_the_ideal": up * (1 - skipped * layers)})
    return rows
