"""Reads a command of the README or of a script as its stage would, without running it."""

from argparse import Namespace
from dataclasses import fields
from types import ModuleType

import bench
import layers

import evaluate
import rl
import rollout
import verifier
import warmup

STAGES = {
    "warmup.py": warmup,
    "rl.py": rl,
    "verifier.py": verifier,
    "evaluate.py": evaluate,
    "tests/tools/bench.py": bench,
    "tests/tools/layers.py": layers,
}


def parser_of(stage: ModuleType):
    """The parser of `python STAGE.py`."""
    if stage is not evaluate:
        return rollout.new_parser(stage.Config)
    parser = rollout.new_parser(evaluate.ParsedFlags)
    parser.add_argument("runs", nargs="+")
    return parser


def read_command(words: list[str]) -> tuple[ModuleType, Namespace] | None:
    """The stage of a command and its flags; None for other programs.

    SystemExit: the stage knows no such flag. InputError: a number is out of its range.
    """
    scripts = [word for word in words if word in STAGES]
    if not scripts:
        return None
    stage = STAGES[scripts[0]]
    flags = parser_of(stage).parse_args(words[words.index(scripts[0]) + 1 :])
    for item in fields(stage.Config):
        rollout.check_range(item.name, getattr(flags, item.name), item.metadata.get("help"))
    return stage, flags
