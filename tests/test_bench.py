"""bench.py: what is counted, on both sides and at the limit. Nothing here depends on how fast anything is."""

import json

import pytest
import torch
from bench import SHAPES, Config, complete, generate, least_seconds, main, race, rate
from families import CONFIGS
from transformers import AutoModelForCausalLM

from model import Decoder
from reward import TASKS, InputError
from rollout import sample

PROMPTS = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 3, 12)]


def test_sides_take_turns_the_first_round_warms_up_and_the_others_are_pooled(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def side(name, seconds, number):
        calls.append((name, number))
        clock[0] += seconds[number]
        return 10 * (number + 1)

    sides = {"a": lambda n: side("a", (100, 1, 5), n), "b": lambda n: side("b", (7, 2, 2), n)}
    done = race(sides, 2)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: rate(rounds) for name, rounds in done.items()} == {"a": 50 / 6, "b": 50 / 4}


def test_bench_measures_both_sides_and_every_ratio(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "toy", (32, 4, 4, 2, 48, 97, 16, 8, 12))
    flags = {"shapes": ["toy"], "rounds": 1, "skip_ratios": [0.25], "dtype": "bfloat16", "device": "cpu"}
    results = main(Config(out=str(tmp_path), **flags))
    assert [(row["workload"], row["dtype"]) for row in results["speeds"]] == [
        (work, "bfloat16") for work in ("fixed", "rl")
    ]
    for row in results["speeds"]:
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["generate"])
        assert row["of_the_limit"] > 0
    full, nested, none = results["skips"]
    layers = 1 - full["tokens_per_second"] / none["tokens_per_second"]
    assert full["of_the_ideal"] == 1 and nested["ideal"] == pytest.approx(1 / (1 - layers / 4))
    assert none["of_the_ideal"] == pytest.approx(1)  # by definition
    assert json.loads((tmp_path / "bench.json").read_text()).items() >= results.items()
    assert "generate" in capsys.readouterr().out


def test_a_trained_model_gets_a_row_a_ratio_beside_the_full_one(toy_run, tmp_path, capsys):
    flags = {"skip_ratios": [0.25], "limit": 6, "rounds": 2, "max_new_tokens": 8, "max_rows": 4}
    full, nested = main(Config(model=str(toy_run), out=str(tmp_path), **flags))["skips"]
    assert (full["skip_ratio"], nested["skip_ratio"], nested["layers_skipped"]) == (0.0, 0.25, 2)
    assert full["speed_up"] == full["ideal"] == 1 and nested["ideal"] == 8 / 6
    assert full["kl_behav"] == 0 < nested["kl_behav"] and 0 <= nested["accuracy"] <= 1
    assert nested["speed_up"] == pytest.approx(nested["tokens_per_second"] / full["tokens_per_second"])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("0")]) == 2
    assert json.loads((tmp_path / "bench.json").read_text())["skips"][1] == nested
    assert (tmp_path / "skips.png").stat().st_size > 0


def test_every_task_and_both_kinds_of_programs_are_graded(tmp_path):
    rows = main(Config(grading=True, rounds=1, limit=2, out=str(tmp_path)))["grading"]
    programs = ["programs", "programs with sympy"]
    assert [row["what"] for row in rows] == [*(f"completions, {task}" for task in TASKS), *programs]
    assert all(row["per_second"] > 0 for row in rows)


@pytest.mark.parametrize("flags", [{"rounds": 0}, {"shapes": ["huge"]}], ids=str)
def test_flags_that_measure_nothing_are_refused(flags):
    with pytest.raises(InputError, match=f"--{next(iter(flags))}"):
        Config(**flags)


def test_bench_counts_the_tokens_of_generate_up_to_the_first_eos(tmp_path):
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    work = {"prompts": PROMPTS, "num_samples": 2, "max_new_tokens": 6, "eos_id": [], "pad_id": 0}
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
