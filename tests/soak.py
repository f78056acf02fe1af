"""Kill and resume rl.py at random moments, then compare it with a run that nobody disturbed: they must be equal to the bit.

python tests/soak.py --minutes 30
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import rl  # noqa: E402
import warmup  # noqa: E402
from rollout import run_script  # noqa: E402

FLAGS = "--skip-ratio 0.25 --target-kl-behav 0.02 --rollout-batch 16 --minibatch 8 --max-new-tokens 24 --samples 2"
FLAGS += " --limit 400 --test-limit 64"  # or each start would generate 48,000 problems
TIMES = {"seconds", "rollout_seconds", "update_seconds", "rollout_tokens_per_second", "tokens_per_second"}
TIMES |= {"peak_memory_gb"}


def script(module, *argv) -> multiprocessing.Process:
    """Start one of the project's scripts, its output thrown away. A fork needs no imports: it trains sooner."""

    def work():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        # what a shell starts in the background ignores Ctrl-C, and hands that on; a fork has its parent's handlers
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = [module.__file__, *map(str, argv)]
        run_script(module.main, module.Config)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def left(process) -> int:
    """Wait for it; its exit code."""
    process.join()
    return process.exitcode


def state(run: Path) -> dict:
    """What must be equal in two runs: weights, optimizer, counters, samples, metrics without times and memory."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    return {
        "weights": (run / "model.safetensors").read_bytes(),
        "value head": (run / "value_head.pt").read_bytes(),
        "trainer's weights": {name: weight.tolist() for name, weight in trainer["weights"].items()},
        "optimizer": {(i, k): v.tolist() for i, m in trainer["optimizer"]["state"].items() for k, v in m.items()},
        "counters": {name: value for name, value in trainer["state"].items() if name not in TIMES},
        "samples": [file.read_text() for file in run.glob("samples.txt")],  # rl.py alone writes some
        "metrics": [{k: v for k, v in record.items() if k not in TIMES} for record in records],
    }


def soak(folder: Path, minutes: float, steps: int, longest: float = 10.0) -> Counter:
    """Disturb a run for so many minutes or until its end; returns how often it was hit by which signal, or asserts.

    A signal comes up to `longest` seconds after the process has opened the folder: in a step, in a save, between them.
    """
    source, disturbed, quiet = (folder / name for name in ("warmup", "disturbed", "quiet"))
    if not source.exists():
        assert left(script(warmup, "--out", source, "--steps", 40, "--limit", 400, "--test-limit", 64)) == 0
    flags = ["--model", source, *FLAGS.split(), "--save-every", 1, "--steps", steps]
    undisturbed = script(rl, *flags, "--out", quiet)
    hits, dice, end = Counter(), random.Random(0), time.monotonic() + 60 * minutes
    while time.monotonic() < end or not (disturbed / "trainer.pt").exists():
        (disturbed / "run.json").unlink(missing_ok=True)
        run = script(rl, *flags, "--out", disturbed, "--resume")
        while run.is_alive() and not (disturbed / "run.json").exists():
            time.sleep(0.02)
        time.sleep(dice.uniform(0, longest))
        number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if run.is_alive():
            os.kill(run.pid, number)
        code = left(run)
        if code == 0:
            break
        assert code in (-number, 128 + number), f"left with {code} after {number.name}"
        hits[number.name] += 1
    steps = torch.load(disturbed / "trainer.pt", weights_only=True)["state"]["step"]
    assert left(script(rl, *flags, "--out", disturbed, "--resume")) == left(undisturbed) == 0
    expected = state(quiet)
    for name, value in state(disturbed).items():
        assert value == expected[name], f"{name} differ, disturbed for {steps} steps by {hits.total()} hits"
    hits["steps"] = steps
    return hits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    torch.set_num_threads(1)  # the same sums on a busy machine as on an idle one
    with tempfile.TemporaryDirectory() as folder:
        minutes = parser.parse_args().minutes
        print("equal to the bit:", dict(soak(Path(folder), minutes, steps=int(200 * minutes))))
