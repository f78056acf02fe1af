"""Flags and bad input: one clear line, exit code 2, nothing written."""

import json
import sys

import pytest
import torch

import evaluate
import rl
import rollout
import warmup
from reward import InputError
from rollout import run_script

SCRIPTS = {"warmup": warmup, "rl": rl, "rollout": rollout, "evaluate": evaluate}


def run(monkeypatch, script, *argv):
    """The exit code of `python SCRIPT.py ARGV`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    module = SCRIPTS[script]
    with pytest.raises(SystemExit) as stopped:
        run_script(module.main, module.Config, module.make_parser() if script == "evaluate" else None)
    return stopped.value.code


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_and_its_default(script, monkeypatch, capsys):
    assert run(monkeypatch, script, "--help") == 0
    text = capsys.readouterr().out
    module = SCRIPTS[script]
    for name, field in module.Config.__dataclass_fields__.items():
        if name != "runs":
            assert f"--{name}" in text or f"--{name.replace('_', '-')}" in text
            assert field.metadata["help"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("typo", ["--skip-ration", "--see", "--tasc"])  # no abbreviations either
def test_a_typo_exits_with_2(script, typo, monkeypatch, capsys):
    assert run(monkeypatch, script, *(["x"] if script == "evaluate" else []), typo, "1") == 2
    assert typo in capsys.readouterr().err


BAD_FLAGS = [
    ("rl", "--skip-ratio", "1.5"),
    ("rl", "--skip-ratio", "-0.1"),
    ("rl", "--samples", "0"),
    ("rl", "--samples", "3"),  # does not divide 128
    ("rl", "--correction", "magic"),
    ("rl", "--lam", "1.1"),
    ("rl", "--gamma", "-1"),
    ("rl", "--clip", "0"),
    ("rl", "--cap", "0"),
    ("rl", "--kl-coef", "-1"),
    ("rl", "--steps", "0"),
    ("rl", "--minibatch", "0"),
    ("rl", "--rollout-batch", "0"),
    ("rl", "--ppo-epochs", "0"),
    ("rl", "--micro-batch", "0"),
    ("rl", "--task", "gsm9k"),
    ("rl", "--dtype", "int8"),
    ("rl", "--engine", "perl"),
    ("rl", "--max-new-tokens", "0"),
    ("warmup", "--layer-dropout", "2"),
    ("warmup", "--steps", "0"),
    ("warmup", "--batch", "0"),
    ("warmup", "--epochs", "0"),
    ("warmup", "--lr", "-1"),
    ("warmup", "--limit", "0"),
    ("warmup", "--seed", "-1"),
    ("warmup", "--task", "gsm8k"),  # from scratch only on toy
    ("rollout", "--skip-ratios", "0.5 1.2"),
    ("rollout", "--rounds", "0"),
    ("evaluate", "--samples", "-1"),
    ("evaluate", "--max-rows", "0"),
]


@pytest.mark.parametrize(("script", "flag", "value"), BAD_FLAGS, ids=lambda x: x)
def test_a_value_out_of_range_names_the_flag_and_writes_nothing(script, flag, value, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, script, *(["x"] if script == "evaluate" else []), flag, *value.split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and flag in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_rl_without_a_warm_up_says_which_command_makes_one(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "rl") == 2
    assert "python warmup.py" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rl_refuses_to_write_over_its_warm_up(monkeypatch, capsys, toy_run):
    assert run(monkeypatch, "rl", "--model", toy_run, "--out", toy_run) == 2
    assert "--out" in capsys.readouterr().err


def test_an_impossible_ratio_stops_before_anything_is_written(monkeypatch, capsys, toy_run, tmp_path):
    assert (
        run(monkeypatch, "rl", "--model", toy_run, "--out", tmp_path / "rl", "--skip-ratio", "0.8", "--limit", 9) == 2
    )
    assert "--skip-ratio" in capsys.readouterr().err
    assert not (tmp_path / "rl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(monkeypatch, capsys, toy_run, tmp_path):
    out = tmp_path / "rl"
    assert run(monkeypatch, "rl", "--model", toy_run, "--out", out, "--device", "cuda", "--limit", 9) == 2
    assert "--device cuda" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_without_a_checkpoint_and_a_file_are_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        assert run(monkeypatch, "rl", "--model", path, "--out", tmp_path / "o") == 2
        assert str(path) in capsys.readouterr().err


def test_an_unreachable_hub_id_says_how_to_use_a_folder(monkeypatch, tmp_path):
    from model import find_checkpoint

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="folder"):
        find_checkpoint("nobody/no-such-model-here")


def test_a_question_longer_than_the_context_is_named(tmp_path, toy_run):
    row = {"question": "How many? " * 300, "answer": "1+1=2\n#### 2"}
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(row))
    flags = {
        "model": str(toy_run),
        "task": "gsm8k",
        "data": str(file),
        "test_data": str(file),
        "out": str(tmp_path / "o"),
    }
    with pytest.raises(InputError, match="context"):
        warmup.main(warmup.Config(**flags))
    with pytest.raises(InputError, match="context"):
        rl.main(rl.Config(**flags))
    assert not (tmp_path / "o").exists()
