"""bench.py: what is counted, on both sides and at the limit. Nothing here depends on how fast anything is."""

import json

import pytest
import torch
from families import CONFIGS
from transformers import AutoModelForCausalLM

from bench import SHAPES, complete, generate, least_seconds
from model import Decoder
from rollout import Config, main, sample

PROMPTS = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 3, 12)]


def test_bench_measures_both_sides_and_every_ratio(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "toy", (32, 4, 4, 2, 48, 97, 16, 8, 12))
    flags = {"shapes": ["toy"], "rounds": 1, "skip_ratios": [0.25], "rollout_dtype": "bfloat16"}
    results = main(Config(bench=True, out=str(tmp_path), device="cpu", **flags))
    assert [row["workload"] for row in results["speeds"]] == ["fixed", "rl"]
    for row in results["speeds"]:
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["generate"])
        assert row["of_the_limit"] > 0 and 0 < row["largest_logp_gap"] < 0.1
    full, nested = results["skips"]
    assert full["of_the_ideal"] == 1 and nested["ideal"] == pytest.approx(1 / (1 - nested["layers"] / 4))
    assert json.loads((tmp_path / "bench.json").read_text()) == results
    assert "generate" in capsys.readouterr().out


def test_bench_counts_the_tokens_of_generate_up_to_the_first_eos(tmp_path):
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    work = {"prompts": PROMPTS, "num_samples": 2, "max_new_tokens": 6, "eos_id": []}
    assert generate(theirs, work, 0) == complete(decoder, work, 0).action_mask.sum() == 8 * 6
    assert generate(theirs, work | {"eos_id": list(range(97))}, 0) == 8
    assert 8 < generate(theirs, work | {"eos_id": list(range(30))}, 0) < 8 * 6


def test_the_limit_counts_weights_keys_and_values():
    decoder = Decoder(CONFIGS["qwen2"]())
    # every row sees 2 + 3 + 4 columns
    rollout = sample(decoder, [[5, 6]], num_samples=2, max_new_tokens=3, eos_id=[], pad_id=0)
    weights, head = sum(p.numel() for p in decoder.layers.parameters()), 97 * 32
    read = 3 * 4 * (weights + head) + 2 * 4 * 2 * 8 * 4 * (2 * 9)  # K and V, 4 layers, 2 heads of 8, fp32
    operations = 2 * (weights * (2 + 2 * 2) + head * 6) + 4 * 4 * 4 * 8 * (2 * 9)  # 4 layers, 4 heads of 8
    assert least_seconds(decoder, rollout, 2, 1.0, 1e9) == pytest.approx(read)
    assert least_seconds(decoder, rollout, 2, 1e9, 1.0) == pytest.approx(operations)
