"""Runs of a few steps, and what may happen to them."""

import os
import signal
from pathlib import Path

import pytest

import rl
import warmup

TINY = {"limit": 40, "test_limit": 9, "max_new_tokens": 12}
WARMUP = {"steps": 4, "batch": 8}
RL = {
    "steps": 4,
    "skip_ratio": 0.25,
    "lr": 1e-3,
    "rollout_batch": 8,
    "samples": 2,
    "minibatch": 4,
    "eval_every": 2,
}


def warm(out, **changes):
    """A few steps of warmup.py."""
    flags = {**TINY, **WARMUP, **changes}
    return warmup.main(warmup.Config(out=str(out), **flags))


def reinforce(model, out, **changes):
    """A few steps of rl.py, with all that it carries from batch to batch."""
    flags = {**TINY, **RL, **changes}
    return rl.main(rl.Config(model=str(model), out=str(out), **flags))


def train(stage, model, out, **changes):
    """A few steps of one of the two."""
    if stage == "warmup":
        return warm(out, **changes)
    return reinforce(model, out, **changes)


STAGES = pytest.mark.parametrize("stage", ["warmup", "rl"])


def after_step(patch, step, action):
    """Let action() happen when the record of a step (0: of any step) has been written."""
    record = warmup.Run.record

    def hit(run, *args):
        record(run, *args)
        if step in (0, run.state["step"]):
            action()

    patch.setattr(warmup.Run, "record", hit)


def send(number):
    """A signal to this process."""
    os.kill(os.getpid(), number)


def crash():
    """What nobody catches."""
    raise KeyError("the power is gone")


def stop_in_step(step, stage, *args, **flags):
    """A run that is stopped by Ctrl-C in one of its steps."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        after_step(patch, step, lambda: send(signal.SIGINT))
        train(stage, *args, **flags)


def snapshot(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
