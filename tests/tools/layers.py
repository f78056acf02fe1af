"""What each layer costs when it is left out, and what pi and mu write, side by side.

python tests/tools/layers.py --model runs/warmup --skip-ratio 0.25
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import MEASURED, load, measure_layers, nested_kl, sample_skip, skip_pool
from rollout import Grades, encode_prompts, fitting, flag, grade, load_split, run_script, sample
from warmup import TrainConfig


@dataclass
class Config(TrainConfig):
    """Flags of layers.py."""

    model: str = flag("runs/warmup", "directory or hub id")
    skip_ratio: float = flag(0.25, "share of the layers that mu skips", low=0, high=0.99)
    test_limit: int | None = flag(64, "how many test problems", low=1)


def main(config: Config) -> dict[str, tuple[Grades, float]]:
    """Print what each layer costs, and what pi and mu write; returns grades and KL of both."""
    model = load(config.model, config.device, config.dtype)
    problems = load_split(config, "test")
    prompts = encode_prompts(problems, model, config)
    fitting(prompts, model, config.max_new_tokens, is_training=False)
    sampling = config.sampling(model) | {"seed": config.seed}

    own = sample(model, prompts[:MEASURED], **sampling).pairs()
    num_layers = len(model.layers)
    layer_kl = nested_kl(model, own, torch.eye(num_layers) > 0).tolist()
    measure_layers(model, own)  # the pool is that of the warm-up, where there is one
    pool = skip_pool(model, round(config.skip_ratio * num_layers), config.skip_layers)
    generator = torch.Generator().manual_seed(config.seed)
    skip = sample_skip(num_layers, config.skip_ratio, generator, pool)  # eq. (2)
    print("KL(mu||pi) per token without one layer:")
    for layer, kl in enumerate(layer_kl):
        note = "left out by mu " if skip[layer] else ""
        print(f"{layer:5} {kl:9.4f} {note}{'#' * round(60 * kl / max(layer_kl))}")

    results = {}
    for name, mask in (("pi", torch.zeros_like(skip)), ("mu", skip)):
        started = time.perf_counter()
        rollout = sample(model, prompts, skip=mask, **sampling)
        speed = int(rollout.action_mask.sum()) / (time.perf_counter() - started)
        grades = grade(rollout, problems, model, config)
        kl = nested_kl(model, rollout.pairs(), mask[None]).item()
        results[name] = grades, kl
        for problem, outcome, text in zip(
            problems[:4], grades.outcomes, grades.texts, strict=False
        ):
            print(f"--- {problem.question} (gold: {problem.answer})\n{name}, {outcome}: {text!r}")
        accuracy = grades.outcomes.count("right") / len(problems)
        rates = f"accuracy {accuracy:.3f}, {speed:,.0f} tokens/s"
        print(f"{name}: {rates}, KL({name}||pi) {kl:.4f} per token")
    return results


if __name__ == "__main__":
    run_script(main, Config)
