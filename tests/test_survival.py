"""Runs that survive: resume to the bit, saves that are whole or absent, signals, numbers gone bad, memory."""

import json
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from soak import TIMES, soak, state

import rl
import warmup
from evaluate import read_metrics
from model import Decoder, load
from reward import InputError
from rollout import sample

TINY = {"limit": 40, "max_new_tokens": 12}


def warm(out, **changes):
    """A few steps of warmup.py."""
    return warmup.main(warmup.Config(**({"out": str(out), "steps": 4, "batch": 8, **TINY} | changes)))


def reinforce(model, out, **changes):
    """A few steps of rl.py, with all that it carries from batch to batch."""
    flags = {"model": str(model), "out": str(out), "steps": 4, "skip_ratio": 0.25, "target_kl_behav": 0.02, "lr": 1e-3}
    flags |= {"rollout_batch": 8, "samples": 2, "minibatch": 4, "eval_every": 2, **TINY}
    return rl.main(rl.Config(**(flags | changes)))


def whole(run):
    """What must be equal in two runs of warmup.py."""
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    moments = [v.tolist() for m in trainer["optimizer"]["state"].values() for v in m.values()]
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run)]
    return (run / "model.safetensors").read_bytes(), moments, records, trainer["step"]


def hit_at(monkeypatch, module, step, what):
    """Let `what()` happen when the record of a step has been written."""
    real = warmup.append_record

    def hit(file, record):
        real(file, record)
        if record["step"] == step and file.name == "metrics.jsonl":
            what()

    monkeypatch.setattr(module, "append_record", hit)


def crash():
    raise KeyError("the power is gone")


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_dropout", [0.0, 0.9])
def test_warm_up_stopped_and_resumed_equals_one_run_to_the_bit(tmp_path, monkeypatch, layer_dropout):
    flags = {"layer_dropout": layer_dropout, "eval_every": 1}
    warm(tmp_path / "one", **flags)
    with monkeypatch.context() as patch:
        hit_at(patch, warmup, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            warm(tmp_path / "two", **flags)
    assert len(read_metrics(tmp_path / "two")) == 2
    warm(tmp_path / "two", resume=True, **flags)
    assert whole(tmp_path / "two") == whole(tmp_path / "one")


@pytest.mark.parametrize("correction", ["truncated", "prefix"])
def test_rl_stopped_and_resumed_equals_one_run_to_the_bit(toy_run, tmp_path, monkeypatch, correction):
    reinforce(toy_run, tmp_path / "one", correction=correction)
    reinforce(toy_run, tmp_path / "two", correction=correction, steps=2)
    reinforce(toy_run, tmp_path / "two", correction=correction, resume=True)  # --steps 4: more of them is allowed
    assert state(tmp_path / "two") == state(tmp_path / "one")


def test_lines_past_the_checkpoint_are_cut_on_resume(toy_run, tmp_path, monkeypatch):
    reinforce(toy_run, tmp_path / "one")
    with monkeypatch.context() as patch:
        hit_at(patch, rl, 3, crash)
        with pytest.raises(KeyError):
            reinforce(toy_run, tmp_path / "two", save_every=2)
    with (tmp_path / "two" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')  # half a line
    reinforce(toy_run, tmp_path / "two", resume=True)
    assert state(tmp_path / "two") == state(tmp_path / "one")


def test_resume_with_nothing_there_starts_from_the_beginning(toy_run, tmp_path, capsys):
    reinforce(toy_run, tmp_path / "one", steps=1)
    reinforce(toy_run, tmp_path / "two", steps=1, resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    assert state(tmp_path / "two") == state(tmp_path / "one")


def test_a_finished_run_resumed_changes_nothing(toy_run, tmp_path):
    reinforce(toy_run, tmp_path / "rl", steps=2)
    before = state(tmp_path / "rl")
    for _ in range(2):
        reinforce(toy_run, tmp_path / "rl", steps=2, resume=True)
    assert state(tmp_path / "rl") == before


def test_a_new_run_is_not_resumed_from_the_old_one_in_its_folder(tmp_path, monkeypatch):
    warm(tmp_path / "run", steps=2)
    hit_at(monkeypatch, warmup, 1, crash)
    with pytest.raises(KeyError):
        warm(tmp_path / "run", steps=2, seed=1)
    load(tmp_path / "run", None, None)  # the old weights are still there
    assert warmup.start_trainer("warmup", warmup.Config(out=str(tmp_path / "run"), resume=True), [])["step"] == 0


def test_a_copied_run_with_links_followed_can_be_resumed(toy_run, tmp_path):
    reinforce(toy_run, tmp_path / "one")
    reinforce(toy_run, tmp_path / "two", steps=2)
    shutil.copytree(tmp_path / "two", tmp_path / "copy")
    reinforce(toy_run, tmp_path / "copy", resume=True)
    assert state(tmp_path / "copy") == state(tmp_path / "one")


@pytest.mark.parametrize(
    ("flag", "value"), [("lr", 2e-3), ("seed", 1), ("skip_ratio", 0.125), ("correction", "retrace"), ("limit", 39)]
)
def test_resume_with_another_flag_names_it(toy_run, tmp_path, flag, value):
    reinforce(toy_run, tmp_path / "rl", steps=1)
    before = state(tmp_path / "rl")
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} {value}"):
        reinforce(toy_run, tmp_path / "rl", resume=True, **{flag: value})
    assert state(tmp_path / "rl") == before


def test_a_warm_up_is_not_resumed_with_other_steps(tmp_path):
    warm(tmp_path / "run", steps=2)
    with pytest.raises(InputError, match="--steps 4"):
        warm(tmp_path / "run", steps=4, resume=True)  # its learning rate falls to 0 at the last step


def test_flags_that_change_nothing_are_free_on_resume(toy_run, tmp_path):
    reinforce(toy_run, tmp_path / "one")
    reinforce(toy_run, tmp_path / "two", steps=2)
    free = {"micro_batch": 3, "max_rows": 4, "gradient_checkpointing": True, "save_every": 1, "eval_every": 4}
    reinforce(toy_run, tmp_path / "two", resume=True, **free)
    one, two = (load(tmp_path / name, None, None)[0].state_dict() for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4


def test_fewer_steps_than_done_another_stage_and_another_reference_are_refused(toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "warmup")
    reinforce(tmp_path / "warmup", tmp_path / "rl", steps=2)
    with pytest.raises(InputError, match="--steps is 1"):
        reinforce(tmp_path / "warmup", tmp_path / "rl", steps=1, resume=True)
    with pytest.raises(InputError, match=r"written by rl\.py"):
        warm(tmp_path / "rl", resume=True)
    decoder = Decoder.from_pretrained(tmp_path / "warmup")
    with torch.no_grad():
        decoder.layers[3].mlp.down.weight[0, 0] += 1e-3
    decoder.save_pretrained(tmp_path / "warmup")
    with pytest.raises(InputError, match="weights of --model"):
        reinforce(tmp_path / "warmup", tmp_path / "rl", resume=True)


# ---- saves ----------------------------------------------------------------------------------------------------------


def numbered(decoder, optimizer, number):
    """Every weight and moment is `number`: a mixture of two saves shows."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(number)
    for moments in optimizer.state.values():
        moments["exp_avg"].fill_(number)
    return {"step": number}


def check_numbered(run) -> int:
    """The number that all of a run's checkpoint agrees on."""
    decoder, _, _ = load(run, None, None)
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    found = {trainer["step"], *(x.item() for p in decoder.parameters() for x in p.detach().unique())}
    found |= {x.item() for m in trainer["optimizer"]["state"].values() for x in m["exp_avg"].unique()}
    assert len(found) == 1, f"a mixture of {found}"
    return found.pop()


@pytest.fixture
def saver(toy_run, tmp_path):
    """save(number) into tmp_path / "run", and that folder."""
    decoder, tokenizer, _ = load(toy_run, None, None)
    optimizer = warmup.make_optimizer(decoder)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")

    def save(number):
        warmup.save_checkpoint(run, decoder, tokenizer, optimizer, numbered(decoder, optimizer, number))

    return save, run


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(saver):
    save, run = saver
    save(0)
    last, advanced = 0, 0
    for attempt in range(25):
        child = os.fork()  # no imports: it saves from its first moment on
        if child == 0:
            for number in range(last + 1, last + 10_000):
                save(number)
        time.sleep(0.01 + 0.0137 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = check_numbered(run)
        assert found >= last
        advanced += found > last
        last = found
    assert advanced > 10  # or the kills came before anything was saved


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_half_file(saver):
    save, run = saver
    save(1)
    files = sorted(run.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1000, 200_000, 2_500_000):  # config.json fits; the tokenizer fits; the weights fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(InputError, match="cannot be written"):
                save(2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(run.rglob("*")) == files and check_numbered(run) == 1
    save(3)
    assert check_numbered(run) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_keeps_the_old_checkpoint(saver):
    save, run = saver
    save(1)
    (run / ".checkpoints").chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            save(2)
    finally:
        (run / ".checkpoints").chmod(0o700)
    assert check_numbered(run) == 1


def test_only_the_latest_checkpoint_stays(saver):
    save, run = saver
    for number in (1, 2, 2, 2, 3):
        save(number)
        assert len(list((run / ".checkpoints").glob("step-*"))) == 1
        assert check_numbered(run) == number


@pytest.mark.parametrize("name", ["model.safetensors", "value_head.pt", "trainer.pt", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_cut_or_foreign_file_is_refused_by_name(toy_run, tmp_path, name, damage):
    reinforce(toy_run, tmp_path / "rl", steps=1)
    file = tmp_path / "rl" / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"PK\x03\x04 something else")
    with pytest.raises(InputError, match=name):
        reinforce(toy_run, tmp_path / "rl", resume=True)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_finishes_the_step_saves_and_names_the_resume_command(
    toy_run, tmp_path, monkeypatch, capsys, number, code
):
    monkeypatch.setattr("sys.argv", ["rl.py", "--out", "a b"])
    before = signal.getsignal(number)
    hit_at(monkeypatch, rl, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        reinforce(toy_run, tmp_path / "rl")
    assert stopped.value.code == code
    assert "python rl.py --out 'a b' --resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "rl" / "trainer.pt", weights_only=True)["step"] == 2
    assert signal.getsignal(number) == before


def test_a_second_signal_leaves_at_once(toy_run, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    hit_at(monkeypatch, rl, 1, twice)
    child = os.fork()
    if child == 0:
        reinforce(toy_run, tmp_path / "rl")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert not (tmp_path / "rl" / "trainer.pt").exists()


# ---- numbers gone bad -----------------------------------------------------------------------------------------------


def weights(run):
    return (run / "model.safetensors").read_bytes(), (run / "value_head.pt").read_bytes()


def spoil(monkeypatch, module, name, steps):
    """Make the loss of these batches (from 1) nan."""
    real, step = getattr(module, name), [0]
    real_record = warmup.append_record

    def record(file, line):
        step[0] += file.name == "metrics.jsonl"
        real_record(file, line)

    monkeypatch.setattr(module, "append_record", record)
    monkeypatch.setattr(module, name, lambda *args: real(*args) * (torch.nan if step[0] + 1 in steps else 1.0))


def test_a_loss_that_is_not_finite_changes_no_weight_and_its_batch_is_written_down(toy_run, tmp_path, monkeypatch):
    reinforce(toy_run, tmp_path / "good", steps=2)
    spoil(monkeypatch, rl, "policy_loss", {3})
    reinforce(toy_run, tmp_path / "bad", steps=3)
    assert weights(tmp_path / "bad") == weights(tmp_path / "good")
    records = read_metrics(tmp_path / "bad")
    assert [record["nonfinite_updates"] for record in records] == [0, 0, 4]  # 2 passes of 2 minibatches
    assert records[2]["policy_loss"] is None
    (bad,) = [json.loads(line) for line in (tmp_path / "bad" / "bad_batches.jsonl").read_text().splitlines()]
    assert bad["step"] == 3 and bad["problems"] == warmup.batch_indices(0, 3, 4, 40)


def test_a_gradient_or_loss_that_is_not_finite_changes_no_weight_and_no_moment():
    decoder = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(decoder.parameters())
    for gradient, loss in ((1.0, 1.0), (torch.inf, 1.0), (torch.nan, 1.0), (2.0, torch.nan)):
        decoder.weight.grad = torch.tensor([[1.0, gradient]])
        before = [p.clone() for p in decoder.parameters()], optimizer.state_dict()["state"].get(0, {}).copy()
        norm = warmup.optimizer_step(decoder, optimizer, 0.1, loss)
        if gradient == 1.0:
            assert norm > 0 and not torch.equal(before[0][0], decoder.weight)
        else:
            assert norm != norm and torch.equal(before[0][0], decoder.weight)
            assert all(torch.equal(x, before[1][k]) for k, x in optimizer.state_dict()["state"][0].items())
        assert decoder.weight.grad is None


@pytest.mark.parametrize("stage", ["warmup", "rl"])
def test_three_bad_batches_in_a_row_stop_the_run_with_the_weights_before_them(toy_run, tmp_path, monkeypatch, stage):
    spoil(
        monkeypatch, {"warmup": warmup, "rl": rl}[stage], {"warmup": "token_logp", "rl": "value_loss"}[stage], {2, 3, 4}
    )
    with pytest.raises(FloatingPointError, match=r"3 batches in a row.*bad_batches\.jsonl"):
        (warm(tmp_path / "run", steps=9) if stage == "warmup" else reinforce(toy_run, tmp_path / "run", steps=9))
    assert len(read_metrics(tmp_path / "run")) == 4
    monkeypatch.undo()
    if stage == "rl":
        reinforce(toy_run, tmp_path / "good", steps=1)
        assert weights(tmp_path / "run") == weights(tmp_path / "good")


def test_two_bad_batches_and_a_good_one_between_do_not_stop_a_run(toy_run, tmp_path, monkeypatch):
    spoil(monkeypatch, rl, "policy_loss", {1, 2, 4, 5})
    reinforce(toy_run, tmp_path / "run", steps=6)


def test_weights_that_are_not_finite_are_refused(toy_run, tmp_path):
    decoder = Decoder.from_pretrained(toy_run)
    with torch.no_grad():
        decoder.norm.weight[3] = torch.nan
    decoder.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.norm\.weight holds nan"):
        Decoder.from_pretrained(tmp_path)


# ---- memory ---------------------------------------------------------------------------------------------------------


def saved_bytes(decoder, tokens):
    """Bytes that autograd keeps for the backward pass, and the gradients."""
    total = [0]

    def count(x):
        total[0] += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        loss = decoder.logits(decoder(tokens)).logsumexp(-1).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in decoder.parameters() if p.grad is not None]
    decoder.zero_grad()
    return total[0], gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(toy_run, dtype):
    decoder, _, _ = load(toy_run, None, dtype)
    tokens = torch.arange(48).view(4, 12)
    much, expected = saved_bytes(decoder, tokens)
    decoder.gradient_checkpointing = True
    less, found = saved_bytes(decoder, tokens)
    assert less < 0.5 * much
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_bf16_reference_gives_the_same_numbers_in_less_memory(toy_run):
    decoder, _, _ = load(toy_run, None, "bfloat16")
    reference, _, _ = load(toy_run, None, "bfloat16")
    rl.freeze(reference)
    tokens = torch.arange(48).view(4, 12)
    assert torch.equal(decoder.logits(decoder(tokens)), reference.logits(reference(tokens)))
    size = {m: sum(p.numel() * p.element_size() for p in m.layers.parameters()) for m in (decoder, reference)}
    assert size[reference] < 0.52 * size[decoder]
    assert not any(p.requires_grad for p in reference.parameters())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=type)
def test_out_of_memory_names_the_flag_to_turn(toy_run, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    decoder, _, eos_ids = load(toy_run, None, None)
    monkeypatch.setattr(Decoder, "new_cache", fail)
    with pytest.raises(InputError, match="--max-rows"):
        sample(decoder, [[1, 2]], max_new_tokens=4, eos_id=eos_ids, pad_id=0)
    monkeypatch.undo()
    monkeypatch.setattr(rl, "policy_loss", fail)
    with pytest.raises(InputError, match=r"--micro-batch.*--gradient-checkpointing"):
        reinforce(toy_run, tmp_path / "rl")
    monkeypatch.setattr(warmup, "token_logp", fail)
    with pytest.raises(InputError, match=r"--micro-batch.*--gradient-checkpointing"):
        warm(tmp_path / "warmup")


def test_memory_that_the_cpu_cannot_give_names_the_flag(toy_run):
    decoder, _, eos_ids = load(toy_run, None, None)
    decoder.new_cache = lambda *args: torch.empty(2**60)
    with pytest.raises(InputError, match="--max-rows"):
        sample(decoder, [[1, 2]], max_new_tokens=4, eos_id=eos_ids, pad_id=0)


def test_peak_memory_is_logged(toy_run):
    assert all(0.1 < record["peak_memory_gb"] < 100 for record in read_metrics(toy_run))


# ---- all of it ------------------------------------------------------------------------------------------------------


def test_a_short_soak_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    hits = soak(tmp_path, minutes=0.5, longest=12.0)
    assert hits["steps"] > 0
