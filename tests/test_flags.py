"""Flags and bad input: one clear line, exit code 2, nothing written."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import rl
import rollout
import warmup
from reward import InputError

SCRIPTS = {"warmup": warmup, "rl": rl, "rollout": rollout, "evaluate": evaluate}


def run(monkeypatch, script, *argv):
    """The exit code of `python SCRIPT.py ARGV`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(SCRIPTS[script].__file__, run_name="__main__")
    return stopped.value.code


def snapshot(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_and_its_default(script, monkeypatch, capsys):
    assert run(monkeypatch, script, "--help") == 0
    text = capsys.readouterr().out
    for name, field in SCRIPTS[script].Config.__dataclass_fields__.items():
        if name != "runs":
            assert f"--{name}" in text or f"--{name.replace('_', '-')}" in text
            assert field.metadata["help"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("typo", ["--skip-ration", "--see", "--tasc"])  # no abbreviations either
def test_a_typo_exits_with_2(script, typo, monkeypatch, capsys):
    assert run(monkeypatch, script, *(["x"] if script == "evaluate" else []), typo, "1") == 2
    assert typo in capsys.readouterr().err


BAD_CHOICES = [
    ("rl", "--correction", "magic"),
    ("rl", "--task", "gsm9k"),
    ("rl", "--dtype", "int8"),
    ("rl", "--engine", "perl"),
    ("rl", "--prompt-style", "magic"),
    ("rl", "--objective", "magic"),
    ("rl", "--advantage", "magic"),
    ("warmup", "--task", "gsm9k"),
    ("evaluate", "--task", "gsm9k"),
    ("evaluate", "--engine", "perl"),
    ("evaluate", "--prompt-style", "magic"),
    ("rollout", "--dtype", "int8"),
    ("rl", "--device", "gpu"),
]
BAD_FLAGS = [
    ("rl", "--skip-ratio", "1.5"),
    ("rl", "--skip-ratio", "-0.1"),
    ("rl", "--skip-ratio", "1"),
    ("rl", "--samples", "0"),
    ("rl", "--samples", "3"),  # does not divide 128
    ("rl", "--lam", "1.1"),
    ("rl", "--gamma", "-1"),
    ("rl", "--clip", "0"),
    ("rl", "--cap", "0"),
    ("rl", "--kl-coef", "-1"),
    ("rl", "--value-coef", "inf"),
    ("rl", "--target-kl-behav", "0"),
    ("rl", "--lr", "nan"),
    ("rl", "--steps", "0"),
    ("rl", "--minibatch", "0"),
    ("rl", "--rollout-batch", "0"),
    ("rl", "--ppo-epochs", "0"),
    ("rl", "--micro-batch", "0"),
    ("rl", "--save-every", "-1"),
    ("rl", "--eval-every", "-1"),
    ("rl", "--advantage", "group"),  # one sample a prompt is no group
    ("rl", "--max-new-tokens", "0"),
    ("warmup", "--layer-dropout", "2"),
    ("warmup", "--steps", "0"),
    ("warmup", "--batch", "0"),
    ("warmup", "--epochs", "0"),
    ("warmup", "--lr", "-1"),
    ("warmup", "--lr", "-1e-5"),
    ("warmup", "--weight-decay", "-1"),
    ("warmup", "--beta2", "1"),
    ("warmup", "--limit", "0"),
    ("warmup", "--seed", "-1"),
    ("warmup", "--task", "gsm8k"),  # from scratch only on toy
    ("rollout", "--skip-ratio", "1.2"),
    ("rollout", "--test-limit", "0"),
    ("rollout", "--seed", "-1"),
    ("evaluate", "--samples", "-1"),
    ("evaluate", "--max-rows", "0"),
    ("evaluate", "--keep-correct", "right.jsonl"),  # of no samples
]


@pytest.mark.parametrize(("script", "flag", "value"), BAD_CHOICES + BAD_FLAGS, ids=lambda x: x)
def test_a_value_out_of_range_names_the_flag_and_writes_nothing(
    script, flag, value, monkeypatch, capsys, toy_run, tmp_path
):
    monkeypatch.chdir(tmp_path)
    model = {"evaluate": ["x"], "rl": ["--model", toy_run]}.get(script, [])
    assert run(monkeypatch, script, *model, flag, value) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and flag in error
    assert (script, flag, value) not in BAD_CHOICES or (value in error and "choose from" in error)
    assert not list(tmp_path.iterdir())


def test_rl_without_a_warm_up_says_which_command_makes_one(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "rl") == 2
    assert "python warmup.py" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_flags_that_are_not_given_are_those_of_the_run_that_made_the_model(toy_run, tmp_path, capsys):
    """In every script; given ones override it, and a difference is said."""
    shutil.copytree(toy_run, tmp_path / "run")
    of_run = {"task": "svamp", "engine": "nl", "prompt_style": "reft", "data": "a.jsonl", "test_data": "b.jsonl"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(of_run | {"max_new_tokens": 7}))

    def config(script, **flags):
        if script == "evaluate":
            one = evaluate.Config(runs=(str(tmp_path / "run"),), **flags)
            one.as_trained(one.runs[0])
            return one
        return SCRIPTS[script].Config(model=str(tmp_path / "run"), **flags)

    for script in SCRIPTS:
        one = config(script)
        assert {name: getattr(one, name) for name in of_run} == of_run and one.max_new_tokens == 7
        assert not capsys.readouterr().out
        one = config(script, task="svamp", prompt_style="chat", test_data="c.jsonl")
        assert (one.prompt_style, one.data, one.test_data, one.max_new_tokens) == ("chat", "a.jsonl", "c.jsonl", 7)
        style, data = capsys.readouterr().out.splitlines()
        assert style.endswith("trained with --prompt-style reft (here: chat)")
        assert data.endswith("trained with --test-data b.jsonl (here: c.jsonl)")
        other = config(script, task="gsm8k")  # other problems, and lengths
        assert (other.prompt_style, other.test_data, other.max_new_tokens) == ("reft", None, 400)
        assert "--task svamp (here: gsm8k)" in capsys.readouterr().out
    assert config("rl").lr == 3e-7 and config("warmup").lr == 1e-5


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_no_run_made_needs_a_task(script, monkeypatch, capsys, toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "plain")
    (tmp_path / "plain" / "run.json").unlink()
    monkeypatch.chdir(tmp_path)
    before = snapshot(".")
    for model in ("plain", "some/hub-id"):
        assert run(monkeypatch, script, *([model] if script == "evaluate" else ["--model", model])) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {model} does not say") and "--task, one of toy, toy-long, gsm8k" in error
    assert snapshot(".") == before


def test_limit_and_test_limit_cut_one_split_each(toy_run, tmp_path, monkeypatch, capsys):
    asked = []
    for module in (warmup, rl, rollout, evaluate):
        real = module.load_problems
        monkeypatch.setattr(module, "load_problems", lambda *args, real=real: asked.append(args[1::2]) or real(*args))
    few = {"test_limit": 3, "max_new_tokens": 2}
    rl.main(rl.Config(model=str(toy_run), out=str(tmp_path), steps=1, rollout_batch=2, limit=5, **few))
    rollout.main(rollout.Config(model=str(toy_run), **few))
    evaluate.main(evaluate.Config(runs=(str(tmp_path),), out=str(tmp_path), **few))
    assert asked == [("train", 5), ("test", 3), ("test", 3), ("test", 3)]
    with pytest.raises(InputError, match="--test-limit"):
        evaluate.Config(runs=("x",), limit=5)


def test_rl_refuses_to_write_over_its_warm_up(monkeypatch, capsys, toy_run, tmp_path):
    (tmp_path / "link").symlink_to(toy_run)
    before = snapshot(toy_run)
    for out in (toy_run, tmp_path / "link", f"{toy_run}/../{toy_run.name}"):
        assert run(monkeypatch, "rl", "--model", toy_run, "--out", out, "--resume") == 2
        assert "another folder than --model" in capsys.readouterr().err
    assert snapshot(toy_run) == before


def test_an_impossible_ratio_stops_before_anything_is_written(monkeypatch, capsys, toy_run, tmp_path):
    flags = ["--model", toy_run, "--out", tmp_path / "rl", "--skip-ratio", "0.8", "--limit", 9]
    assert run(monkeypatch, "rl", *flags) == 2
    assert "--skip-ratio" in capsys.readouterr().err
    assert not (tmp_path / "rl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_asked_for_and_absent_stops_before_anything_is_written(script, monkeypatch, capsys, toy_run, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = {"warmup": [], "evaluate": [toy_run]}.get(script, ["--model", toy_run])
    assert run(monkeypatch, script, *model, "--device", "cuda", "--test-limit", 9) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --device is cuda") and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


GOOD = '{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n'
NO_COT = '{"item_id": "a", "question": "What is 1 + 1?", "answer_value": "2"}\n'
LONG = json.dumps({"question": "How many? " * 300, "answer": "1 + 1 = 2\n#### 2"})

# what is wrong: the lines of the data file, or changes of the checkpoint; the flags; the words that the error must hold
BAD_INPUT = {
    "no data file": (None, [], ["data.jsonl"]),
    "empty file": ("", [], ["data.jsonl", "none of its 0 rows"]),
    "broken line": (GOOD + '{"question": "x", "ans', [], ["data.jsonl:2", "not JSON"]),
    "a list in place of a row": (GOOD + "[1, 2]\n", [], ["data.jsonl:2"]),
    "not text": (b"\xff\xfe\x00", [], ["data.jsonl", "UTF-8"]),
    "missing field": (GOOD + '{"question": "x"}\n', [], ["data.jsonl:2", "'answer'", "question, answer"]),
    "empty question": (GOOD + '{"question": " ", "answer": "#### 2"}\n', [], ["data.jsonl:2", "question is empty"]),
    "gold answer without a number": (GOOD + '{"question": "x", "answer": "#### two"}\n', [], ["data.jsonl:2", "two"]),
    "gold answer missing": (GOOD + '{"question": "x", "answer": "1 + 1 = 2"}\n', [], ["data.jsonl:2", "####"]),
    "no chain of thought": (NO_COT, [], ["1 of 1 training problems", "chain of thought"]),
    "programs for words": (NO_COT.replace("}", ', "answer_cot": "def solution(): return 2"}'), [], ["engine"]),
    "question longer than the context": (GOOD + LONG, [], ["problem 2", "context"]),
    "completion longer than the context": (GOOD, ["--max-new-tokens", 999], ["context", "999"]),
    "no EOS anywhere": (
        lambda run: edit(run, "tokenizer_config.json", "config.json", "generation_config.json"),
        [],
        ["end-of-sequence"],
    ),
    "a vocabulary larger than the embedding": (lambda run: cut_embedding(run), [], ["embedding of 300 rows"]),
    "the checkpoint is a file": (GOOD, ["--model", "data.jsonl"], ["data.jsonl", "not a checkpoint"]),
    "the folder has no checkpoint": (GOOD, ["--model", "."], ["not a checkpoint"]),
    "--out is a file": (GOOD, ["--out", "data.jsonl"], ["data.jsonl: cannot be written"]),
    "--out is below a file": (GOOD, ["--out", "data.jsonl/x"], ["data.jsonl/x: cannot be written"]),
    "no such hub id": (GOOD, ["--model", "nobody/nothing-here"], ["nobody/nothing-here", "local folder"]),
    "no such hub data": (None, ["--data", "nobody/nothing-here"], ["nobody/nothing-here", "local"]),
}


def edit(run, *names):
    """Take the end-of-sequence token out of these files."""
    for name in names:
        content = {k: v for k, v in json.loads((run / name).read_text()).items() if not k.startswith("eos_token")}
        (run / name).write_text(json.dumps(content | ({"eos_token_id": None} if name == "config.json" else {})))


def cut_embedding(run):
    """A checkpoint whose embedding has fewer rows than its tokenizer has tokens."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    weights = load_file(run / "model.safetensors")
    small = {name: w[:300].clone() if "embed" in name or "head" in name else w for name, w in weights.items()}
    save_file(small, run / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("script", ["warmup", "rl"])
@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(
    script, what, monkeypatch, capsys, toy_run, tmp_path
):
    content, flags, words = BAD_INPUT[what]
    if what == "no chain of thought" and script == "rl":
        pytest.skip("rl.py needs questions and answers only")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(toy_run, "model")
    if callable(content):
        content(Path("model"))
        content = GOOD
    if content is not None:
        Path("data.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    Path("test.jsonl").write_text(GOOD)
    before = snapshot(".")
    data = ["--task", "gsm8k", "--data", "data.jsonl", "--test-data", "test.jsonl"]
    base = ["--model", "model", "--out", "out", "--steps", "1", "--max-new-tokens", "8", *data]
    assert run(monkeypatch, script, *base, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert all(word in error for word in words), error
    assert snapshot(".") == before


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        ("evaluate", ["file"], "file: not a"),
        ("evaluate", ["MODEL", "file"], "file: not a"),  # before the first one takes its time
        ("rollout", ["--model", "file"], "file: not a"),
        ("evaluate", ["MODEL", "--out", "file"], "file: cannot be written"),
        ("evaluate", ["MODEL", "--keep-correct", "file/x", "--samples", 1, "--limit", 2], "file: cannot be written"),
    ],
)
def test_evaluate_and_rollout_refuse_a_file_as_checkpoint_and_as_folder(
    script, argv, words, monkeypatch, capsys, toy_run, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    argv = [toy_run if word == "MODEL" else word for word in argv]
    assert run(monkeypatch, script, *argv, "--test-limit", 2, "--max-new-tokens", 2) == 2
    out, error = capsys.readouterr()
    assert words in error and len(error.strip().splitlines()) == 1 and not out
    assert snapshot(".") == {Path("file"): b"x"}
