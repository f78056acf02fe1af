"""Make one change of mutations.txt at a time, in a copy, and see whether a test notices.

python tests/tools/mutate.py                  all of them; exits with 1 where one survives
python tests/tools/mutate.py gae --jobs 2     those whose file, text or tests hold the word
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401  (what is imported here, the forks need not import)
import transformers  # noqa: F401

PROJECT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutations.txt")
SECONDS = 300  # a mutation whose tests take longer counts as noticed


class Mutation(NamedTuple):
    """A change of one text of a file, and the tests that must notice it."""

    file: str
    tests: str
    old: str
    new: str


def read_list() -> Iterator[Mutation]:
    """The mutations of mutations.txt."""
    file = tests = old = ""
    for line in LIST.read_text().splitlines():
        mark, text = line[:2], line[2:]
        if mark == "- ":
            old = text
        elif mark == "+ ":
            yield Mutation(file, tests, old, text)
        elif line and mark != "# ":
            file, tests = line.split(": ")


def check(mutation: Mutation):
    """Leave with a message where the old text does not occur exactly once."""
    count = (PROJECT / mutation.file).read_text().count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        text = f"{mutation.file}: {mutation.old!r} occurs {count} times"
        sys.exit(f"{text}, it must be once; mend {LIST}")


def run(mutation: Mutation) -> tuple[Mutation, int, str]:
    """The mutation, pytest's exit code and its first failure; for a process of its own."""
    files, _, words = mutation.tests.partition(" -k ")
    with tempfile.TemporaryDirectory() as folder:
        copy, log = Path(folder, "project"), Path(folder, "log")
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".figures")
        shutil.copytree(PROJECT, copy, ignore=ignored)
        changed = copy / mutation.file
        changed.write_text(changed.read_text().replace(mutation.old, mutation.new))
        os.chdir(copy)
        sys.path[0] = str(copy)  # in place of the folder of this script
        signal.signal(signal.SIGALRM, lambda *_: pytest.exit("too long", 1))
        signal.alarm(SECONDS)
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        tests = [f"tests/{name}" for name in files.split()]
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests, "-k", words])
        signal.alarm(0)
        sys.stdout.flush()
        lines = log.read_text().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return mutation, int(code), failures[0][:110] if failures else ""


def main():
    """Run the mutations, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("word", nargs="?", default="", help="only mutations that hold it")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    chosen = [m for m in read_list() if any(options.word in part for part in m)]
    for mutation in chosen:
        check(mutation)
    caught = 0
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        for mutation, code, failure in pool.imap(run, chosen):
            verdicts = {0: "SURVIVED", 1: "caught"}
            verdict = verdicts.get(code, f"NOT RUN, pytest left with {code}")
            change = f"{mutation.file}: {mutation.old}  ->  {mutation.new}"
            print(f"{verdict}, {change}    {failure or mutation.tests}", flush=True)
            caught += code == 1
    print(f"{caught} of {len(chosen)} caught")
    sys.exit(caught < len(chosen))


if __name__ == "__main__":
    main()
