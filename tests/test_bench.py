"""bench.py: what is counted on both sides. Nothing here depends on how fast anything is."""

import json

import bench
import pytest
from families import CONFIGS
from transformers import AutoModelForCausalLM

from model import Decoder
from reward import TASKS
from rollout import sample


def run(tmp_path, **flags):
    """The tables in bench.json."""
    bench.main(bench.Config(out=str(tmp_path), device="cpu", rounds=1, **flags))
    return json.loads((tmp_path / "bench.json").read_text())


def test_sides_take_turns_the_first_round_warms_up_and_the_others_are_pooled(monkeypatch):
    now = 0.0
    turns = []
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def side(number, seconds):
        nonlocal now
        turns.append(seconds[number])
        now += seconds[number]
        return 10 * (number + 1)

    sides = {
        "a": lambda number: side(number, (100, 1, 5)),
        "b": lambda number: side(number, (7, 2, 3)),
    }
    assert bench.race(sides, 2) == {"a": 50 / 6, "b": 50 / 5}
    assert turns == [100, 7, 1, 2, 5, 3]


def test_a_random_model_has_both_workloads_and_for_every_ratio_the_ideal(tmp_path, monkeypatch):
    speeds = {"sample": 200.0, "generate": 100.0, "training": 30.0, "products": 60.0}
    speeds |= {(0.0, "identity"): 50.0, (0.25, "identity"): 60.0, "none": 200.0}
    speeds |= {(0.0, "linear"): 49.0, (0.25, "linear"): 55.0}

    def race(sides, rounds):
        assert all(side(1) > 0 for side in sides.values())
        return {name: speeds[name] for name in sides}

    monkeypatch.setattr(bench, "race", race)
    monkeypatch.setitem(bench.WORK, "toy", (16, 8, 12))
    tables = run(tmp_path, skip_ratios=[0.25], dtype="bfloat16")
    assert [row["workload"] for row in tables["workloads"]] == ["fixed", "rl"]
    assert [row["ratio"] for row in tables["workloads"]] == [2, 2]
    assert tables["training"][0]["share"] == 0.5
    full, nested = tables["skips"]
    assert full["ideal"] == full["identity"] == 50
    assert nested["layers_skipped"] == 2
    assert (nested["identity"], nested["linear"]) == (60, 55)
    # A quarter of the layers, which take three quarters of the time.
    assert nested["ideal"] == pytest.approx(50 / (1 - 0.25 * 0.75))
    assert (tmp_path / "skips.png").stat().st_size > 0


def test_every_task_and_both_kinds_of_programs_are_graded(tmp_path):
    rows = run(tmp_path, grading=True, test_limit=2)["grading"]
    assert len(rows) == len(TASKS) + 2
    assert all(row["per_second"] > 0 for row in rows)


def test_tokens_of_generate_count_up_to_the_first_eos(tmp_path):
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = [[5, 6, 7], [8], [9] * 12, [1, 2]]
    work = {"prompts": prompts, "num_samples": 2, "max_new_tokens": 6, "pad_id": 0}
    ours = sample(decoder, **work, eos_id=[])
    assert bench.count_sampled(ours) == 8 * 6

    def count(eos_id):
        return bench.generate(theirs, {**work, "eos_id": eos_id}, 0)

    assert count([]) == 8 * 6
    assert count(list(range(97))) == 8
    assert 8 < count(list(range(30))) < 8 * 6
