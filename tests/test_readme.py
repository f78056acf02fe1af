"""README: its commands run as they stand, and its flags exist."""

import re
import shlex
import shutil
from pathlib import Path

import layers
from commands import STAGES, parser_of, read_command

import evaluate
import rl
import warmup

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text()
# What makes a command on the toy task a matter of seconds.
SMALL = {
    warmup: "--steps 2 --limit 64 --test-limit 4 --max-new-tokens 8",
    rl: "--steps 1 --limit 64 --test-limit 4 --rollout-batch 16 --minibatch 16",
    layers: "--test-limit 4",
    evaluate: "--test-limit 4",
}
OTHER_FLAGS = {"--help", "--jobs", "--minutes", "--nproc-per-node", "--shutdown-timeout"}


def python_commands():
    """The words of every command in a code block, then of those in the text, that start python."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").replace("&&", "\n").splitlines()
    lines += re.findall(r"`(python [^`\n]+)`", README)
    for line in dict.fromkeys(lines):
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"]:
            yield words


def can_run(stage, flags):
    """Whether a stage works on a toy task, on models that earlier commands have made."""
    models = flags.runs if stage is evaluate else [flags.model or ""]
    is_toy = flags.task in (None, "toy", "toy-long")
    return stage in SMALL and is_toy and all(Path(model).exists() for model in models)


def test_commands_on_the_toy_task_run_and_all_others_are_read_by_their_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    has_run = set()
    for words in python_commands():
        command = read_command(words)
        if command is None:
            assert words[1] in ("-m", "-c") or words[1].startswith("tests/tools/")
        elif can_run(*command):
            stage, flags = read_command([*words, *SMALL[command[0]].split()])
            if stage in (warmup, rl) and not flags.resume:
                shutil.rmtree(flags.out, ignore_errors=True)  # an alternative to an earlier one
            stage.main(stage.Config(**vars(flags)))
            has_run.add(stage)
    assert has_run >= {warmup, rl}


def test_every_flag_that_is_named_exists():
    known = set(OTHER_FLAGS)
    for stage in STAGES.values():
        known.update(parser_of(stage)._option_string_actions)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(named) > 10
    assert named <= known
