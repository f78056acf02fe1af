"""Flags and bad input: one clear line, exit code 2, nothing written."""

import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import rl
import verifier
import warmup
from reward import InputError
from rollout import run_script

SCRIPTS = {"warmup": warmup, "rl": rl, "evaluate": evaluate, "verifier": verifier}


def run(monkeypatch, script, *argv):
    """The exit code of `python SCRIPT.py ARGV`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(SCRIPTS[script].__file__, run_name="__main__")
    return stopped.value.code


def named(script, model):
    """The arguments that name a model."""
    if script == "evaluate":
        return [model]
    data = ["--data", "labelled.jsonl"] if script == "verifier" else []
    return ["--model", model, *data]


def snapshot(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- the flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_the_stage_s_own_flags_and_prints_every_default_once(
    script, monkeypatch, capsys
):
    assert run(monkeypatch, script, "--help") == 0
    out = capsys.readouterr().out
    _, *entries = re.split(r"\n  (?=--)", out)
    entries = {entry.split()[0].strip(",")[2:]: " ".join(entry.split()) for entry in entries}
    module = SCRIPTS[script]
    own = list(module.Flags.__dataclass_fields__)
    assert list(entries)[: len(own)] == own
    fields = module.Config.__dataclass_fields__
    assert set(entries) == set(fields) - {"runs"}
    for name, entry in entries.items():
        default = fields[name].default
        assert entry.count("default") <= 1
        if default is not None and not isinstance(default, bool):
            assert entry.endswith(f"(default: {default})")
    assert "(default: None)" not in out


NO_FLAGS = [*(f"{script} --see 1" for script in SCRIPTS), "rl --tasc toy", "rl --skip-ration 0"]
BAD_CHOICES = [
    "rl --correction magic",
    "rl --advantage magic",
    "rl --objective magic",
    "evaluate --task gsm9k",
    "rl --dtype int8",
    "rl --device gpu",
    "evaluate --engine perl",
    "rl --prompt-style magic",
]
BAD_VALUES = [
    "warmup --layer-dropout 2",
    "warmup --steps 0",
    "warmup --epochs 0",
    "warmup --batch 0",
    "warmup --batch 1000000000000",
    "warmup --lr -1",
    "warmup --lr -1e-5",
    "warmup --weight-decay -1",
    "warmup --beta2 1",
    "warmup --limit 0",
    "warmup --seed -1",
    "warmup --seed 9223372036854775808",
    "warmup --task gsm8k",
    "rl --skip-ratio 1.5",
    "rl --skip-ratio -0.1",
    "rl --skip-ratio 1",
    "rl --skip-ratio 0.8",
    "rl --skip-layers all",
    "rl --skip-with nothing",
    "rl --samples 0",
    "rl --samples 3",
    "rl --minibatch 0",
    "rl --rollout-batch 0",
    "rl --rollout-batch 1000000000000",
    "rl --ppo-epochs 0",
    "rl --lam 1.1",
    "rl --gamma -1",
    "rl --clip 0",
    "rl --cap 0",
    "rl --kl-coef -1",
    "rl --value-coef inf",
    "rl --lr nan",
    "rl --steps 0",
    "rl --partial-reward 1.1",
    "rl --save-every -1",
    "rl --eval-every -1",
    "rl --micro-batch 0",
    "rl --max-new-tokens 0",
    "rl --samples 1 --advantage group",
    "rl --seed 9223372036854775808",
    "evaluate --seed 9223372036854775808",
    "evaluate --samples -1",
    "evaluate --max-rows 0",
    "evaluate --kept-samples 0",
    "evaluate --keep-correct x.jsonl",
    "warmup --out ''",
    "rl --out ''",
    "evaluate --out ''",
    "warmup --model ''",
    "rl --model ''",
    "evaluate --keep-correct ''",
    "warmup --data ''",
    "rl --test-data ''",
    "rl --skip-layers ''",
]
if not torch.cuda.is_available():
    BAD_VALUES += [f"{script} --device cuda" for script in SCRIPTS]


@pytest.mark.parametrize("command", NO_FLAGS + BAD_CHOICES + BAD_VALUES)
def test_a_typo_or_a_value_out_of_range_names_the_flag_and_writes_nothing(
    command, monkeypatch, capsys, toy_run, tmp_path
):
    monkeypatch.chdir(tmp_path)
    script, flag, *values = shlex.split(command)
    argv = [] if script == "warmup" else named(script, toy_run)
    if script in ("warmup", "rl"):
        argv += ["--limit", 200]
    assert run(monkeypatch, script, *argv, flag, *values) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and flag in error
    assert command not in BAD_CHOICES or "choose from" in error
    assert not list(tmp_path.iterdir())


def test_rl_without_a_warm_up_says_which_command_makes_one(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "rl") == 2
    assert "python warmup.py" in capsys.readouterr().err


def test_rl_refuses_to_write_over_its_warm_up(monkeypatch, capsys, toy_run, tmp_path):
    (tmp_path / "link").symlink_to(toy_run)
    before = snapshot(toy_run)
    for out in (toy_run, tmp_path / "link", f"{toy_run}/../{toy_run.name}"):
        assert run(monkeypatch, "rl", "--model", toy_run, "--out", out, "--resume") == 2
        assert "another folder than --model" in capsys.readouterr().err
    assert snapshot(toy_run) == before


def test_characters_that_a_terminal_lacks_are_replaced(monkeypatch, tmp_path):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.chdir(tmp_path)
    few = "--limit 8 --batch 8 --test-limit 2 --steps 1 --max-new-tokens 2"
    monkeypatch.setattr(sys, "argv", ["warmup.py", "--out", "runs/ü", *few.split()])
    run_script(warmup.main, warmup.Config)
    terminal.flush()
    assert b"checkpoint: runs/?    next" in terminal.buffer.getvalue()
    assert Path("runs/ü/evaluation.json").exists()


# ---- flags that a run hands on -------------------------------------------------------------------

TRAINED = {
    "task": "svamp",
    "engine": "nl",
    "prompt_style": "reft",
    "data": "a.jsonl",
    "test_data": "b.jsonl",
    "max_new_tokens": 7,
}


@pytest.mark.parametrize("script", ["warmup", "rl", "evaluate"])
def test_flags_that_are_not_given_are_those_of_the_run_that_made_the_model(
    script, toy_run, tmp_path
):
    run = shutil.copytree(toy_run, tmp_path / "run")
    (run / "run.json").write_text(json.dumps(TRAINED))

    def config(**flags):
        if script != "evaluate":
            return vars(SCRIPTS[script].Config(model=str(run), **flags))
        config = evaluate.Config(**flags)
        config.inherit(str(run))
        return vars(config)

    assert config().items() >= TRAINED.items()
    given = {"task": "svamp", "prompt_style": "chat", "test_data": "c.jsonl"}
    assert config(**given).items() >= {**TRAINED, **given}.items()
    other = {"task": "gsm8k", "test_data": None, "max_new_tokens": 400}  # other problems, lengths
    assert config(task="gsm8k").items() >= {**other, "prompt_style": "reft"}.items()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_no_run_made_needs_a_task(script, monkeypatch, capsys, toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "plain")
    (tmp_path / "plain" / "run.json").unlink()
    monkeypatch.chdir(tmp_path)
    before = snapshot(".")
    for model in ("plain", "some/hub-id"):
        assert run(monkeypatch, script, *named(script, model)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {model} does not say")
        assert "--task, one of toy, toy-long, gsm8k" in error
    assert snapshot(".") == before


def test_limit_and_test_limit_cut_one_split_each(toy_run, tmp_path, capsys):
    model, out = str(toy_run), str(tmp_path)
    few = {"test_limit": 3, "max_new_tokens": 2}
    rl.main(rl.Config(model=model, out=out, steps=1, rollout_batch=2, limit=5, **few))
    assert " 5 problems, 3 test problems," in capsys.readouterr().out
    (result,) = evaluate.main(evaluate.Config(runs=(out,), **few))
    assert result["problems"] == 3
    with pytest.raises(InputError, match="--test-limit"):
        evaluate.Config(runs=("x",), limit=5)


# ---- bad input -----------------------------------------------------------------------------------

GOOD = '{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n'
NO_COT = '{"item_id": "a", "question": "What is 1 + 1?", "answer_value": "2"}\n'
LONG = json.dumps({"question": "How many? " * 300, "answer": "1 + 1 = 2\n#### 2"})

# what is wrong: the lines of data.jsonl, the flags, the words that the error must hold
BAD_INPUT = {
    "no data file": (None, "", "data.jsonl"),
    "a broken line": (GOOD + '{"question": "x", "ans', "", "data.jsonl:2"),
    "a missing field": (GOOD + '{"question": "x"}', "", "data.jsonl:2"),
    "no chain of thought": (NO_COT, "", "1 of 1 training problems"),
    "training problems that are all too long": (LONG, "", "1 of 1 problems exceed"),
    "a test problem that is too long": (GOOD + LONG, "--test-data data.jsonl", "1 of 2 problems"),
    "completions that are too long": (GOOD, "--max-new-tokens 999", "--max-new-tokens"),
    "a file as checkpoint": (GOOD, "--model data.jsonl", "data.jsonl: not a checkpoint"),
    "a folder without checkpoint": (GOOD, "--model .", "not a checkpoint"),
    "a file as --out": (GOOD, "--out data.jsonl", "data.jsonl: cannot be written"),
    "--out below a file": (GOOD, "--out data.jsonl/x", "data.jsonl/x: cannot be written"),
    "no such hub id": (GOOD, "--model nobody/nothing-here", "nobody/nothing-here"),
    "no such hub data": (None, "--data nobody/nothing-here", "nobody/nothing-here"),
}


FAULTS = [(script, fault) for script in ("warmup", "rl") for fault in BAD_INPUT]
FAULTS.remove(("rl", "no chain of thought"))  # which it does not need


@pytest.mark.parametrize(("script", "fault"), FAULTS)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(
    script, fault, monkeypatch, capsys, toy_run, tmp_path
):
    content, flags, words = BAD_INPUT[fault]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(toy_run, "model")
    if content is not None:
        Path("data.jsonl").write_text(content)
    Path("test.jsonl").write_text(GOOD)
    before = snapshot(".")
    base = "--model model --out out --steps 1 --max-new-tokens 8 --task gsm8k"
    data = "--data data.jsonl --test-data test.jsonl"
    size = {"warmup": "--batch 1", "rl": "--rollout-batch 1 --objective self-training"}[script]
    assert run(monkeypatch, script, *f"{base} {data} {size} {flags}".split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert words in error
    assert snapshot(".") == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("file", "file: not a"),
        ("MODEL file", "file: not a"),  # before the first one takes its time
        ("MODEL --out file", "cannot be written"),
        ("MODEL --keep-correct file/x --samples 1 --limit 2", "cannot be written"),
        ("MODEL MODEL", "the same folder"),
    ],
)
def test_what_evaluate_cannot_read_or_write_is_refused_before_any_work(
    argv, words, monkeypatch, capsys, toy_run, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    shutil.copytree(toy_run, "model")
    Path("model/run.json").unlink()
    before = snapshot(".")
    argv = argv.replace("MODEL", "model").split()
    assert run(monkeypatch, "evaluate", *argv, "--task", "toy", "--test-limit", 2) == 2
    out, error = capsys.readouterr()
    assert words in error and len(error.strip().splitlines()) == 1
    assert not out
    assert snapshot(".") == before
