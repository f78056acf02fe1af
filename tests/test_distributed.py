"""Several processes: the same weights and numbers as one, the same files, and nobody is left waiting."""

import os
import signal
import socket
import time
import traceback
from pathlib import Path

import pytest
import torch
from families import random_hf_model
from safetensors.torch import load_file
from soak import TIMES
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import evaluate
import rl
import rollout
import warmup
from evaluate import read_metrics
from model import Decoder, load, process_group, rank, shard

pytestmark = pytest.mark.usefixtures("rewards_that_differ")
TINY = {"dtype": "float64", "limit": 40, "test_limit": 9, "max_new_tokens": 12, "micro_batch": 3}


def warm(out, **changes):
    """Two steps of warmup.py: 7 examples a step, so no number of processes divides them."""
    return warmup.main(warmup.Config(**({"out": str(out), "steps": 2, "batch": 7, "lr": 1e-3, **TINY} | changes)))


def reinforce(model, out, **changes):
    """Two steps of rl.py: 5 prompts and 10 completions of all lengths, in minibatches of 7 and 3."""
    flags = {"model": str(model), "out": str(out), "steps": 2, "skip_ratio": 0.25, "lr": 1e-2, "samples": 2}
    flags |= {"rollout_batch": 10, "minibatch": 7, "eval_every": 1, "seed": 3, "correction": "truncated"}
    return rl.main(rl.Config(**(TINY | flags | changes)))


def everything(model, folder):
    """All three stages; a test compares what they leave in `folder`."""
    warm(folder / "warmup", model=str(model))
    reinforce(model, folder / "rl")
    evaluate.main(evaluate.Config(runs=(str(folder / "rl"),), out=str(folder), samples=3, test_limit=3))


def launch(count: int, work, seconds: float = 60) -> list[int]:
    """Run work() in so many processes, as torchrun would; returns their exit codes. A fork needs no imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                with process_group():
                    work()
                code = 0
            except SystemExit as left:
                code = left.code
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < count:
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def numbers(run: Path) -> dict[str, torch.Tensor]:
    """Every weight, moment and metric that a run left behind."""
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    found = load_file(run / "model.safetensors") | torch.load(run / "value_head.pt", weights_only=True)
    found |= {f"resumed {name}": x for name, x in trainer["weights"].items()}
    for i, moments in trainer["optimizer"]["state"].items():
        found |= {f"{name} {i}": x for name, x in moments.items()}
    for record in read_metrics(run):
        known = {k: torch.tensor(v) for k, v in record.items() if k not in TIMES and v is not None}
        found |= {f"{k} at {record['step']}": v for k, v in known.items()}
    return found


def distance(one: Path, other: Path) -> float:
    """The largest difference between two runs."""
    a, b = numbers(one), numbers(other)
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a if a[name].numel())


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.fixture(scope="module")
def alone(small_run, rewards_that_differ, tmp_path_factory):
    """What one process makes of it, without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    everything(small_run, folder)
    return folder


def note_shares(monkeypatch, folder: Path):
    """Let every process write down how many completions of each training batch it sampled, and how many ended."""
    real_sample, real_total, summed = rl.sample, rollout.total, []

    def noting(*args, **options):
        summed.clear()
        batch = real_sample(*args, **options)
        mine = summed[0].any(1)  # of the tokens before they are added up; (N,)
        with (folder / str(rank())).open("a") as file:
            file.write(f"{int(mine.sum())} {int(batch.finished[mine].sum())}\n")
        return batch

    monkeypatch.setattr(rl, "sample", noting)
    monkeypatch.setattr(rollout, "total", lambda x: summed.append(x) or real_total(x))


def test_four_processes_give_the_weights_metrics_and_files_of_one(
    small_run, alone, tmp_path, tmp_path_factory, monkeypatch
):
    shares = tmp_path_factory.mktemp("shares")
    note_shares(monkeypatch, shares)
    assert launch(4, lambda: everything(small_run, tmp_path)) == [0] * 4
    assert distance(alone / "warmup", tmp_path / "warmup") < 1e-10
    assert distance(alone / "rl", tmp_path / "rl") < 1e-10
    assert files(tmp_path) == files(alone)
    for name in ("rl/samples.txt", "rl/evaluation.json", "warmup/evaluation.json"):
        assert (tmp_path / name).read_text() == (alone / name).read_text()
    records = read_metrics(tmp_path / "rl")
    assert max(record["grad_norm"] for record in records) > 1 and all(record["clip_fraction"] > 0 for record in records)
    first = [file.read_text().splitlines()[0] for file in sorted(shares.iterdir())]
    assert sum(line.startswith("4 ") for line in first) == 1  # five prompts: one process has two of them
    assert 0 < sum(line.endswith(" 0") for line in first) < 4  # at some processes no completion ended


@pytest.mark.parametrize("flags", [{"advantage": "group"}, {"objective": "self-training"}], ids=str)
def test_without_a_critic_two_processes_give_what_one_gives(small_run, tmp_path, monkeypatch, flags):
    real, rewards = rl.grade, torch.tensor([0.0, 0.0, 0.1, 0.0, 1.0, 0.0, 0.1, 0.1, 0.0, 0.0])
    monkeypatch.setattr(rl, "grade", lambda *args: real(*args)._replace(rewards=rewards))
    reinforce(small_run, tmp_path / "one", **flags)
    assert launch(2, lambda: reinforce(small_run, tmp_path / "two", **flags)) == [0, 0]
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-10
    assert read_metrics(tmp_path / "two")[0]["grad_norm"] > 0


def test_in_fp32_processes_differ_by_rounding_only(small_run, tmp_path):
    reinforce(small_run, tmp_path / "one", dtype="float32", steps=1)
    flags = {"dtype": "float32", "steps": 1, "gradient_checkpointing": True}
    assert launch(2, lambda: reinforce(small_run, tmp_path / "two", **flags)) == [0, 0]
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-2


def test_the_bf16_reference_can_be_sharded(small_run, tmp_path):
    assert launch(2, lambda: reinforce(small_run, tmp_path, dtype="bfloat16", steps=1)) == [0, 0]
    assert abs(read_metrics(tmp_path)[0]["kl_ref"]) < 1e-6


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_resumes_with_another_number_of_processes(small_run, alone, tmp_path, monkeypatch, before, after):
    real = warmup.Run.append
    with monkeypatch.context() as patch:  # Ctrl-C at the first process, in its first step
        stop = lambda *args: real(*args) or (rank() == 0 and os.kill(os.getpid(), signal.SIGINT))  # noqa: E731
        patch.setattr(warmup.Run, "append", stop)
        assert launch(before, lambda: reinforce(small_run, tmp_path)) == [130] * before
    assert len(read_metrics(tmp_path)) == 1
    assert launch(after, lambda: reinforce(small_run, tmp_path, resume=True)) == [0] * after
    assert distance(alone / "rl", tmp_path) < 1e-10


def test_sigterm_at_one_process_stops_all_with_a_whole_checkpoint(small_run, alone, tmp_path, monkeypatch):
    real = warmup.Run.append

    def hit(*args):
        real(*args)
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(warmup.Run, "append", hit)
    assert launch(3, lambda: reinforce(small_run, tmp_path)) == [143] * 3
    assert torch.load(tmp_path / "trainer.pt", weights_only=True)["state"]["step"] == 1
    monkeypatch.undo()
    reinforce(small_run, tmp_path, resume=True)
    assert distance(alone / "rl", tmp_path) < 1e-10


def test_no_process_finds_a_run_in_the_folder_that_another_one_has_just_begun(tmp_path, monkeypatch):
    real = warmup.Run.read
    monkeypatch.setattr(warmup.Run, "read", lambda run: time.sleep(rank()) or real(run))
    assert launch(2, lambda: warm(tmp_path, steps=1)) == [0, 0]


def test_a_loss_that_is_not_finite_on_one_process_changes_no_weight(small_run, tmp_path, monkeypatch):
    real = rl.policy_loss
    monkeypatch.setattr(rl, "policy_loss", lambda *args: real(*args) * (torch.nan if rank() == 1 else 1.0))
    assert launch(2, lambda: reinforce(small_run, tmp_path, steps=1)) == [0, 0]
    assert [record["nonfinite_updates"] for record in read_metrics(tmp_path)] == [4]
    assert all(
        torch.equal(x, load_file(small_run / "model.safetensors")[name].double())
        for name, x in load_file(tmp_path / "model.safetensors").items()
    )


def test_a_checkpoint_that_cannot_be_written_ends_all(small_run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(Decoder, "save_pretrained", full)
    assert launch(2, lambda: reinforce(small_run, tmp_path, steps=1)) == [1, 1]


def test_an_exception_in_one_process_ends_torchrun_with_its_message(small_run, tmp_path, monkeypatch, capfd):
    def gae(*args):
        raise KeyError("the power is gone")

    def work():
        if os.environ["RANK"] == "1":
            rl.gae = gae
        monkeypatch.setattr("sys.argv", ["rl.py", "--model", str(small_run), "--out", str(tmp_path / "rl"), *flags])
        try:
            rl.run_script(rl.main, rl.Config)
        except BaseException:
            traceback.print_exc()  # as at the end of a script
            raise

    flags = ["--limit", "40", "--test-limit", "9", "--rollout-batch", "8"]
    agent = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0, "start_method": "fork"}
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with pytest.raises(ChildFailedError):  # as torchrun does it, but forked: nothing to import
        elastic_launch(LaunchConfig(1, 1, 2, run_id="test", **agent), work)()
    for number, handler in handlers.items():  # torchrun leaves its own behind
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)
    assert "the power is gone" in capfd.readouterr().err


def test_each_process_keeps_its_part_of_weights_gradients_and_moments(small_run):
    decoder = load(small_run, None, None)
    size = sum(p.numel() for p in decoder.parameters())

    def check():
        shard(decoder)
        optimizer = torch.optim.AdamW(decoder.parameters())
        hidden = decoder(torch.arange(48).view(4, 12))
        (decoder.logits(hidden).sum() + decoder.values(hidden).sum()).backward()
        optimizer.step()
        parts = [list(decoder.parameters()), [p.grad for p in decoder.parameters()]]
        parts += [[moments[name] for moments in optimizer.state.values()] for name in ("exp_avg", "exp_avg_sq")]
        for part in parts:
            storages = {x.to_local().untyped_storage().data_ptr(): x.to_local().untyped_storage() for x in part}
            stored = sum(storage.nbytes() for storage in storages.values()) / 4  # fp32 numbers
            assert stored < 1.01 * size / 4 + len(part)  # a quarter, and padding

    assert launch(4, check) == [0] * 4


@pytest.mark.parametrize("family", ["qwen2", "opt"])  # a tied head; learned positions
def test_a_sharded_decoder_computes_and_saves_what_the_whole_one_does(tmp_path, family):
    random_hf_model(family).save_pretrained(tmp_path / "hf")
    decoder, tokens = Decoder.from_pretrained(tmp_path / "hf", torch.float64), torch.arange(24).view(2, 12)
    decoder.save_pretrained(tmp_path / "one")
    expected = decoder.logits(decoder(tokens)).detach()

    def check():
        shard(decoder)
        assert torch.equal(decoder.logits(decoder(tokens)), expected)
        weights = get_model_state_dict(decoder, options=warmup.WHOLE)  # on the first process
        if rank() == 0:
            decoder.save_pretrained(tmp_path / "two", weights)

    assert launch(2, check) == [0, 0]
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
