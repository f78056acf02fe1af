"""What each layer costs when it is left out, and what pi and mu write, side by side.

python tests/tools/layers.py --model runs/warmup --skip-ratio 0.25
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import MEASURED, is_measured, load, measure_layers, nested_kl, sample_skip, skip_pool
from rl import own_completions
from rollout import Grades, encode_prompts, fitting, flag, grade, load_split, run_script, sample
from warmup import TrainConfig


@dataclass
class Config(TrainConfig):
    """Flags of layers.py."""

    model: str = flag("runs/warmup", "directory or hub id")
    skip_ratio: float = flag(0.25, "share of the layers that mu skips", low=0, high=0.99)
    masks: int = flag(1, "how many masks of mu; each completes every problem", low=1)
    test_limit: int | None = flag(64, "how many test problems", low=1)


def main(config: Config) -> dict[str, tuple[Grades, float]]:
    """Print what each layer costs, and what pi and mu write.

    Returns the grades under the last mask, and the mean KL, of both.
    """
    model = load(config.model, config.device, config.dtype)
    problems = load_split(config, "test")
    prompts = encode_prompts(problems, model, config)
    fitting(prompts, model, config.max_new_tokens, is_training=False)
    sampling = config.sampling(model)

    train_prompts = encode_prompts(load_split(config, "train"), model, config)
    kept = fitting(train_prompts, model, config.max_new_tokens, is_training=True)
    if not is_measured(model, config.skip_with):
        started = time.perf_counter()
        pairs = own_completions(model, [train_prompts[i] for i in kept], config)
        measure_layers(model, pairs, config.skip_with)
        seconds = time.perf_counter() - started
        print(f"{len(pairs)} completions drawn, layers measured: {seconds:.0f} s")
    print(f"KL(mu||pi) per token without one layer ({config.skip_with}):")
    layer_kl = model.hf_config.layer_kl
    for layer, kl in enumerate(layer_kl):
        print(f"{layer:5} {kl:9.4f} {'#' * round(60 * kl / max(*layer_kl, 1e-9))}")

    num_layers = len(model.layers)
    pool = skip_pool(model, round(config.skip_ratio * num_layers), config.skip_layers)
    generator = torch.Generator().manual_seed(config.seed)
    masks = [
        sample_skip(num_layers, config.skip_ratio, generator, pool)  # eq. (2)
        for _ in range(config.masks)
    ]
    results = {}
    for name, skips in (("pi", [torch.zeros_like(masks[0])] * config.masks), ("mu", masks)):
        outcomes, kls, tokens, seconds = [], [], 0, 0.0
        for n, skip in enumerate(skips):
            started = time.perf_counter()
            rollout = sample(model, prompts, skip=skip, seed=config.seed + n, **sampling)
            seconds += time.perf_counter() - started
            tokens += int(rollout.action_mask.sum())
            grades = grade(rollout, problems, model, config)
            outcomes += grades.outcomes
            kls.append(nested_kl(model, rollout.pairs()[:MEASURED], skip[None]).item())
            left_out = skip.nonzero().flatten().tolist()
            print(f"{name}, without {left_out}: KL({name}||pi) {kls[-1]:.4f} per token")
        for problem, outcome, text in zip(
            problems[:4], grades.outcomes, grades.texts, strict=False
        ):
            print(f"--- {problem.question} (gold: {problem.answer})\n{name}, {outcome}: {text!r}")
        accuracy, kl = outcomes.count("right") / len(outcomes), sum(kls) / len(kls)
        rates = f"accuracy {accuracy:.3f}, {tokens / seconds:,.0f} tokens/s"
        print(f"{name}: {rates}, KL({name}||pi) {kl:.4f} per token")
        results[name] = grades, kl
    return results


if __name__ == "__main__":
    run_script(main, Config)
