"""Checkpoints are whole or absent, on a full disk and after a kill at any moment."""

import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from short_runs import after_step, reinforce, snapshot

import warmup
from model import load
from reward import InputError


def values(tensors) -> set[float]:
    """The numbers that occur in tensors."""
    return {x.item() for tensor in tensors for x in tensor.unique()}


def saved_numbers(run) -> tuple[int, set[float]]:
    """The number of which trainer.pt is made, and those of the other files. None is a mixture."""
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    moments = [own["exp_avg"] for own in trainer["optimizer"]["state"].values()]
    number = trainer["state"]["step"]
    assert values(moments) == values(trainer["weights"].values()) == {number}
    load(run, None, None)  # config, tokenizer and weights can be opened
    weights = values(load_file(run / "model.safetensors").values())
    head = values(torch.load(run / "value_head.pt", weights_only=True).values())
    assert len(weights) == len(head) == 1
    return number, weights | head


@pytest.fixture
def saver(small_run, tmp_path):
    """save(number), which makes every weight and moment that number, and the folder."""
    model = load(small_run, None, None)
    config = warmup.Config(model=str(small_run), out=str(tmp_path / "run"), test_limit=2)
    run = warmup.Run("warmup", config, model, warmup.fingerprint([], [], None), 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()

    def save(number):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        for moments in run.optimizer.state.values():
            moments["exp_avg"].fill_(number)
        run.state["step"] = number
        run.save()

    return save, run.out


def test_kill_9_at_any_moment_leaves_whole_files(saver):
    save, run = saver
    save(0)
    started = time.perf_counter()
    save(0)
    seconds = time.perf_counter() - started
    last = has_advanced = 0
    for attempt in range(12):
        child = os.fork()  # no imports: it saves from its first moment on
        if child == 0:
            for number in range(last + 1, last + 10_000):
                save(number)
        time.sleep(seconds * (0.2 + 0.3 * attempt))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        number, others = saved_numbers(run)
        assert number >= last
        assert others <= {number, number + 1}
        has_advanced |= number > last
        last = number
    assert has_advanced  # or the kills came before anything was saved


def test_all_is_on_the_disk_before_a_file_moves_and_trainer_pt_comes_first_or_last(
    saver, monkeypatch
):
    save, run = saver
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(number):
        events.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def noted_replace(source, target):
        if Path(target).parent == run:
            events.append(("moved", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    for number, place in ((1, 0), (2, -1)):  # what a kill leaves of a first save can be resumed
        events.clear()
        save(number)
        moved = [event[1] for event in events if isinstance(event, tuple)]
        synced = events[: events.index(("moved", moved[0]))]
        assert {"metrics.jsonl", *moved} <= set(synced)
        assert moved[place] == "trainer.pt"


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(saver):
    save, run = saver
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, words in ((0, "there is none yet"), (1, "the one before stays")):
        files = snapshot(run)
        for size in (1500, 150_000):  # config.json fits; model.safetensors fits
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                with pytest.raises(InputError, match=rf"no checkpoint \(.*\); {words}"):
                    save(5)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert snapshot(run) == files
            assert not (run / ".new").exists()
        save(number)
        assert saved_numbers(run) == (number, {number})


def test_without_save_every_no_checkpoint_is_older_than_half_an_hour(
    small_run, tmp_path, monkeypatch
):
    steps, saves, save = [], [], warmup.Run.save

    def noted_save(run):
        saves.append(run.state["step"])
        save(run)

    after_step(monkeypatch, 0, lambda: steps.append(700))
    fake = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: sum(steps))
    monkeypatch.setattr(warmup, "time", fake)
    monkeypatch.setattr(warmup.Run, "save", noted_save)
    reinforce(small_run, tmp_path, steps=7)
    assert saves == [3, 6, 7]


def test_a_figure_that_cannot_be_written_takes_no_numbers_with_it(
    small_run, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(warmup, "draw_curves", full)
    with pytest.raises(OSError, match="disk"):
        reinforce(small_run, tmp_path / "out")
    assert "greedy accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "evaluation.json").exists()
