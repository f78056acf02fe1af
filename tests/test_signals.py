"""A signal at any moment: what is being written is finished, and the run can be resumed."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from short_runs import STAGES, after_step, crash, reinforce, send, train
from soak import state

import warmup
from evaluate import read_metrics
from model import load

pytestmark = pytest.mark.usefixtures("rewards_that_differ")


def saved_step(run):
    """The step of the checkpoint in a run's folder."""
    return torch.load(run / "trainer.pt", weights_only=True)["state"]["step"]


def handlers():
    """What signals do."""
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def after_last_step(patch, run, owner, name, action):
    """Let action() happen once, when a function is called behind the last step."""
    real, calls = getattr(owner, name), []

    def hit(*args, **flags):
        is_last = (run / "metrics.jsonl").exists() and len(read_metrics(run)) == 4
        if name == "replace":  # files of the first save: trainer.pt is in place, others are not
            is_last = is_last and (run / "trainer.pt").exists()
        if is_last and not calls:
            calls.append(name)
            action()
        return real(*args, **flags)

    patch.setattr(owner, name, hit)


MOMENTS = [
    (warmup.Run, "save"),
    (torch, "save"),
    (os, "replace"),
    (warmup, "evaluate"),
    (warmup, "draw_curves"),
]


@pytest.mark.parametrize(("owner", "name"), MOMENTS, ids=str)
@pytest.mark.parametrize(
    ("stage", "number"), [("warmup", signal.SIGTERM), ("rl", signal.SIGINT)], ids=str
)
def test_a_signal_behind_the_last_step_leaves_a_run_that_opens_and_resumes(
    small_run, tmp_path, monkeypatch, capsys, owner, name, stage, number
):
    run = tmp_path / "a run"
    argv = [f"{stage}.py", "--out", str(run)]
    monkeypatch.setattr(sys, "argv", argv)
    usual = handlers()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        after_last_step(patch, run, owner, name, lambda: send(number))
        train(stage, small_run, run)
    assert stopped.value.code == 128 + number
    assert f"go on with: python {stage}.py --out '{run}' --resume\n" in capsys.readouterr().out
    assert handlers() == usual
    assert saved_step(run) == 4
    load(run, None, None)
    assert not (run / ".new").exists()
    before = state(run)
    train(stage, small_run, run, resume=True)
    assert state(run) == before
    assert (run / "evaluation.json").exists()
    assert re.search(f"next: python .* '{run}'\n", capsys.readouterr().out)


def broken_pipe(*args):
    """In `python rl.py 2>&1 | tee log` Ctrl-C ends tee, too."""
    raise BrokenPipeError


@pytest.mark.parametrize("count", [1, 2])  # torchrun passes on what a scheduler sent to all
def test_a_signal_in_a_step_ends_the_run_behind_it(small_run, tmp_path, monkeypatch, count):
    monkeypatch.setattr(os, "write", broken_pipe)
    after_step(monkeypatch, 2, lambda: [send(signal.SIGTERM) for _ in range(count)])
    with pytest.raises(SystemExit) as stopped:
        reinforce(small_run, tmp_path)
    assert stopped.value.code == 143
    assert saved_step(tmp_path) == len(read_metrics(tmp_path)) == 2
    assert not (tmp_path / "evaluation.json").exists()


def test_a_reader_that_leaves_does_not_end_a_run():
    code = """
import sys, time
from tqdm import tqdm
from evaluate import ParsedFlags
from rollout import run_script

def main(config):
    for _ in tqdm(range(3), mininterval=0):
        time.sleep(0.3)
        print("step", flush=True)
    sys.exit(130)

run_script(main, ParsedFlags)
"""
    command = [sys.executable, "-c", code]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.Popen(command, env=buffered, **pipes)
    run.stdout.read(1)
    run.stdout.close()
    assert run.wait(60) == 130


@STAGES
def test_a_step_that_raises_gives_the_handlers_back(small_run, tmp_path, monkeypatch, stage):
    before = handlers()
    after_step(monkeypatch, 2, crash)
    with pytest.raises(KeyError):
        train(stage, small_run, tmp_path)
    assert handlers() == before


@pytest.mark.parametrize("moment", ["in a step", "in the last save"])
def test_a_second_signal_leaves_at_once(small_run, tmp_path, monkeypatch, moment):
    def twice():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(warmup, "REPEAT_SECONDS", 0)
    if moment == "in a step":
        after_step(monkeypatch, 1, twice)
    else:
        after_last_step(monkeypatch, tmp_path, torch, "save", twice)
    child = os.fork()
    if child == 0:
        reinforce(small_run, tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert not (tmp_path / "trainer.pt").exists()
    monkeypatch.undo()
    reinforce(small_run, tmp_path, resume=True)
