"""What saves memory changes no number; where it ends, one line says which flags to turn."""

import pytest
import torch
from short_runs import reinforce
from torch.utils.checkpoint import checkpoint

import rl
import warmup
from model import load
from reward import InputError
from rollout import run_script

TOKENS = torch.arange(48).view(4, 12)


def backward(model):
    """Bytes that autograd keeps for the backward pass, and the gradients."""
    sizes = []

    def keep(x):
        sizes.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.logits(model(TOKENS)).logsumexp(-1).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return sum(sizes), gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(small_run, dtype):
    model = load(small_run, None, dtype)
    many, expected = backward(model)
    model.gradient_checkpointing = True
    few, found = backward(model)
    assert few < 0.55 * many
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_flag_checkpoints_every_layer_of_every_training_pass(small_run, tmp_path, monkeypatch):
    calls = []

    def noted(*args, **flags):
        calls.append(args)
        return checkpoint(*args, **flags)

    monkeypatch.setattr("model.checkpoint", noted)
    reinforce(small_run, tmp_path / "off", steps=1)
    assert not calls
    reinforce(small_run, tmp_path / "on", steps=1, gradient_checkpointing=True)
    assert len(calls) == 4 * 4  # passes of four layers


def test_the_bf16_reference_gives_the_same_numbers_in_half_the_memory(small_run):
    model, reference = (load(small_run, None, "bfloat16") for _ in range(2))
    rl.freeze(reference)
    assert torch.equal(model.logits(model(TOKENS)), reference.logits(reference(TOKENS)))
    assert reference.layers[0].mlp.up.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in reference.parameters())


FULL = "error: out of memory; lower --micro-batch, --max-rows or --max-new-tokens, or train with"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 2, FULL),
        (MemoryError(), 2, FULL),
        (None, 2, FULL),  # of the CPU
        (InputError("why"), 2, "error: why"),
        (OSError("why"), 1, "error: why"),
        (FloatingPointError("why"), 1, "error: why"),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("shapes do not match"), None, ""),  # is not hidden
    ],
    ids=str,
)
def test_each_way_to_fail_has_its_exit_code_and_one_line(monkeypatch, capsys, error, code, line):
    def fail(config):
        if error is None:
            torch.empty(2**60)
        raise error

    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises((SystemExit, RuntimeError)) as stopped:
        run_script(fail, warmup.Config)
    assert getattr(stopped.value, "code", None) == code
    assert capsys.readouterr().err.startswith(line)
