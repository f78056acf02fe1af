import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where the cores are busy


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """A figure takes longer than a short run: curves.png is empty but in the test that sets the real function again."""
    with pytest.MonkeyPatch.context() as patch:
        if "warmup" in sys.modules:
            patch.setattr("warmup.draw_curves", lambda run, keys: (run / "curves.png").touch())
        yield


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A warm-up checkpoint after 20 steps: enough for everything that does not measure accuracy."""
    import warmup

    out = tmp_path_factory.mktemp("runs") / "warmup"
    warmup.main(warmup.Config(out=str(out), steps=20, limit=400, test_limit=8))
    return out
