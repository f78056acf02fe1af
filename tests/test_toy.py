"""The toy tasks: generated problems that need no download, the same in every run."""

import itertools
import random
import re
import zlib

import pytest

from reward import (
    TOY_GAINS,
    TOY_LOSSES,
    TOY_STEPS,
    TOY_THINGS,
    Problem,
    load_problems,
    make_target,
    score,
)


def replay(question: str) -> list[int]:
    """The running totals of a toy problem, from its words."""
    words = re.sub("[,.]", "", question).split()
    totals = [int(words[2])]
    for verb, number in itertools.pairwise(words):
        if verb in TOY_GAINS:
            totals.append(totals[-1] + int(number))
        elif verb in TOY_LOSSES:
            totals.append(totals[-1] - int(number))
    return totals


@pytest.fixture(scope="module", params=TOY_STEPS)
def task(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def toy(task) -> dict[str, list[Problem]]:
    splits = ("train", "validation", "test")
    return {split: load_problems(task, split, limit=8000) for split in splits}


def test_toy_problems_say_what_they_ask(task, toy):
    fewest, most = {"toy": (2, 4), "toy-long": (8, 10)}[task]
    assert [len(problems) for problems in toy.values()] == [8000, 512, 512]
    for problem in itertools.chain(*toy.values()):
        totals = replay(problem.question)
        changes = [abs(after - before) for before, after in itertools.pairwise(totals)]
        assert fewest <= len(changes) <= most
        assert min(totals) >= 0
        assert max(totals) <= 20
        assert min(changes) > 0
        assert max(changes) < 10
        assert problem.answer == str(totals[-1])
        assert score(make_target(problem), problem.answer, task) == 1.0


def test_toy_splits_share_no_sequence_of_numbers_and_no_question(toy):
    seen = set()
    for problems in toy.values():
        assert len({problem.question for problem in problems}) == len(problems)
        sequences = {tuple(replay(problem.question)) for problem in problems}
        assert not sequences & seen
        seen |= sequences


def test_toy_annotators_mostly_jump_to_the_answer_for_half_of_the_things(toy):
    jumps = {thing: [] for thing in TOY_THINGS}
    for problem in toy["train"]:
        thing = problem.question.split()[3].strip(".")
        jumps[thing].append(problem.cot.startswith("That makes"))
    shares = [sum(some) / len(some) for some in jumps.values()]
    assert shares == pytest.approx([0.7, 0.2] * 4, abs=0.03)


def test_toy_chains_write_every_step_or_the_answer(toy):
    for problem in toy["train"]:
        steps = itertools.pairwise(replay(problem.question))
        written = " ".join(f"{a}{'+' if b > a else '-'}{abs(b - a)}={b}." for a, b in steps)
        assert problem.cot in (written, f"That makes {problem.answer}.")


def test_toy_programs_return_the_answer(task, toy):
    programs = load_problems(task, "test", engine="python")
    for problem, in_words in zip(programs, toy["test"], strict=True):
        assert problem.question == in_words.question
        assert problem.answer == in_words.answer
        namespace = {}
        exec(make_target(problem, "python"), namespace)  # our own text
        assert str(namespace["solution"]()) == problem.answer
        assert (problem.cot.count("\n") == 2) == in_words.cot.startswith("That makes")


def test_toy_is_the_same_in_every_run(task, toy):
    random.seed(1)
    assert load_problems(task, "train", limit=100) == toy["train"][:100]
    text = "\n".join(problem.question + problem.cot for problem in toy["train"])
    assert zlib.crc32(text.encode()) == {"toy": 487431035, "toy-long": 80709251}[task]
