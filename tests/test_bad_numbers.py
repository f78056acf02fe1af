"""Losses and gradients that are not finite change no weight; three steps of them end a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from short_runs import STAGES, after_step, train

import rl
import warmup
from evaluate import read_metrics

pytestmark = pytest.mark.usefixtures("rewards_that_differ")


def train_with_bad_steps(stage, model, run, bad):
    """Six steps some of whose losses are nan, with gradients that are finite."""
    owner, name = (rl, "policy_loss") if stage == "rl" else (warmup, "token_logp")
    real, done = getattr(owner, name), []

    def spoiled(*args):
        is_bad = len(done) + 1 in bad
        return real(*args) + (torch.nan if is_bad else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 0, lambda: done.append(1))
        patch.setattr(owner, name, spoiled)
        train(stage, model, run, steps=6, save_every=1)


@pytest.mark.parametrize(
    ("stage", "loss", "updates"),
    [("warmup", "loss", 1), ("rl", "policy_loss", 4)],  # two passes over two minibatches
)
def test_bad_steps_make_no_update_and_a_good_one_lets_the_run_go_on(
    small_run, tmp_path, stage, loss, updates
):
    train_with_bad_steps(stage, small_run, tmp_path, {1, 2, 4, 5})
    records = read_metrics(tmp_path)
    bad = [record["nonfinite_updates"] for record in records]
    assert bad == [updates, updates, 0] * 2
    assert [record[loss] is None for record in records] == [True, True, False] * 2


@STAGES
def test_three_bad_steps_in_a_row_end_a_run_and_replace_no_checkpoint(small_run, tmp_path, stage):
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to 4, had numbers that"):
        train_with_bad_steps(stage, small_run, tmp_path, {2, 3, 4})
    assert len(read_metrics(tmp_path)) == 4
    assert torch.load(tmp_path / "trainer.pt", weights_only=True)["state"]["step"] == 1


@pytest.mark.parametrize(
    ("gradient", "loss"),
    [
        (torch.inf, 1.0),
        (torch.nan, 1.0),
        (2.0, torch.nan),
        (2.0, torch.inf),
    ],
)
def test_an_update_that_is_not_finite_changes_no_weight_and_no_moment(gradient, loss):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    run = SimpleNamespace(model=model, optimizer=optimizer, nonfinite_updates=0)

    def update(gradient, loss):
        model.weight.grad = torch.tensor([[1.0, gradient]])
        return warmup.Run.update(run, 0.1, torch.tensor(loss))

    def numbers():
        moments = optimizer.state[model.weight].values()
        return [x.detach().clone() for x in (model.weight, *moments)]

    assert update(1.0, 1.0) > 1
    before = numbers()
    assert math.isnan(update(gradient, loss))
    torch.testing.assert_close(numbers(), before, rtol=0, atol=0)
    assert model.weight.grad is None
    assert run.nonfinite_updates == 1
    assert update(1.0, 1.0) > 1
    assert not torch.equal(numbers()[0], before[0])
