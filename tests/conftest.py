"""What the tests share; tests/README.md says in which order to read them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "tools")]

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much on a busy machine


def pytest_collection_modifyitems(items):
    """What keeps two cores busy comes last: until then the main job has one of them."""
    items.sort(key=lambda item: item.path.stem in ("test_distributed", "test_sandbox"))


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """A figure takes longer than a short run; a test of figures sets the real function again."""
    with pytest.MonkeyPatch.context() as patch:
        if "warmup" in sys.modules:
            patch.setattr("warmup.draw_curves", lambda run, keys: (run / "curves.png").touch())
        yield


@pytest.fixture(scope="session", autouse=True)
def main_job(request, tmp_path_factory):
    """The README's two commands, shortened, on a core beside the other tests.

    The folder and the process; None where no end-to-end test was asked for.
    """
    if not any(item.name.startswith("test_end_to_end") for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("main_job")
    warmup = f"{sys.executable} {PROJECT}/warmup.py --steps 700"
    rl = f"{sys.executable} {PROJECT}/rl.py --steps 12 --skip-ratio 0.25"
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(
            f"{warmup} && exec {rl}",
            shell=True,
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    yield folder, job
    if job.poll() is None:
        os.killpg(job.pid, 9)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A warm-up checkpoint after 20 steps: enough for all that does not measure accuracy."""
    import warmup

    out = tmp_path_factory.mktemp("runs") / "warmup"
    warmup.main(warmup.Config(out=str(out), steps=20, limit=400, test_limit=8))
    return out


@pytest.fixture(scope="session")
def small_run(toy_run, tmp_path_factory):
    """Four narrow random layers under the tokenizer of toy_run.

    Many ids end a completion, so that all lengths occur.
    """
    from transformers import LlamaConfig

    from model import Decoder, load

    torch.manual_seed(0)
    model = Decoder(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=600,
            max_position_embeddings=256,
            initializer_range=0.5,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=list(range(1, 600, 9)),
        )
    )
    model.files = load(toy_run, None, None).files
    out = tmp_path_factory.mktemp("runs") / "small"
    model.save_pretrained(out)
    (out / "run.json").write_bytes((toy_run / "run.json").read_bytes())
    return out


@pytest.fixture(scope="module")
def rewards_that_differ():
    """Completion n has no answer, is right, or is wrong, in turn.

    Barely trained checkpoints earn nothing: no advantages, and no gradient.
    """
    import rl

    real = rl.grade

    def varied(*args):
        grades = real(*args)
        outcomes = [("no_answer", "right", "wrong")[n % 3] for n in range(len(grades.texts))]
        return grades._replace(outcomes=outcomes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "grade", varied)
        yield
