import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where the cores are busy


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """A figure takes longer than a short run: curves.png is empty but in the test that sets the real function again."""
    with pytest.MonkeyPatch.context() as patch:
        if "warmup" in sys.modules:
            patch.setattr("warmup.draw_curves", lambda run, keys: (run / "curves.png").touch())
        yield


@pytest.fixture(scope="session", autouse=True)
def main_job(request, tmp_path_factory):
    """The README's two commands, shortened, on a core beside the other tests; the end-to-end test waits for them."""
    if not any(item.name.startswith("test_end_to_end") for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("main_job")
    warmup, rl = (f"exec {sys.executable} {PROJECT / name}.py" for name in ("warmup", "rl"))
    commands = f"({warmup} --steps 1200) && {rl} --steps 16 --skip-ratio 0.25"
    with (folder / "log").open("w") as log:
        quiet = {"stdout": log, "stderr": log, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True}
        job = subprocess.Popen(commands, shell=True, cwd=folder, **quiet)
    yield folder, job
    if job.poll() is None:
        os.killpg(job.pid, 9)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A warm-up checkpoint after 20 steps: enough for everything that does not measure accuracy."""
    import warmup

    out = tmp_path_factory.mktemp("runs") / "warmup"
    warmup.main(warmup.Config(out=str(out), steps=20, limit=400, test_limit=8))
    return out
