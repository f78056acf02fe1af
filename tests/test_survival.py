"""Runs that survive: resume to the bit, saves that are whole or absent, signals, numbers gone bad, memory."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from soak import soak, state
from torch.utils.checkpoint import checkpoint

import rl
import warmup
from evaluate import read_metrics
from model import Decoder, load
from reward import InputError
from rollout import run_script

pytestmark = pytest.mark.usefixtures("rewards_that_differ")
TINY = {"limit": 40, "test_limit": 9, "max_new_tokens": 12}


def warm(out, **changes):
    """A few steps of warmup.py."""
    return warmup.main(warmup.Config(**({"out": str(out), "steps": 4, "batch": 8, **TINY} | changes)))


def reinforce(model, out, **changes):
    """A few steps of rl.py, with all that it carries from batch to batch."""
    flags = {"model": str(model), "out": str(out), "steps": 4, "skip_ratio": 0.25, "target_kl_behav": 0.02, "lr": 1e-3}
    flags |= {"rollout_batch": 8, "samples": 2, "minibatch": 4, "eval_every": 2, **TINY}
    return rl.main(rl.Config(**(flags | changes)))


def snapshot(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def hit_at(monkeypatch, step, what):
    """Let `what()` happen when the record of a step has been written."""
    real = warmup.Run.append

    def hit(run, log, line):
        real(run, log, line)
        if line["step"] == step and log == "metrics.jsonl":
            what()

    monkeypatch.setattr(warmup.Run, "append", hit)


def crash():
    raise KeyError("the power is gone")


def stopped(train, step):
    """Ctrl-C in a step of `train()`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        hit_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        train()


@pytest.fixture(scope="module")
def whole(small_run, rewards_that_differ, tmp_path_factory):
    """A run of rl.py that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "rl"
    reinforce(small_run, run)
    return run


@pytest.fixture(scope="module")
def two_steps(small_run, rewards_that_differ, tmp_path_factory):
    """The first half of that run; tests copy it."""
    run = tmp_path_factory.mktemp("half") / "rl"
    stopped(lambda: reinforce(small_run, run), 2)
    return run


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_warm_up_stopped_and_resumed_equals_one_run_to_the_bit(tmp_path):
    flags = {"layer_dropout": 0.9, "eval_every": 2}
    warm(tmp_path / "one", **flags)
    stopped(lambda: warm(tmp_path / "two", **flags), 2)
    assert len(read_metrics(tmp_path / "two")) == 2
    warm(tmp_path / "two", resume=True, **flags)
    assert state(tmp_path / "two") == state(tmp_path / "one")


def test_rl_stopped_and_resumed_equals_one_run_to_the_bit(small_run, whole, two_steps, tmp_path):
    assert len(read_metrics(two_steps)) == 2
    shutil.copytree(two_steps, tmp_path / "two")
    reinforce(small_run, tmp_path / "two", resume=True)
    assert state(tmp_path / "two") == state(whole)


def test_lines_past_the_checkpoint_are_cut_on_resume(small_run, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        hit_at(patch, 3, crash)
        with pytest.raises(KeyError):
            reinforce(small_run, tmp_path, save_every=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')  # half a line
    reinforce(small_run, tmp_path, resume=True)
    assert state(tmp_path) == state(whole)


@pytest.mark.parametrize("crashed", [False, True])
def test_resume_with_nothing_there_starts_from_the_beginning(small_run, whole, tmp_path, monkeypatch, capsys, crashed):
    if crashed:  # before its first checkpoint
        with monkeypatch.context() as patch:
            hit_at(patch, 1, crash)
            with pytest.raises(KeyError):
                reinforce(small_run, tmp_path)
        assert len(read_metrics(tmp_path)) == 1
    reinforce(small_run, tmp_path, resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    assert state(tmp_path) == state(whole)


def test_a_finished_run_resumed_changes_nothing(small_run, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "rl")
    reinforce(small_run, tmp_path / "rl", resume=True)
    assert state(tmp_path / "rl") == state(whole)


@pytest.mark.parametrize("stage", ["warmup", "rl"])
@pytest.mark.parametrize("held", ["all", "metrics.jsonl", "config.json", "trainer.pt"])
def test_a_folder_that_holds_a_run_is_refused_with_both_ways_out_and_stays_as_it_is(
    small_run, two_steps, tmp_path, stage, held
):
    out = tmp_path / "run"
    out.mkdir()
    for file in two_steps.iterdir():
        if held in ("all", file.name):
            shutil.copy(file, out)
    before = snapshot(out)
    with pytest.raises(InputError, match=r"--out .*/run holds a run .*--resume, or name another folder"):
        warm(out) if stage == "warmup" else reinforce(small_run, out)
    assert snapshot(out) == before != {}


def test_a_model_without_trainer_pt_is_not_resumed_and_stays_as_it_is(small_run, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    (tmp_path / "run" / "trainer.pt").unlink()
    before = snapshot(tmp_path / "run")
    for train in (lambda out: warm(out, resume=True), lambda out: reinforce(small_run, out, resume=True)):
        with pytest.raises(InputError, match=r"no trainer\.pt to resume; name another folder"):
            train(tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_resume_reads_trainer_pt_and_the_logs_and_nothing_else(small_run, whole, two_steps, tmp_path):
    for name in ("trainer.pt", *warmup.LOGS):
        if (two_steps / name).exists():
            shutil.copy(two_steps / name, tmp_path)
    for name in ("model.safetensors", "value_head.pt", "config.json"):
        (tmp_path / name).write_text("of another save")
    reinforce(small_run, tmp_path, resume=True)
    assert state(tmp_path) == state(whole)


def test_a_log_that_is_shorter_than_at_the_checkpoint_is_refused(small_run, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("rb+") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=r"metrics\.jsonl: shorter"):
        reinforce(small_run, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("flag", "value"), [("lr", 2e-3), ("seed", 1), ("skip_ratio", 0.125), ("correction", "retrace"), ("limit", 39)]
)
def test_resume_with_another_flag_names_it_and_changes_nothing(small_run, two_steps, tmp_path, flag, value):
    shutil.copytree(two_steps, tmp_path / "rl")
    before = snapshot(tmp_path / "rl")
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} {value}"):
        reinforce(small_run, tmp_path / "rl", resume=True, **{flag: value})
    assert snapshot(tmp_path / "rl") == before


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("stage", ["warmup", "rl"])
def test_a_run_is_not_resumed_with_other_steps(small_run, two_steps, tmp_path, stage, steps):
    """Its learning rate falls to 0 at the last one."""
    if stage == "warmup":
        warm(tmp_path / "run", steps=2)
    else:
        shutil.copytree(two_steps, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with pytest.raises(InputError, match=f"--steps {steps} "):
        (warm if stage == "warmup" else lambda *a, **k: reinforce(small_run, *a, **k))(
            tmp_path / "run", steps=steps, resume=True
        )
    assert snapshot(tmp_path / "run") == before


def test_flags_that_change_nothing_are_free_on_resume(small_run, whole, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "two")
    free = {"micro_batch": 3, "max_rows": 4, "gradient_checkpointing": True, "save_every": 1, "eval_every": 4}
    reinforce(small_run, tmp_path / "two", resume=True, **free)
    one, two = (load(run, None, None).state_dict() for run in (whole, tmp_path / "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4


def test_another_stage_and_another_reference_are_refused(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "warmup")
    reinforce(tmp_path / "warmup", tmp_path / "rl", steps=2)
    with pytest.raises(InputError, match=r"written by rl\.py"):
        warm(tmp_path / "rl", resume=True)
    decoder = Decoder.from_pretrained(tmp_path / "warmup")
    with torch.no_grad():
        decoder.layers[3].mlp.down.weight[0, 0] += 1e-3
    decoder.save_pretrained(tmp_path / "warmup")
    with pytest.raises(InputError, match="weights of --model"):
        reinforce(tmp_path / "warmup", tmp_path / "rl", steps=2, resume=True)


def test_resume_asks_what_files_hold_and_not_where_they_are(small_run, two_steps, tmp_path, monkeypatch):
    shutil.copytree(two_steps, tmp_path / "run")
    shutil.copytree(small_run, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    reinforce("./moved", "run", resume=True)
    reinforce(small_run, "one")
    assert state(tmp_path / "run") == state(tmp_path / "one")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("generation_config.json", {"eos_token_id": [1, 5]}, "the test problems"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "their tokens, the test problems"),
        ("metrics.jsonl", None, "the test problems"),  # any other test problems
    ],
)
def test_other_prompts_end_tokens_or_test_problems_are_not_resumed(
    small_run, two_steps, tmp_path, monkeypatch, file, change, words
):
    shutil.copytree(two_steps, tmp_path / "run")
    shutil.copytree(small_run, tmp_path / "moved")
    if change:
        content = json.loads((tmp_path / "moved" / file).read_text())
        (tmp_path / "moved" / file).write_text(json.dumps(content | change))
    else:
        real = warmup.load_problems
        monkeypatch.setattr(warmup, "load_problems", lambda *args: real(*args)[::-1])
    before = snapshot(tmp_path / "run")
    with pytest.raises(InputError, match=rf"trainer\.pt: of a run with other {words};"):
        reinforce(tmp_path / "moved", tmp_path / "run", resume=True)
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(("advantage", "resumes"), [("gae", True), ("group", False)])
def test_a_flag_that_the_run_did_not_know_had_its_default(small_run, two_steps, tmp_path, advantage, resumes):
    shutil.copytree(two_steps, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "trainer.pt", weights_only=True)
    del saved["config"]["advantage"], saved["config"]["kl_coef"]  # the default of one of them depends on the task
    torch.save(saved, tmp_path / "run" / "trainer.pt")
    if resumes:
        reinforce(small_run, tmp_path / "run", resume=True, advantage=advantage)
    else:
        with pytest.raises(InputError, match=r"--advantage group \(there: gae\)"):
            reinforce(small_run, tmp_path / "run", resume=True, advantage=advantage)


def test_a_folder_is_one_process_s_until_it_dies(small_run, tmp_path, capfd):
    def refused():
        with pytest.raises(InputError, match=r"--out .*/rl is in use by another run"):
            reinforce(small_run, tmp_path / "rl", resume=True)

    child = os.fork()
    if child == 0:
        warmup.Run.record = lambda *args: time.sleep(60)
        reinforce(small_run, tmp_path / "rl")
    while not (tmp_path / "rl" / "run.json").exists():
        time.sleep(0.05)
    names = sorted(os.listdir(tmp_path / "rl"))
    refused()
    assert sorted(os.listdir(tmp_path / "rl")) == names == ["metrics.jsonl", "run.json"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reinforce(small_run, tmp_path / "rl", resume=True, steps=1)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "evaluation.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_whatever_a_model_or_a_finished_run_has_left_is_not_written_over(small_run, tmp_path, name, resume):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(InputError, match=r"--out .*/out holds a"):
        reinforce(small_run, tmp_path / "out", resume=resume)
    assert snapshot(tmp_path / "out") == {tmp_path / "out" / name: b"precious"}


# ---- saves ----------------------------------------------------------------------------------------------------------


def check(run) -> tuple[int, set[int]]:
    """The number that all of trainer.pt agrees on, and those of the other files, each of which agrees with itself."""
    trainer = torch.load(run / "trainer.pt", weights_only=True)
    moments = [m["exp_avg"] for m in trainer["optimizer"]["state"].values()]
    found = {
        trainer["state"]["step"],
        *(x.item() for w in (*trainer["weights"].values(), *moments) for x in w.unique()),
    }
    assert len(found) == 1 and moments, f"trainer.pt is a mixture of {found}"
    load(run, None, None)  # config, tokenizer and weights can be opened
    files = (load_file(run / "model.safetensors"), torch.load(run / "value_head.pt", weights_only=True))
    numbers = [{x.item() for weight in file.values() for x in weight.unique()} for file in files]
    assert all(len(number) == 1 for number in numbers), f"mixtures: {numbers}"
    return found.pop(), set.union(*numbers)


@pytest.fixture
def saver(small_run, tmp_path):
    """save(number) into tmp_path / "run", and that folder: every weight and moment is `number`, so that mixtures show."""
    model = load(small_run, None, None)
    config = warmup.Config(model=str(small_run), out=str(tmp_path / "run"), test_limit=2, max_new_tokens=4)
    run = warmup.Run("warmup", config, model, warmup.fingerprint([], [], None), 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.append("metrics.jsonl", {})

    def save(number):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        for moments in run.optimizer.state.values():
            moments["exp_avg"].fill_(number)
        run.state["step"] = number
        run.save()

    return save, run.out


def test_kill_9_at_any_moment_leaves_a_whole_trainer_pt_and_other_files_of_it_or_of_the_next_save(saver):
    save, run = saver
    save(0)
    started = time.perf_counter()
    save(0)
    seconds = time.perf_counter() - started
    last, advanced = 0, 0
    for attempt in range(12):
        child = os.fork()  # no imports: it saves from its first moment on
        if child == 0:
            for number in range(last + 1, last + 10_000):
                save(number)
        time.sleep(seconds * (0.2 + 0.3 * attempt))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found, others = check(run)
        assert found >= last and others <= {found, found + 1}
        advanced += found > last
        last = found
    assert advanced  # or the kills came before anything was saved


def test_kill_9_before_any_rename_of_a_save_leaves_trainer_pt_as_it_was(saver, monkeypatch):
    save, run = saver
    save(1)
    names, seen = sorted(os.listdir(run)), []
    for count in range(100):
        child = os.fork()
        if child == 0:
            left, replace = [count], os.replace

            def stop(*args, left=left, replace=replace):
                left[0] -= 1
                replace(*args) if left[0] >= 0 else os.kill(os.getpid(), signal.SIGKILL)

            os.replace = stop
            save(2)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        found, others = check(run)
        assert found == 1 and others <= {1, 2}
        seen.append(others)
    assert {1} in seen and {2} in seen  # all files but trainer.pt may be newer; it comes last
    assert check(run) == (2, {2}) and sorted(os.listdir(run)) == names


def test_all_is_on_the_disk_before_a_file_moves_and_trainer_pt_comes_last_but_in_the_first_save(saver, monkeypatch):
    """In the first save it comes first: whatever a kill leaves there can be resumed."""
    save, run = saver
    events, fsync, replace = [], os.fsync, os.replace
    path = lambda number: Path(os.readlink(f"/proc/self/fd/{number}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda number: events.append(path(number).name) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(Path(b)) or replace(a, b))
    for number, place in ((1, 0), (2, -1)):
        events.clear()
        save(number)
        moves = [event for event in events if isinstance(event, Path) and event.parent == run]
        synced = {event for event in events[: events.index(moves[0])] if isinstance(event, str)}
        assert synced >= {"metrics.jsonl", *(file.name for file in moves)} and moves[place].name == "trainer.pt"


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_half_file(saver):
    save, run = saver
    save(1)
    files = snapshot(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1500, 50_000, 150_000):  # config.json fits; the tokenizer fits; the weights fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(InputError, match="cannot save"):
                save(2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert snapshot(run) == files and not (run / ".new").exists()
    save(3)
    assert check(run) == (3, {3})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_keeps_the_old_checkpoint(saver):
    save, run = saver
    save(1)
    run.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot save"):
            save(2)
    finally:
        run.chmod(0o700)
    assert check(run) == (1, {1})


def test_only_the_latest_checkpoint_stays(saver):
    save, run = saver
    save(0)
    names = sorted(os.listdir(run))
    for number in (1, 2, 2, 2, 3):
        save(number)
        assert sorted(os.listdir(run)) == names and check(run) == (number, {number})


def test_without_save_every_a_checkpoint_is_never_older_than_half_an_hour(small_run, tmp_path, monkeypatch):
    clock, saves, real, append = [0.0], [], warmup.Run.save, warmup.Run.append
    monkeypatch.setattr(warmup, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: clock[0]))
    monkeypatch.setattr(warmup.Run, "append", lambda *args: append(*args) or clock.append(clock.pop() + 700))
    monkeypatch.setattr(warmup.Run, "save", lambda run: saves.append(run.state["step"]) or real(run))
    reinforce(small_run, tmp_path, steps=7)
    assert saves == [3, 6, 7]


@pytest.mark.parametrize(("name", "kept"), [("sample", 2), ("action_stats", 2), ("fit_value_head", None)])
def test_a_step_that_fails_before_it_changes_a_weight_loses_none_of_those_before(
    small_run, tmp_path, monkeypatch, name, kept
):
    reinforce(small_run, tmp_path / "one")
    real = getattr(rl, name)

    def fail(*args, **flags):
        if len(read_metrics(tmp_path / "two")) == 2:
            raise torch.OutOfMemoryError
        return real(*args, **flags)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(rl, name, fail)
        reinforce(small_run, tmp_path / "two")
    assert (tmp_path / "two" / "trainer.pt").exists() == (kept is not None)
    reinforce(small_run, tmp_path / "two", resume=True)
    assert state(tmp_path / "two") == state(tmp_path / "one")


@pytest.mark.parametrize("name", ["model.safetensors", "value_head.pt", "trainer.pt", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_cut_or_foreign_file_is_refused_by_name(small_run, two_steps, tmp_path, name, damage):
    shutil.copytree(two_steps, tmp_path / "rl")
    file = tmp_path / "rl" / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"PK\x03\x04 something else")
    with pytest.raises(InputError, match=name):
        reinforce(small_run, tmp_path / "rl", resume=True) if name == "trainer.pt" else load(
            tmp_path / "rl", None, None
        )


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_finishes_the_step_saves_and_names_the_resume_command(
    small_run, tmp_path, monkeypatch, capsys, number, code
):
    monkeypatch.setattr("sys.argv", ["rl.py", "--out", "a b"])
    before = signal.getsignal(number)
    hit_at(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        reinforce(small_run, tmp_path / "rl")
    assert stopped.value.code == code
    assert "python rl.py --out 'a b' --resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "rl" / "trainer.pt", weights_only=True)["state"]["step"] == 2
    assert signal.getsignal(number) == before


def test_a_second_signal_leaves_at_once(small_run, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    hit_at(monkeypatch, 1, twice)
    child = os.fork()
    if child == 0:
        reinforce(small_run, tmp_path / "rl")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert not (tmp_path / "rl" / "trainer.pt").exists()


# ---- numbers gone bad -----------------------------------------------------------------------------------------------


def weights(run):
    return (run / "model.safetensors").read_bytes(), (run / "value_head.pt").read_bytes()


def times_nan(loss):
    return loss * torch.nan


def plus_nan(loss):
    return loss + torch.nan  # whose gradient is finite


def spoil(monkeypatch, module, name, steps, how=times_nan):
    """Make the loss of these batches (from 1) nan."""
    real, record, step = getattr(module, name), warmup.Run.record, [1]
    monkeypatch.setattr(warmup.Run, "record", lambda *args: record(*args) or step.append(step.pop() + 1))
    monkeypatch.setattr(module, name, lambda *args: (how if step[0] in steps else torch.clone)(real(*args)))


STAGES = pytest.mark.parametrize("stage", ["warmup", "rl"])


def train_with_bad_batches(stage, small_run, run, monkeypatch, steps, bad, how=times_nan, loss="policy_loss"):
    """A run some of whose losses are nan; what it saved before the first of these batches is copied to "before"."""
    hit_at(monkeypatch, min(bad), lambda: shutil.copytree(run, run.with_name("before")))
    flags = {"steps": steps, "save_every": 1}
    if stage == "warmup":
        spoil(monkeypatch, warmup, "token_logp", bad, how)
        warm(run, **flags)
    else:
        spoil(monkeypatch, rl, loss, bad, how)
        reinforce(small_run, run, **flags)


@pytest.mark.parametrize("how", [times_nan, plus_nan])
@STAGES
def test_a_loss_that_is_not_finite_changes_no_weight_and_its_batch_is_written_down(
    small_run, tmp_path, monkeypatch, stage, how
):
    run = tmp_path / "run"
    train_with_bad_batches(stage, small_run, run, monkeypatch, 3, {3}, how)
    assert weights(run) == weights(tmp_path / "before")
    records = read_metrics(run)
    assert [r["nonfinite_updates"] for r in records] == [0, 0, 4 if stage == "rl" else 1]  # 2 passes of 2 minibatches
    assert records[2]["policy_loss" if stage == "rl" else "loss"] is None
    (bad,) = [json.loads(line) for line in (run / "bad_batches.jsonl").read_text().splitlines()]
    assert bad["step"] == 3 and bad["problems"] == warmup.batch_indices(0, 3, 4 if stage == "rl" else 8, 40)


def test_a_gradient_or_loss_that_is_not_finite_changes_no_weight_and_no_moment():
    model = torch.nn.Linear(2, 1)
    run = SimpleNamespace(model=model, optimizer=torch.optim.AdamW(model.parameters()), updates=0, left_out=0)
    for gradient, loss in ((1.0, 1.0), (torch.inf, 1.0), (torch.nan, 1.0), (2.0, torch.nan), (2.0, torch.inf)):
        model.weight.grad = torch.tensor([[1.0, gradient]])
        before = model.weight.detach().clone(), [v.clone() for v in run.optimizer.state[model.weight].values()]
        norm = warmup.Run.update(run, 0.1, torch.tensor(loss))
        if gradient == 1.0:
            assert norm > 0 and not torch.equal(before[0], model.weight) and not run.left_out
        else:
            assert norm != norm and torch.equal(before[0], model.weight)
            after = run.optimizer.state[model.weight].values()
            assert all(torch.equal(x, y) for x, y in zip(before[1], after, strict=True)) and before[1]
        assert model.weight.grad is None
    assert run.left_out == 4


@STAGES
def test_three_bad_batches_in_a_row_stop_the_run_with_the_weights_before_them(small_run, tmp_path, monkeypatch, stage):
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"3 batches in a row.*bad_batches\.jsonl"):
        train_with_bad_batches(stage, small_run, run, monkeypatch, 9, {2, 3, 4}, loss="value_loss")
    assert len(read_metrics(run)) == 4
    assert weights(run) == weights(tmp_path / "before")


def test_batches_that_moved_the_weights_before_they_went_bad_replace_no_checkpoint(small_run, tmp_path, monkeypatch):
    run, real, updates = tmp_path / "run", warmup.Run.update, []

    def update(run, lr, loss):
        """Of 4 updates a batch the first one of batches 2 to 4 is made."""
        updates.append(lr)
        return real(run, lr, loss if len(updates) <= 4 or len(updates) % 4 == 1 else loss * torch.nan)

    monkeypatch.setattr(warmup.Run, "update", update)
    hit_at(monkeypatch, 2, lambda: shutil.copytree(run, tmp_path / "before"))
    with pytest.raises(FloatingPointError, match="9 updates of 3 batches in a row, up to step 4, were not finite"):
        reinforce(small_run, run, steps=9, save_every=1)
    assert weights(run) == weights(tmp_path / "before")
    assert torch.load(run / "trainer.pt", weights_only=True)["state"]["step"] == 1


@STAGES
def test_two_bad_batches_and_a_good_one_between_do_not_stop_a_run(small_run, tmp_path, monkeypatch, stage):
    train_with_bad_batches(stage, small_run, tmp_path / "run", monkeypatch, 6, {1, 2, 4, 5})
    assert [r["nonfinite_updates"] > 0 for r in read_metrics(tmp_path / "run")] == [True, True, False] * 2


def test_weights_that_are_not_finite_are_refused(small_run, tmp_path):
    decoder = Decoder.from_pretrained(small_run)
    with torch.no_grad():
        decoder.norm.weight[3] = torch.nan
    decoder.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a weight is nan or infinite"):
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
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(small_run, dtype):
    decoder = load(small_run, None, dtype)
    tokens = torch.arange(48).view(4, 12)
    much, expected = saved_bytes(decoder, tokens)
    decoder.gradient_checkpointing = True
    less, found = saved_bytes(decoder, tokens)
    assert less < 0.5 * much
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(("stage", "expected"), [("warmup", 8), ("rl", 4 * 4)])  # layers; passes of four layers
def test_with_gradient_checkpointing_every_layer_of_every_training_pass_keeps_its_input_alone(
    small_run, tmp_path, monkeypatch, stage, expected
):
    calls = []
    monkeypatch.setattr("model.checkpoint", lambda *args, **flags: calls.append(1) or checkpoint(*args, **flags))
    for wanted in (False, True):
        flags = {"out": tmp_path / str(wanted), "gradient_checkpointing": wanted, "steps": 1}
        warm(**flags) if stage == "warmup" else reinforce(small_run, **flags)
        assert len(calls) == expected * wanted


def test_the_bf16_reference_gives_the_same_numbers_in_less_memory(small_run):
    decoder, reference = load(small_run, None, "bfloat16"), load(small_run, None, "bfloat16")
    rl.freeze(reference)
    tokens = torch.arange(48).view(4, 12)
    assert torch.equal(decoder.logits(decoder(tokens)), reference.logits(reference(tokens)))
    size = {m: sum(p.numel() * p.element_size() for p in m.layers.parameters()) for m in (decoder, reference)}
    assert size[reference] < 0.52 * size[decoder]
    assert not any(p.requires_grad for p in reference.parameters())


def gpu_is_full(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


def python_is_full(*args):
    raise MemoryError


def cpu_is_full(*args):
    return torch.empty(2**60)


def another_error(*args):
    raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("where", [(Decoder, "new_cache"), (rl, "policy_loss"), (warmup, "token_logp")], ids=str)
@pytest.mark.parametrize("error", [gpu_is_full, python_is_full, cpu_is_full, another_error])
def test_out_of_memory_is_one_line_that_names_the_flags_to_turn(small_run, tmp_path, monkeypatch, capsys, where, error):
    script = warmup if where[0] is warmup else rl
    model = [] if script is warmup else ["--model", str(small_run), "--rollout-batch", "4"]
    out = ["--out", str(tmp_path / "run"), "--limit", "4", "--test-limit", "4"]
    monkeypatch.setattr("sys.argv", ["x.py", *model, *out, "--steps", "1", "--max-new-tokens", "4"])
    monkeypatch.setattr(*where, error)
    with pytest.raises(RuntimeError if error is another_error else SystemExit) as stopped:
        run_script(script.main, script.Config)
    if error is not another_error:
        line = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert stopped.value.code == 2 and len(line) == 1 and line[0].startswith("error: out of memory")
        assert all(flag in line[0] for flag in ("--micro-batch", "--max-rows", "--gradient-checkpointing"))


@pytest.mark.parametrize(
    ("error", "code"), [(InputError, 2), (OSError, 1), (FloatingPointError, 1), (KeyboardInterrupt, 130)]
)
def test_bad_input_leaves_with_2_a_failed_log_or_numbers_gone_bad_with_1_and_ctrl_c_with_130(monkeypatch, error, code):
    def fail(config):
        raise error("why")

    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(SystemExit) as stopped:
        run_script(fail, warmup.Config)
    assert stopped.value.code == code


def test_peak_memory_is_logged(small_run):
    assert all(0.1 < record["peak_memory_gb"] < 100 for record in read_metrics(small_run))


# ---- all of it ------------------------------------------------------------------------------------------------------


def test_a_short_soak_ends_with_the_weights_of_an_undisturbed_run(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "warmup")
    hits = soak(tmp_path, minutes=0.05, steps=10, longest=0.6)
    assert hits.pop("steps") > 0 and hits.total() > 0
