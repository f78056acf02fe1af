"""Kill and resume rl.py at random moments: it must end as a run that nobody disturbed, to the bit.

python tests/tools/soak.py --model runs/warmup --minutes 30
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

sys.path.insert(0, str(Path(__file__).parents[2]))

import rl
from rollout import run_script

FLAGS = (
    "--limit 400 --test-limit 64 "  # or each start would generate 48,000 problems
    "--skip-ratio 0.25 --skip-with linear --save-every 1 "
    "--rollout-batch 16 --minibatch 8 --max-new-tokens 24 --samples 2"
)
MEASURED = ("seconds", "per_second", "memory_gb")  # ends of names


def start(*argv) -> multiprocessing.Process:
    """rl.py, its output thrown away. A fork needs no imports: it trains sooner."""

    def work():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        # A fork has its parent's handlers, and a shell lets background jobs ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["rl.py", *map(str, argv)]
        run_script(rl.main, rl.Config)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def exit_code(process) -> int:
    """Wait for a process to end."""
    process.join()
    return process.exitcode


def state(run: Path) -> dict:
    """What must be equal in two runs: all but times and memory."""
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    moments = {
        (number, name): x.tolist()
        for number, own in trainer["optimizer"]["state"].items()
        for name, x in own.items()
    }
    return {
        "files": [(run / name).read_bytes() for name in ("model.safetensors", "value_head.pt")],
        "weights": {name: x.tolist() for name, x in trainer["weights"].items()},
        "moments": moments,
        "counters": without_measured(trainer["state"]),
        "samples": [file.read_text() for file in run.glob("samples.txt")],  # of rl.py alone
        "metrics": [without_measured(record) for record in records],
    }


def without_measured(record: dict) -> dict:
    """What two equal runs have in common."""
    return {name: value for name, value in record.items() if not name.endswith(MEASURED)}


def soak(model: Path, folder: Path, minutes: float, steps: int, longest: float = 10.0) -> Counter:
    """Disturb a run for so many minutes or until its end; returns the signals it got, or asserts.

    A signal comes up to `longest` seconds after a start: in a step, in a save, between them.
    """
    disturbed, quiet = folder / "disturbed", folder / "quiet"
    flags = ["--model", model, "--steps", steps, *FLAGS.split()]
    undisturbed = start(*flags, "--out", quiet)
    resumed = [*flags, "--out", disturbed, "--resume"]
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    hits, rng, end = Counter(), random.Random(0), time.monotonic() + 60 * minutes
    while time.monotonic() < end or not (disturbed / "trainer.pt").exists():
        (disturbed / "run.json").unlink(missing_ok=True)
        process = start(*resumed)
        while process.is_alive() and not (disturbed / "run.json").exists():
            time.sleep(0.02)
        time.sleep(rng.uniform(0, longest))
        number = rng.choice(signals)
        if process.is_alive():
            os.kill(process.pid, number)
        code = exit_code(process)
        if code == 0:
            break
        assert code in (-number, 128 + number), f"exit code {code} after {number.name}"
        hits[number.name] += 1
    assert exit_code(start(*resumed)) == 0
    assert exit_code(undisturbed) == 0
    assert state(disturbed) == state(quiet), dict(hits)
    return hits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", type=Path, default="runs/warmup", help="a warm-up run")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # the same sums on a busy machine as on an idle one
    with tempfile.TemporaryDirectory() as folder:
        hits = soak(flags.model, Path(folder), flags.minutes, int(200 * flags.minutes))
        print("equal to the bit:", dict(hits))
