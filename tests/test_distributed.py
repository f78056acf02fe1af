"""Several processes: the same numbers and files as one, and nobody is left waiting."""

import os
import signal
import socket
import time
import traceback

import pytest
import torch
from families import random_hf_model
from short_runs import after_step, reinforce, send, warm
from soak import without_measured
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import evaluate
import rl
import warmup
from evaluate import read_metrics
from model import Decoder, load, process_group, rank, shard

pytestmark = pytest.mark.usefixtures("rewards_that_differ")
SHARED = {"dtype": "float64", "steps": 2, "micro_batch": 3}
WARMUP = {**SHARED, "batch": 7}  # no number of processes divides it
# Five prompts, ten completions of all lengths, in minibatches of 7 and 3.
RL = {
    **SHARED,
    "lr": 1e-2,
    "rollout_batch": 10,
    "minibatch": 7,
}


def short_rl(model, out, **changes):
    """Two steps of rl.py."""
    reinforce(model, out, **{**RL, **changes})


def all_stages(model, folder):
    """What all three scripts leave in a folder."""
    warm(folder / "warmup", model=str(model), **WARMUP)
    short_rl(model, folder / "rl")
    runs = (str(folder / "rl"),)
    evaluate.main(evaluate.Config(runs=runs, out=str(folder), samples=3, test_limit=3))


def launch(count, work) -> list[int]:
    """Run work() in so many processes, as torchrun would; their exit codes (-14: it hung)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [os.fork() or join(number, count, port, work) for number in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def join(number, count, port, work):
    """One of the processes of `launch`; it does not return."""
    signal.alarm(120)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    for name in ("", "LOCAL_"):
        os.environ[f"{name}RANK"] = str(number)
        os.environ[f"{name}WORLD_SIZE"] = str(count)
    code = 0
    try:
        with process_group():
            work()
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def numbers(run):
    """Every weight, moment and metric that a run left."""
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    records = [without_measured(record) for record in read_metrics(run)]
    metrics = [{name: x or 0.0 for name, x in record.items()} for record in records]
    return [trainer["weights"], trainer["optimizer"]["state"], metrics]


def assert_equal(run, expected):
    """Two runs differ by rounding in float64 only."""
    torch.testing.assert_close(numbers(run), numbers(expected), rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def alone(small_run, rewards_that_differ, tmp_path_factory):
    """What one process makes of it, without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    all_stages(small_run, folder)
    return folder


def test_four_processes_give_the_numbers_and_files_of_one(small_run, alone, tmp_path):
    assert launch(4, lambda: all_stages(small_run, tmp_path)) == [0] * 4
    assert_equal(tmp_path / "warmup", alone / "warmup")
    assert_equal(tmp_path / "rl", alone / "rl")
    files = [sorted(path.relative_to(run) for path in run.rglob("*")) for run in (tmp_path, alone)]
    assert files[0] == files[1]
    for name in ("rl/samples.txt", "rl/evaluation.json", "warmup/evaluation.json"):
        assert (tmp_path / name).read_text() == (alone / name).read_text()
    record = read_metrics(alone / "rl")[0]
    assert min(record["grad_norm"], record["clip_fraction"]) > 0


def test_all_processes_skip_the_layers_that_the_first_one_has_measured(small_run, monkeypatch):
    # another rounding on another machine
    monkeypatch.setattr(warmup, "skip_pool", lambda *args: [1 + rank()])

    def agree():
        config = rl.Config(model=str(small_run), skip_ratio=0.25)
        assert warmup.nested_pool(load(small_run, None, None), config, list) == [1]

    assert launch(2, agree) == [0, 0]


@pytest.mark.parametrize("flags", [{"advantage": "group"}, {"objective": "self-training"}], ids=str)
def test_without_a_critic_two_processes_give_what_one_gives(small_run, tmp_path, flags):
    short_rl(small_run, tmp_path / "one", **flags)
    assert launch(2, lambda: short_rl(small_run, tmp_path / "two", **flags)) == [0, 0]
    assert_equal(tmp_path / "two", tmp_path / "one")


def test_the_bf16_reference_can_be_sharded(small_run, tmp_path):
    flags = {"dtype": "bfloat16", "gradient_checkpointing": True, "steps": 1}
    assert launch(2, lambda: short_rl(small_run, tmp_path, **flags)) == [0, 0]
    assert abs(read_metrics(tmp_path)[0]["kl_ref"]) < 1e-6


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1)])
def test_a_signal_to_one_process_stops_all_and_another_number_of_them_resumes(
    small_run, alone, tmp_path, before, after
):
    def stopped():
        with pytest.MonkeyPatch.context() as patch:
            after_step(patch, 1, lambda: rank() == before - 1 and send(signal.SIGTERM))
            short_rl(small_run, tmp_path)

    assert launch(before, stopped) == [143] * before
    assert len(read_metrics(tmp_path)) == 1
    assert launch(after, lambda: short_rl(small_run, tmp_path, resume=True)) == [0] * after
    assert_equal(tmp_path, alone / "rl")


def test_a_signal_that_comes_to_one_process_after_another_is_one(small_run, tmp_path, monkeypatch):
    save = warmup.Run.save

    def late(run):
        if rank() == 1:  # it knows already that the first process was asked to stop
            send(signal.SIGTERM)
        save(run)

    monkeypatch.setattr(warmup.Run, "save", late)
    after_step(monkeypatch, 1, lambda: rank() == 0 and send(signal.SIGTERM))
    assert launch(2, lambda: short_rl(small_run, tmp_path)) == [143, 143]
    assert (tmp_path / "trainer.pt").exists()


def test_no_process_takes_a_folder_that_another_has_begun_for_a_run(tmp_path, monkeypatch):
    open_folder = warmup.Run.open_folder

    def slow(run):
        time.sleep(rank())
        return open_folder(run)

    monkeypatch.setattr(warmup.Run, "open_folder", slow)
    assert launch(2, lambda: warm(tmp_path, steps=1)) == [0, 0]


def test_a_loss_that_is_not_finite_on_one_process_stops_the_update_of_all(
    small_run, tmp_path, monkeypatch
):
    policy_loss = rl.policy_loss

    def spoiled(*args):
        return policy_loss(*args) * (torch.nan if rank() == 1 else 1.0)

    monkeypatch.setattr(rl, "policy_loss", spoiled)
    assert launch(2, lambda: short_rl(small_run, tmp_path, steps=1)) == [0, 0]
    assert read_metrics(tmp_path)[0]["nonfinite_updates"] == 4


@pytest.mark.parametrize(
    ("owner", "name", "number"), [(Decoder, "save_pretrained", 0), (rl, "gae", 1)]
)
def test_an_error_in_one_process_ends_all(small_run, tmp_path, monkeypatch, owner, name, number):
    real = getattr(owner, name)

    def fail(*args):
        if rank() == number:
            raise OSError("the disk is full")
        return real(*args)

    monkeypatch.setattr(owner, name, fail)
    assert launch(2, lambda: short_rl(small_run, tmp_path, steps=1)) == [1, 1]


def test_each_process_keeps_its_part_of_the_weights(small_run):
    model = load(small_run, None, None)
    size = sum(p.numel() for p in model.parameters())

    def check():
        shard(model)
        parts = [p.to_local().numel() for p in model.parameters()]
        assert sum(parts) < 1.01 * size / 4 + len(parts)  # a quarter, and rounding

    assert launch(4, check) == [0] * 4


@pytest.mark.parametrize("family", ["qwen2", "opt"])  # a tied head; learned positions
def test_a_sharded_decoder_computes_and_saves_what_the_whole_one_does(tmp_path, family):
    random_hf_model(family).save_pretrained(tmp_path / "hf")
    model = Decoder.from_pretrained(tmp_path / "hf", torch.float64)
    tokens = torch.arange(24).view(2, 12)
    model.save_pretrained(tmp_path / "one")
    expected = model.logits(model(tokens)).detach()

    def check():
        shard(model)
        assert torch.equal(model.logits(model(tokens)), expected)
        weights = get_model_state_dict(model, options=warmup.UNSHARDED)  # on the first process
        if rank() == 0:
            model.save_pretrained(tmp_path / "two", weights)

    assert launch(2, check) == [0, 0]
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
