"""How an answer is read out of a completion and paid: a row a rule, the mass in spellings.txt."""

import re
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import ANSWER_LINE, TASKS, extract_answer, judge, read_number, reward_of, score

LISTED = "['a ) 1', 'b ) 4 : 1', 'c ) rs . 1,250', 'd ) d ) 12 %', 'e ) 12']"
OPTIONS = "a ) 38 , b ) 27.675 , c ) 30 , d ) 10 : 3 , e ) none of these"

# (what stands behind the marker, gold, reward, rule)
NUMBERS = [
    ("18", "18", 1.0, "a number"),
    ("18", "18.0", 1.0, "ReFT's golds are floats as text"),
    ("9007199254740992", "9007199254740993", 0.1, "no floats: these two are equal as such"),
    ("1,080", "1080", 1.0, "thousands commas"),
    ("-5", "-5", 1.0, "a sign"),
    ("−5", "-5", 1.0, "the true minus sign"),
    ("3/4", "0.75", 1.0, "a fraction"),
    (r"\frac{1}{2}5", "0.04", 0.0, "which joins no digit behind it"),
    ("2 3/4", "2.75", 1.0, "a mixed number"),
    ("4 10/3", "22/3", 0.0, "the fraction of a mixed number is below 1"),
    ("1.8e3", "1800", 1.0, "e notation"),
    (r"1.8 \times 10^{3}", "1800", 1.0, "a power of ten"),
    ("18 million", "18000000", 1.0, "a word that scales"),
    ("18 M", "18", 0.0, "a letter that may scale"),
    ("$18 m", "18", 0.0, "millions, no metres"),
    ("18 below zero", "18", 0.0, "a sign in words"),
    ("18 cm²", "18", 1.0, "a square unit"),
    ("$18.50", "18.5", 1.0, "money"),
    ("rs . 400", "400", 1.0, "money in MathQA"),
    (r"5\%", "5", 1.0, "percent"),
    (r"\(18\)", "18", 1.0, "LaTeX"),
    (r"18 \text{ apples}", "18", 1.0, "LaTeX's text"),
    ("20 - 2 = 18", "18", 1.0, "the value of a sum"),
    ("20 - 2 = 18", "20", 0.1, "and not its first number"),
    ("3 * 6 = 9 + 9 = 18", "18", 1.0, "a chain"),
    ("x = 18 y = 20", "20", 0.0, "of two values none"),
    ("the same as 9 + 9 = 18", "18", 0.0, "no sentence before the equals sign"),
    ("not 18", "18", 0.0, "but no denial"),
    ("18. I hope this helps!", "18", 1.0, "another sentence"),
    ("18, I think", "18", 1.0, "words behind a comma"),
    ("18, because 20 - 2 = 18", "18", 1.0, "an explanation"),
    ("18 because half of 40 = 20", "20", 0.1, "which holds no answer"),
    ("18 or 20", "18", 0.0, "two answers"),
    ("18.004", "18", 0.1, "a whole gold has no neighbours"),
    ("0.33", "1/3", 1.0, "0.01 off at most"),
    ("33.32", "33.3333", 0.1, "more than 0.01 off"),
    ("0.03", "0.036", 0.1, "more than 0.01 of gold off"),
    ("-0.33", "-1/3", 1.0, "the same below zero"),
]
# (completion, gold, reward, rule)
COMPLETIONS = [
    ("**The answer is**: 18", "18", 1.0, "bold before the colon"),
    ("The answer is:\n18", "18", 1.0, "the next line"),
    ("The answer is:\n\n18", "18", 0.0, "but no further one"),
    ("Q: how many? A: 18", "18", 0.0, "only there"),
    (r"\boxed{18\text{ apples}}", "18", 1.0, "a box"),
    (r"\boxed{18} or \boxed{20", "18", 1.0, "a box that stays open is no marker"),
    (r"\boxed{18} then the answer is: 20", "18", 0.1, "the last marker wins"),
    ("The answer is 18. The answer is 18 or 20.", "18", 0.0, "without an answer too"),
    (r"\boxed{18}, so the answer is consistent.", "18", 1.0, "prose is no marker"),
    (r"\boxed{18}. The answer is right: 9 + 9 = 18", "18", 1.0, "nor with a digit behind it"),
    (r"\boxed{18}. The answer is \boxed{}", "18", 1.0, "nor is an empty box"),
    ("\\boxed{18}\n#### Check 9 + 9 = 20", "18", 1.0, "nor a heading"),
    ("\\boxed{18}\n#### **2. Check**", "18", 1.0, "nor one with a number"),
    ("#### 18.\nI hope this helps", "18", 1.0, "but an answer may end in a full stop"),
    ("The answer is:\n- 18 apples", "18", 1.0, "a list mark is no sign"),
    ("The answer is:\n1. 18", "18", 1.0, "and no number"),
    ("The answer is:\n-18", "-18", 1.0, "a sign is no list mark"),
    ("The answer is:\n- 18\n- 20", "18", 0.0, "a list of answers"),
    ("The answer is:\n\n$$\n18\n$$", "18", 1.0, "a displayed formula"),
    ("The answer is:\n```text\n18\n```", "18", 1.0, "a fence"),
    ("The answer is:\n$$\n18\n+ 2\n$$", "18", 0.0, "of one line"),
    ("The answer is " + "0" * 1000 + "18", "0", 0.0, "no part of a number too long to read"),
    (r"The answer is 18 \boxed{\text{million}}", "18", 0.0, "no part before a box that is none"),
]
# (completion, letter of OPTIONS, reward, rule)
LETTERS = [
    ("The answer is (C).", "c", 1.0, "a letter"),
    ("The answer is option c", "C", 1.0, "a word before it"),
    (r"\boxed{\text{(C)}\ 30}", "c", 1.0, "its option behind it"),
    ("The answer is C, i.e., 30", "c", 1.0, "an explanation"),
    ("The answer is c because a is too small", "c", 1.0, "with other letters"),
    ("The answer is not a", "a", 0.0, "a letter comes first"),
    ("The answer is a - 4500", "a", 0.0, "algebra"),
    ("The answer is 10:3", "d", 1.0, "without its spaces"),
    ("The answer is 30 (b)", "c", 0.0, "but not beside a letter"),
    ("The answer is c.\nA: 38 is too large", "c", 1.0, "A: is an option"),
    ("The answer is c.\n#### B. Check", "c", 1.0, "nor is a heading"),
    ("#### (C) 30", "c", 1.0, "an answer is"),
    ("The answer is c. The answer is b or d", "c", 0.0, "the last marker wins"),
]


def named(table: list) -> list:
    return [pytest.param(*row[:3], id=f"{row[0][:30]!a} ({row[3]})") for row in table]


@pytest.mark.parametrize(("text", "gold", "reward"), named(NUMBERS))
def test_numbers(text, gold, reward):
    for frame in (ANSWER_LINE + "{}", "A: {}", "\\boxed{{{}}}"):
        for task in ("toy", "gsm8k", "svamp", "mathqa-numeric"):
            assert score(frame.format(text), gold, task) == reward


@pytest.mark.parametrize(("completion", "gold", "reward"), named(COMPLETIONS))
def test_markers(completion, gold, reward):
    assert score(completion, gold, "gsm8k") == reward


@pytest.mark.parametrize(("completion", "gold", "reward"), named(LETTERS))
def test_letters(completion, gold, reward):
    assert score(completion, gold, "mathqa", OPTIONS) == reward


@pytest.mark.parametrize(
    ("options", "text", "letter"),
    [
        (LISTED, "$1250", "c"),
        (LISTED, "12%", "d"),
        (LISTED, "12.0", None),
        ("a ) , b ) 1 , c ) 2 , d ) 3 , e ) 4", "?", None),
        ("a ) 38 , b ) 27", "38", None),
        (None, "c", "c"),
    ],
)
def test_an_option_is_named_by_what_no_other_option_says(options, text, letter):
    assert extract_answer(f"The answer is {text}", "mathqa", options) == letter


def spellings() -> list[tuple[str, str, str]]:
    """(task, answer, completion) of each line of spellings.txt."""
    task, rows = "", []
    for line in (Path(__file__).parent / "spellings.txt").read_text(encoding="utf-8").split("\n"):
        answer, _, text = line.partition(" | ")
        if line.startswith("=="):
            task = {"== numbers": "gsm8k", "== letters": "mathqa"}[line]
        elif task and text:
            text = re.sub("‹(....)›", lambda code: chr(int(code[1], 16)), text.replace("⏎", "\n"))
            if not re.search("(?im)the answer|####|^A:|box", text):
                text = f"The answer is: {text}"
            rows.append((task, answer, text))
    return rows


def test_every_spelling_is_read_as_its_answer_or_not_at_all():
    for task, answer, completion in spellings():
        allowed = {None if answer == "none" else answer.removesuffix("?")}
        if answer.endswith("?"):
            allowed.add(None)
        assert extract_answer(completion, task, OPTIONS) in allowed, completion


# ---- properties ----


def test_an_outcome_has_its_reward():
    assert judge("#### $1,080.00", "1,080", "gsm8k") == ("right", "1080")
    assert judge("#### 18/5", "18", "gsm8k") == ("wrong", "3.6")
    assert judge("#### 2/6", "18", "gsm8k") == ("wrong", "1/3")
    assert judge("so 18", "18", "gsm8k") == ("no_answer", None)
    outcomes = ("right", "wrong", "no_answer", "cut", "timeout")
    assert [reward_of(outcome) for outcome in outcomes] == [1, 0.1, 0, 0, 0]
    assert reward_of("wrong", 0.3) == 0.3


@st.composite
def spelled_numbers(draw) -> tuple[str, Fraction]:
    """A number in one of the spellings of the grammar, and its exact value."""
    whole, part, power = (draw(st.integers(*ends)) for ends in ((0, 10**18), (1, 998), (-9, 9)))
    spellings = [
        (f"{whole}", Fraction(whole)),
        (f"-{whole:,}.{part:03}", -whole - Fraction(part, 1000)),
        (f"{whole} {part}/999", whole + Fraction(part, 999)),
        (f"-{whole}\\frac{{{part}}}{{999}}", -whole - Fraction(part, 999)),
        (f"{whole:,}.5e{power}", (whole + Fraction(1, 2)) * Fraction(10) ** power),
        (f"-{whole} x 10^{power}", -whole * Fraction(10) ** power),
    ]
    frames = ["{}", "{}.", "${}", "{}%", "{} apples", "**{}**", "<{}>.", "$${}$$", "9 + 9 = {}"]
    text, value = draw(st.sampled_from(spellings))
    return draw(st.sampled_from(frames)).format(text), value


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(spelled_numbers(), st.sampled_from(["The answer is {}", "A: {}", "so \\boxed{{{}}}."]))
def test_a_number_in_any_spelling_is_read_back(spelled, frame):
    text, value = spelled
    assert read_number(text) == value
    assert Fraction(extract_answer(frame.format(text), "gsm8k")) == value
    assert score(frame.format(text), str(value + 1), "gsm8k") == 0.1


PIECE = r"the answer is|####|\\\w+\{?|\w+|\s?\W"
PIECES = sorted({piece for row in spellings() for piece in re.findall(PIECE, row[2])})
ANY_TEXT = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT, ANY_TEXT, st.sampled_from(TASKS), st.none() | st.just(OPTIONS) | ANY_TEXT)
def test_no_text_raises_and_an_answer_is_an_answer_of_itself(completion, gold, task, options):
    outcome, answer = judge(completion, gold, task, options)
    assert (outcome == "no_answer") == (answer is None)
    if answer is not None:
        assert judge(ANSWER_LINE + answer, answer, task, options) == ("right", answer)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT, ANY_TEXT, st.sampled_from(["gsm8k", "mathqa"]))
def test_another_paragraph_without_a_marker_changes_nothing(completion, prose, task):
    if not re.search(r"(?i)answer|#|A:|boxed|\$\$|```|\}", prose):
        answer = extract_answer(completion, task, OPTIONS)
        assert extract_answer(f"{completion}\n\n{prose}", task, OPTIONS) == answer


REPEATED = [
    "the answer is ",
    "####",
    "#### ",
    "\nA:",
    "A:\n",
    "\\boxed{",
    "\\boxed{{a}",
    "{}",
    "9",
    "1,",
]
REPEATED += [
    "1/",
    "=1 ",
    "a or ",
    "word",
    " ",
    "\n",
    "\\text{",
    "<",
    "$$",
    "```\n",
    "(",
    "10^",
    "\u0130",
]


@pytest.mark.parametrize("task", ["gsm8k", "mathqa"])
def test_no_text_takes_long(task):
    def seconds(text: str) -> float:
        start = time.process_time()
        score(text, "18", task, OPTIONS)
        return time.process_time() - start

    for piece in REPEATED:
        long = piece * (200_000 // len(piece))
        for frame in ("{}", "the answer is {}", "\\boxed{{{}}}", "{} the answer is 18"):
            assert seconds(frame.format(long)) < 1.0, (frame, piece)
        for other in REPEATED:  # a line that the grammar could backtrack in
            assert seconds(f"the answer is 18 {(piece + other) * 300}") < 0.5, (piece, other)


def test_any_thread_scores():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(score("#### 18", "18", "gsm8k")))
    thread.start()
    thread.join()
    assert rewards == [1.0]
