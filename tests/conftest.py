import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where the cores are busy


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A warm-up checkpoint after 20 steps: enough for everything that does not measure accuracy."""
    import warmup

    out = tmp_path_factory.mktemp("runs") / "warmup"
    warmup.main(warmup.Config(out=str(out), steps=20, limit=400, test_limit=400))
    return out
