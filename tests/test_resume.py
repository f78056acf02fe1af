"""A run that is resumed: equal to the bit, or refused in one line that changes nothing."""

import json
import os
import shutil
import signal
import time

import pytest
from short_runs import (
    STAGES,
    after_step,
    crash,
    reinforce,
    snapshot,
    stop_in_step,
    train,
    warm,
)
from soak import soak, state

import warmup
from evaluate import read_metrics
from model import Decoder
from reward import InputError

pytestmark = pytest.mark.usefixtures("rewards_that_differ")


@pytest.fixture(scope="module")
def whole(small_run, rewards_that_differ, tmp_path_factory):
    """A run of rl.py that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "rl"
    reinforce(small_run, run)
    return run


@pytest.fixture(scope="module")
def half(small_run, rewards_that_differ, tmp_path_factory):
    """The first two of its four steps; tests copy it."""
    run = tmp_path_factory.mktemp("half") / "rl"
    stop_in_step(2, "rl", small_run, run)
    return run


@pytest.fixture
def run(half, tmp_path):
    """A copy of the half run."""
    return shutil.copytree(half, tmp_path / "run")


# ---- equal to the bit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("warmup", {"layer_dropout": 0.9, "eval_every": 2}),
        # a layer that no step before the stop has trained
        ("warmup", {"layer_dropout": 1.0, "skip_layers": "3", "skip_ratio": 0.125}),
        ("rl", {}),
        ("rl", {"advantage": "group"}),
        ("rl", {"objective": "self-training"}),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_and_resumed_equals_one_run(small_run, tmp_path, stage, flags):
    train(stage, small_run, tmp_path / "one", **flags)
    stop_in_step(2, stage, small_run, tmp_path / "two", **flags)
    train(stage, small_run, tmp_path / "two", resume=True, **flags)
    assert state(tmp_path / "two") == state(tmp_path / "one")


@pytest.mark.parametrize("step", [1, 3])  # before the first checkpoint, and behind it
def test_lines_behind_the_checkpoint_are_cut(small_run, whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        after_step(patch, step, crash)
        reinforce(small_run, tmp_path, save_every=2)
    assert len(read_metrics(tmp_path)) == step
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')  # half a line
    reinforce(small_run, tmp_path, resume=True)
    assert state(tmp_path) == state(whole)


def test_trainer_pt_and_the_logs_are_read_and_nothing_else(
    small_run, whole, run, tmp_path, monkeypatch
):
    for name in ("model.safetensors", "value_head.pt", "config.json"):
        (run / name).write_text("of another save")
    shutil.copytree(small_run, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    reinforce("./moved", "run", resume=True)
    assert state(run) == state(whole)


def test_flags_of_memory_and_saving_are_free(small_run, run):
    reinforce(small_run, run, resume=True, micro_batch=3, max_rows=4, save_every=1, eval_every=4)
    assert len(read_metrics(run)) == 4


def test_a_short_soak_ends_with_the_weights_of_an_undisturbed_run(small_run, tmp_path):
    hits = soak(small_run, tmp_path, minutes=0.05, steps=10, longest=0.6)
    assert hits.total() > 0


# ---- another number of steps ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "longer"),
    [("warmup", {"steps": 6}), ("warmup", {"epochs": 1.2}), ("rl", {"steps": 6})],
)
def test_more_steps_go_on_with_the_learning_rates_of_the_longer_run(
    small_run, tmp_path, monkeypatch, capsys, stage, longer
):
    rates, update = [], warmup.Run.update

    def noted(run, lr, loss):
        rates.append(lr)
        return update(run, lr, loss)

    monkeypatch.setattr(warmup.Run, "update", noted)
    longer = {"steps": None, **longer}
    train(stage, small_run, tmp_path / "long", **longer)
    expected = rates.copy()
    train(stage, small_run, tmp_path / "run")
    rates.clear()
    capsys.readouterr()
    train(stage, small_run, tmp_path / "run", resume=True, **longer)
    assert len(rates) == len(expected) / 3
    assert rates == expected[-len(rates) :]
    assert len(read_metrics(tmp_path / "run")) == 6
    line = "6 steps in place of 4: the learning rate goes on as in a run of 6 steps\n"
    assert capsys.readouterr().out.count(line) == 1


@STAGES
def test_fewer_steps_than_before_are_refused(small_run, tmp_path, stage):
    train(stage, small_run, tmp_path, steps=2)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="of a run of 2 steps, --steps 1 is fewer"):
        train(stage, small_run, tmp_path, steps=1, resume=True)
    assert snapshot(tmp_path) == before


# ---- refused, and left as it is ------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metrics.jsonl", None),  # of a run that has no checkpoint yet
        ("trainer.pt", "trainer.pt: cannot be read"),
        ("config.json", "no trainer.pt to resume; name another folder"),
        ("model.safetensors", "no trainer.pt"),
        ("tokenizer.json", "no trainer.pt"),
        ("evaluation.json", "no trainer.pt"),
    ],
)
def test_no_run_and_no_model_is_written_over(small_run, tmp_path, stage, name, words):
    (tmp_path / name).write_text("precious")
    holds = f"--out .* holds a run or a model .{name}.: --resume, or name another folder"
    with pytest.raises(InputError, match=holds):
        train(stage, small_run, tmp_path)
    if words:
        with pytest.raises(InputError, match=words):
            train(stage, small_run, tmp_path, resume=True)
    assert snapshot(tmp_path) == {tmp_path / name: b"precious"}


def refused(words, model, run, **flags):
    """Resuming is refused with these words, and changes nothing."""
    before = snapshot(run)
    with pytest.raises(InputError, match=words):
        reinforce(model, run, resume=True, **flags)
    assert snapshot(run) == before


@pytest.mark.parametrize(("flag", "value"), [("lr", 2e-3), ("seed", 1), ("limit", 39)])
def test_a_run_with_another_flag_is_refused_by_its_name(small_run, run, flag, value):
    name = flag.replace("_", "-")
    refused(f"of a run with other --{name} {value} ", small_run, run, **{flag: value})


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("generation_config.json", {"eos_token_id": [1, 5]}, "the test problems"),
        (
            "tokenizer.json",
            {"normalizer": {"type": "Lowercase"}},
            "their tokens, the test problems",
        ),
        ("model.safetensors", None, "the weights of --model"),
    ],
)
def test_other_tokens_ends_tests_and_weights_are_refused(
    small_run, run, tmp_path, file, change, words
):
    other = shutil.copytree(small_run, tmp_path / "other")
    if change:
        content = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps({**content, **change}))
    else:
        model = Decoder.from_pretrained(other)
        model.layers[3].mlp.down.weight.data[0, 0] += 1e-3
        model.save_pretrained(other)
    refused(f"of a run with other {words};", other, run)


def test_a_run_of_another_stage_is_refused(run):
    before = snapshot(run)
    with pytest.raises(InputError, match=r"written by rl\.py; warmup\.py cannot resume it"):
        warm(run, resume=True)
    assert snapshot(run) == before


def test_a_log_that_is_shorter_than_at_the_checkpoint_is_refused(small_run, run):
    os.truncate(run / "metrics.jsonl", 100)
    refused("metrics.jsonl: shorter", small_run, run)


def test_a_folder_is_one_process_s_until_it_dies(small_run, tmp_path):
    child = os.fork()
    if child == 0:
        warmup.Run.record = lambda *args: time.sleep(60)
        reinforce(small_run, tmp_path)
    while not (tmp_path / "run.json").exists():
        time.sleep(0.05)
    refused("--out .* is in use by another run", small_run, tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reinforce(small_run, tmp_path, resume=True, steps=1)


@pytest.mark.parametrize(
    ("stage", "flag", "size"),
    [("warmup", "batch", 41), ("warmup", "batch", 10**12), ("rl", "rollout_batch", 82)],
)
def test_a_batch_larger_than_the_data_is_refused_before_it_is_drawn(
    small_run, tmp_path, stage, flag, size
):
    name = flag.replace("_", "-")
    with pytest.raises(InputError, match=f"--{name} asks for .* there are 40"):
        train(stage, small_run, tmp_path / "run", **{flag: size})
    assert not (tmp_path / "run").exists()


def test_a_seed_that_is_too_large_is_refused():
    with pytest.raises(InputError, match=f"--seed is {2**64}, it must be between 0 and"):
        warmup.Config(seed=2**64)


def test_a_run_json_that_is_no_object_is_refused(small_run, tmp_path):
    model = shutil.copytree(small_run, tmp_path / "model")
    (model / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run\.json"):
        reinforce(model, tmp_path / "run")
