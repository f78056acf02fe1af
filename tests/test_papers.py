"""The scripts of studies: every command is one that its stage takes, and none is run."""

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import read_command

TOOLS = Path(__file__).parent / "tools"
# Programs that write their command into a file in place of running it.
RECORDER = """#!/bin/bash
line=$(printf '%q ' "$0" "$@")
echo "$line" >>"$COMMANDS"
"""
SCRIPTS = {
    "papers.sh": [],
    "study.sh": [],
    "svamp.sh": ["hub/model", "train.jsonl", "validation.jsonl", "test.jsonl"],
}


def dry_run(script, folder):
    """The words of every command of a script that stands in a project without files."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("python", "torchrun", "cat"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    (folder / "runs" / "papers").mkdir(parents=True)
    (folder / "tests" / "tools").mkdir(parents=True)
    copy = shutil.copy(TOOLS / script, folder / "tests" / "tools")
    recorded = folder / "commands"
    path = f"{programs}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COMMANDS": str(recorded)}
    subprocess.run(["bash", copy, *SCRIPTS[script]], env=environment, check=True)
    return [shlex.split(line) for line in recorded.read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_one_that_its_stage_takes_from_runs_that_an_earlier_one_makes(
    script, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    commands = [read_command(words) for words in dry_run(script, tmp_path)]
    assert len(commands) > 10
    for stage, flags in filter(None, commands):
        config = stage.Config(**vars(flags))
        if stage.__name__ == "evaluate":
            sources = [*config.runs, config.rerank or ""]
        else:
            sources = [config.model or ""]
        for source in sources:
            if source.startswith("runs/") and "*" not in source:
                assert Path(source, "run.json").exists()
        if stage.__name__ in ("warmup", "rl", "verifier"):
            out = Path(config.out)
            out.mkdir(parents=True)  # no run is made twice
            (out / "config.json").touch()
            (out / "run.json").write_text(json.dumps(asdict(config)))
