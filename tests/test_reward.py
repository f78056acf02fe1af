"""reward.py: properties of the reward, the data it reads, the errors it names, the toy task."""

import itertools
import json
import random
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import (
    TASKS,
    TOY_SIZES,
    TOY_THINGS,
    InputError,
    Problem,
    extract_answer,
    load_problems,
    make_prompt,
    make_target,
    read_options,
    score,
    to_row,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")
OPTIONS = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"


# ---- properties of the reward ----------------------------------------------------------------------------------------


@st.composite
def spelled_numbers(draw) -> tuple[str, Fraction]:
    """A number in one of the spellings of the grammar, and its exact value."""
    integer, negative = draw(st.integers(0, 10**18)), draw(st.booleans())
    kind = draw(st.sampled_from(["integer", "decimal", "fraction", "mixed", "e", "ten"]))
    whole = draw(st.sampled_from([f"{integer}", f"{integer:,}", f"{integer:,}".replace(",", "\u2009")]))
    text, value = whole, Fraction(integer)
    if kind in ("decimal", "e", "ten"):
        digits = draw(st.text("0123456789", min_size=1, max_size=8))
        text, value = f"{whole}.{digits}", integer + Fraction(int(digits), 10 ** len(digits))
    if kind in ("e", "ten"):
        power = draw(st.integers(-12, 12))
        text += draw(st.sampled_from(["e{}", "E{}"] if kind == "e" else [" x 10^{}", " \\times 10^{{{}}}"])).format(
            power
        )
        value *= Fraction(10) ** power
    if kind in ("fraction", "mixed"):
        under = draw(st.integers(2, 1000))
        over = draw(st.integers(1, under - 1))
        form = draw(st.sampled_from(["{}/{}", "{} / {}", "\\frac{{{}}}{{{}}}"]))
        text = form.format(over, under) if kind == "fraction" else f"{whole} {form.format(over, under)}"
        value = Fraction(over, under) + (integer if kind == "mixed" else 0)
    sign = draw(st.sampled_from(["-", "\u2212", "- "])) if negative else draw(st.sampled_from(["", "+"]))
    before, after = draw(
        st.sampled_from([("", ""), ("$", ""), ("", "%"), ("", " apples"), ("**", "**"), ("<", ">."), ("$", "$")])
    )
    return f"{before}{sign}{text}{after}{draw(st.sampled_from(['', '.', ' ']))}", -value if negative else value


MARKERS = ["The answer is {}", "Therefore, the answer is: {}", "12.\n#### {}", "A: {}", "so \\boxed{{{}}}."]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(spelled_numbers(), st.sampled_from(MARKERS))
def test_a_number_in_any_spelling_is_read_back(spelled, marker):
    text, value = spelled
    completion = marker.format(text)
    assert Fraction(extract_answer(completion, "gsm8k")) == value
    assert score(completion, str(value), "gsm8k") == 1.0
    assert score(completion, str(value + 1), "gsm8k") == 0.1


PIECES = [
    "the answer is",
    "####",
    "\nA:",
    "\\boxed{",
    "}",
    "{",
    "18",
    "1,080",
    "3/4",
    ".",
    ",",
    " ",
    "\n",
    "$",
    "-",
    "e3",
    "=",
]
PIECES += [
    "a",
    "(b)",
    "or",
    "\\frac",
    "^",
    "x 10^",
    "<",
    ">",
    "%",
    "\u2009",
    "½",
    "apples",
    "\ud800",
    "\x00",
    "\u0130",
    "5" * 400,
]
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT, ANY_TEXT, st.sampled_from(TASKS), st.one_of(st.none(), st.just(OPTIONS), ANY_TEXT))
def test_no_text_raises_and_the_reward_says_whether_there_was_an_answer(completion, gold, task, options):
    reward, answer = score(completion, gold, task, options), extract_answer(completion, task, options)
    assert reward in (0.0, 0.1, 1.0)
    assert (reward == 0.0) == (answer is None)
    if answer is not None:
        assert score(f"#### {answer}", answer, task, options) == 1.0


PROSE = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from([*PIECES[4:], "Then ", "20"]), max_size=10).map("".join)
)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT, PROSE, st.sampled_from(["gsm8k", "mathqa"]))
def test_another_paragraph_without_a_marker_changes_nothing(completion, prose, task):
    if any(marker in prose.lower() for marker in ("the answer is", "####", "a:", "boxed")):
        return
    assert extract_answer(f"{completion}\n\n{prose}", task, OPTIONS) == extract_answer(completion, task, OPTIONS)


REPEATED = [
    "#",
    "\\boxed{",
    "\\boxed{{a}",
    "{",
    "{}",
    "the answer is ",
    "the ",
    "9",
    "1,",
    "1,234",
    "1/",
    "=1 ",
    "A:\n",
    "\n",
    " ",
]
REPEATED += ["a or ", "word ", "\\frac{1}", "<", "e", "$", "*", "-", "10^", "\u0130", "\\text{", "^{", "(", "1 word "]


@pytest.mark.parametrize("piece", REPEATED)
@pytest.mark.parametrize("frame", ["{}", "the answer is {}", "\\boxed{{{}}}", "{} the answer is 18"])
def test_a_million_characters_take_less_than_a_second(frame, piece):
    text = frame.format(piece * (10**6 // len(piece)))
    for task in ("gsm8k", "mathqa"):
        start = time.process_time()
        score(text, "18", task, OPTIONS)
        assert time.process_time() - start < 1.0


def test_no_line_makes_the_grammar_backtrack_for_long():
    rng = random.Random(0)
    pieces = [*PIECES, *REPEATED, "²", "'", "km", "/", "(", "million", "because", "½", "°", "or"]
    for _ in range(1500):
        line = rng.choice(["", "18", "$", "x = "]) + "".join(rng.choices(pieces, k=rng.randint(1, 3))) * 400
        start = time.process_time()
        score(f"the answer is {line}", "18", "gsm8k")
        score(f"the answer is {line}", "a", "mathqa", OPTIONS)
        assert time.process_time() - start < 0.5, line[:40]


def test_any_thread_scores():
    rewards = []
    threads = [threading.Thread(target=lambda: rewards.append(score("#### 18", "18", "gsm8k"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [1.0] * 4


# ---- prompts and data ------------------------------------------------------------------------------------------------


def test_prompt_and_target_are_those_of_reft():
    problem = Problem("How many?", "9 + 9 = 18", "18")
    assert make_prompt(problem) == "Question:\nHow many?\nAnswer reasoning:\n"
    assert make_target(problem) == "9 + 9 = 18\nTherefore, the answer is: 18"
    assert make_target(Problem("How many?", "def solution():\n    return 18", "18"), "python").endswith("return 18")


@pytest.mark.parametrize("engine", ["nl", "python"])
def test_a_row_of_a_completion_gives_the_completion_back(engine, tmp_path):
    problems = load_problems("toy", "train", limit=50, engine=engine)
    rows = [to_row(problem, make_target(problem, engine), "gsm8k", engine, "gsm8k_0") for problem in problems]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_problems("gsm8k", "train", str(tmp_path / "rows.jsonl"), engine=engine) == problems
    assert set(rows[0]) == {"item_id", "question", "answer_cot", "answer_value"}  # ReFT's schema


def test_a_completion_that_no_row_gives_back_has_none():
    problem = Problem("How many?", "", "1080")
    good = "9 + 9\nTherefore, the answer is: 1080"
    assert to_row(problem, good, "gsm8k", "nl", "x")["answer_cot"] == "9 + 9"
    assert to_row(problem, good.replace("1080", "1080.0"), "gsm8k", "nl", "x")["answer_value"] == "1080.0"
    for other in ("$1,080", "1,080", "1080 Eggs", "1080\n", " 1080", "", "1080\nTherefore, the answer is: x"):
        assert to_row(problem, good.replace("1080", other), "gsm8k", "nl", "x") is None, other
    boxed = "So \\boxed{1,080} eggs."
    assert to_row(problem, boxed, "gsm8k", "nl", "x")["answer_cot"] == boxed
    assert make_target(Problem("How many?", boxed, "1080")) == boxed  # what a chat model writes
    assert to_row(problem, good.replace("9 + 9", boxed), "gsm8k", "nl", "x")["answer_value"] == "1080"
    for other in ("So \\boxed{1080}.\n", "\nTherefore, the answer is: 1080", " " + good, "#### 1080"):
        assert to_row(problem, other, "gsm8k", "nl", "x") is None, other
    assert to_row(problem, "def solution():\n    return 1080\n", "gsm8k", "python", "x") is None
    choice = Problem(f"How many?\n{OPTIONS}", "", "c", OPTIONS)
    assert to_row(choice, "x\nTherefore, the answer is: c", "mathqa", "nl", "x")["answer_value"] == "c"
    assert to_row(choice, "x\nTherefore, the answer is: C", "mathqa", "nl", "x") is None


# (task, split, file, engine, rows, problems with a chain of thought); mathqa-numeric leaves rows out
FILES = [
    ("gsm8k", "train", "gsm8k/train.jsonl", "nl", 7473, True),
    ("gsm8k", "test", "gsm8k/test.jsonl", "nl", 1319, True),
    ("gsm8k", "test", "gsm8k/reft_test.jsonl", "nl", 1319, False),
    ("svamp", "train", "svamp/train.jsonl", "nl", 700, True),
    ("svamp", "test", "svamp/test.jsonl", "nl", 300, True),
    ("svamp", "train", "svamp/reft_nl.jsonl", "nl", 3076, True),
    ("svamp", "train", "svamp/reft_python.jsonl", "python", 3043, True),
    ("svamp", "test", "svamp/reft_test.jsonl", "nl", 1000, False),
    ("mathqa", "train", "mathqa/train_gain.jsonl", "nl", 3655, True),
    ("mathqa", "validation", "mathqa/validation.jsonl", "nl", 4475, True),
    ("mathqa", "test", "mathqa/test.jsonl", "nl", 2985, True),
    ("mathqa", "test", "mathqa/reft_test.jsonl", "nl", 1605, False),
    ("mathqa-numeric", "train", "mathqa/train_gain.jsonl", "nl", 3655 - 150, True),
    ("mathqa-numeric", "validation", "mathqa/validation.jsonl", "nl", 4475 - 335, True),
    ("mathqa-numeric", "test", "mathqa/test.jsonl", "nl", 2985 - 186, True),
    ("mathqa-numeric", "test", "mathqa/reft_numeric_test.jsonl", "nl", 1605, False),
]


@needs_data
@pytest.mark.parametrize(("task", "split", "name", "engine", "count", "has_cot"), FILES)
def test_every_row_is_a_right_problem(task, split, name, engine, count, has_cot, capsys):
    problems = load_problems(task, split, str(DATA / name), engine=engine)
    rows = len((DATA / name).read_text(encoding="utf-8").split("\n")) - 1
    assert len(problems) == count
    assert ("left out" in capsys.readouterr().out) == (count < rows)
    for problem in problems:
        assert problem.question == problem.question.strip() != ""
        assert problem.answer == problem.answer.strip()
        assert "<<" not in problem.cot and "####" not in problem.cot
        assert bool(problem.cot) == has_cot
        assert (problem.options is not None) == (task == "mathqa")
        rendered = f"Therefore, the answer is: {problem.answer}"
        assert score(rendered, problem.answer, task, problem.options) == 1.0
        if engine == "python":
            assert make_target(problem, engine) == problem.cot
        else:
            assert score(make_target(problem), problem.answer, task, problem.options) == 1.0
        if task == "mathqa":
            assert len(read_options(problem.options)) == 5
            assert problem.question.endswith(problem.options)


@needs_data
def test_reft_chains_of_thought_end_in_their_own_answer():
    problems = load_problems("svamp", "train", str(DATA / "svamp/reft_nl.jsonl"))
    odd = {p.answer: p.cot[-4:] for p in problems if score(p.cot, p.answer, "svamp") != 1.0}
    # The two rows of the data's README whose text and answer_value differ by rounding.
    assert odd == {"8.9333333333": "<9>.", "69.4": "2%>."}


@needs_data
def test_right_options_are_the_numbers_of_reft():
    values = {row["item_id"].partition("_")[2]: row["answer_value"] for row in read("mathqa/reft_numeric_test.jsonl")}
    differ, left_out = {}, 0
    for index, row in enumerate(read("mathqa/test.jsonl")):
        value = {letter: value for letter, _, value in read_options(row["options"])}[row["correct"]]
        if str(index) in values and value is None:
            left_out += 1
        elif str(index) in values and abs(float(value) - float(values[str(index)])) > 1e-6:
            differ[float(value)] = float(values[str(index)])
    assert left_out == 45  # times, ratios, "s . 280" for rupees, "384 cm 2"
    # ReFT's numbers lost three minus signs and what stood behind four thousands commas.
    assert differ == {-120: 120, -60: 60, -6: 6, 1354: 1, 3375: 3, 13400: 13, 4000: 4}


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


GSM8K = {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\nThat is $<<18*60=1080>>1,080.\n#### 1,080"}
SVAMP = {"Body": "Ann has 9.", "Question": "How many?", "Equation": "( 9.0 + 9.0 )", "Answer": "18"}
MATHQA = {"Problem": "how many ?", "Rationale": '"it is 30 . answer c"', "options": OPTIONS, "correct": "c"}
REFT = {
    "item_id": "x_0",
    "question": " How many? ",
    "answer_cot": "9 + 9\n\nTherefore, the answer is <18>.",
    "answer_value": "18.0",
}
PROGRAM = REFT | {"answer_cot": "def solution():\n    result = 18\n    return result"}


def write(folder: Path, *rows, name: str = "data.jsonl") -> str:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("gsm8k", GSM8K, Problem("How many?", "9 + 9 = 18\nThat is $1,080.", "1080")),
        ("svamp", SVAMP, Problem("Ann has 9. How many?", "( 9.0 + 9.0 ) = 18", "18")),
        ("svamp", SVAMP | {"question_concat": "Ann has 9. So?"}, Problem("Ann has 9. So?", "( 9.0 + 9.0 ) = 18", "18")),
        ("svamp", SVAMP | {"Answer": 18}, Problem("Ann has 9. How many?", "( 9.0 + 9.0 ) = 18", "18")),
        ("mathqa", MATHQA, Problem(f"how many ?\n{OPTIONS}", "it is 30 . answer c", "c", OPTIONS)),
        ("mathqa-numeric", MATHQA, Problem("how many ?", "it is 30 . answer c", "30")),
        ("gsm8k", REFT, Problem("How many?", "9 + 9\n\nTherefore, the answer is <18>.", "18.0")),
        ("gsm8k", {"question": "How many?", "answer_value": "18"}, Problem("How many?", "", "18")),
        ("mathqa", {"question": "how many ?", "answer_value": "c"}, Problem("how many ?", "", "c")),
        ("gsm8k", REFT | {"answer_cot": None}, Problem("How many?", "", "18.0")),
        (
            "mathqa",
            {"question": f"how many ?\n{OPTIONS}", "answer_value": "C"},
            Problem(f"how many ?\n{OPTIONS}", "", "c", OPTIONS),
        ),
    ],
)
def test_rows_of_every_schema(task, row, problem, tmp_path):
    assert load_problems(task, "train", write(tmp_path, row)) == [problem]
    assert (
        load_problems(task, "train", write(tmp_path, f"[{json.dumps(row)},\n{json.dumps(row)}]", name="a.json"))
        == [problem] * 2
    )


def test_programs(tmp_path):
    assert load_problems("svamp", "train", write(tmp_path, PROGRAM), engine="python")[0].cot == PROGRAM["answer_cot"]
    # A test split needs no programs: its answers are enough.
    assert load_problems("gsm8k", "test", write(tmp_path, GSM8K), engine="python") == [Problem("How many?", "", "1080")]


def test_lines_end_at_line_feeds_only_and_empty_lines_are_skipped(tmp_path):
    path = write(tmp_path, "\ufeff", GSM8K | {"question": "How\u2028many\x85?"}, "", GSM8K, "  ")
    assert [problem.question for problem in load_problems("gsm8k", "test", path)] == ["How\u2028many\x85?", "How many?"]


def test_limit_takes_the_first_rows_and_reads_no_others(tmp_path):
    path = write(tmp_path, GSM8K, GSM8K | {"question": "Second?"}, "no JSON")
    assert [problem.question for problem in load_problems("gsm8k", "test", path, limit=2)] == ["How many?", "Second?"]
    assert len(load_problems("gsm8k", "test", write(tmp_path, GSM8K), limit=5)) == 1


def test_mathqa_numeric_says_how_many_rows_it_leaves_out(tmp_path, capsys):
    path = write(tmp_path, MATHQA, MATHQA | {"correct": "d"}, MATHQA | {"correct": "e"})
    assert [problem.answer for problem in load_problems("mathqa-numeric", "test", path)] == ["30"]
    assert "left out 2 of 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        ("gsm8k", [GSM8K, "{'question': 1}"], [":2:", "not JSON", "one object a line"]),
        ("gsm8k", [GSM8K, "", "[" * 10**5], [":3:", "not JSON"]),
        ("gsm8k", ['[{"question": 1},\n {"question": }]'], [":2:", "not JSON"]),
        ("gsm8k", ["17"], [":1:", "'question'", "question, answer"]),
        ("gsm8k", [GSM8K, SVAMP], [":2:", "'question'", "answer_cot"]),
        ("gsm8k", [{"question": "How many?"}], [":1:", "'answer'"]),
        ("gsm8k", [{"question": "How many?", "answer": ["18"]}], [":1:", "'answer'", "no text"]),
        ("gsm8k", [{"question": "How many?", "answer_value": True}], [":1:", "'answer_value'"]),
        ("gsm8k", [json.dumps([REFT, {"question": "How many?", "answer_value": None}])], ["row 2:", "'answer_value'"]),
        ("gsm8k", [GSM8K, GSM8K | {"question": " "}], [":2:", "question is empty"]),
        ("gsm8k", [GSM8K | {"answer": "9 + 9 = 18"}], [":1:", "#### <number>"]),
        ("gsm8k", [GSM8K | {"answer": "#### 1,08"}], [":1:", "'1,08'", "is not one number"]),
        ("svamp", [SVAMP | {"Answer": "nan"}], [":1:", "'nan'", "is not one number"]),
        ("svamp", [GSM8K], [":1:", "'Body'", "Body, Question, Equation, Answer"]),
        ("mathqa", [MATHQA | {"correct": "f"}], [":1:", "'f'"]),
        ("mathqa", [MATHQA | {"options": "a ) 1 , b ) 2"}], [":1:", "five options"]),
        ("mathqa", [REFT], [":1:", "'18.0'", "is not a letter"]),
        ("mathqa-numeric", [MATHQA | {"correct": "d"}], ["none of its 1 rows"]),
        ("gsm8k", [PROGRAM], [":1:", "engine python"]),
        ("gsm8k", [""], ["none of its 0 rows"]),
        ("gsm8k", ["[]"], ["none of its 0 rows"]),
    ],
)
def test_bad_data_is_named_by_its_line(task, rows, words, tmp_path):
    path = write(tmp_path, *rows)
    with pytest.raises(InputError) as error:
        load_problems(task, "train", path)
    message = str(error.value)
    assert message.startswith(path) and "\n" not in message
    assert all(word in message for word in words), message


def test_bad_requests_are_named(tmp_path):
    for args, words in [
        (("gsm", "train"), ["'gsm'", "mathqa-numeric"]),
        (("gsm8k", "train", str(tmp_path / "none.jsonl")), ["none.jsonl", "cannot be read"]),
        (("gsm8k", "train", str(tmp_path)), [str(tmp_path), "cannot be read"]),
        (("toy", "train", "data.jsonl"), ["data.jsonl", "generated"]),
        (("toy", "train", None, 0), ["limit 0"]),
        (("toy", "test", None, 513), ["limit 513", "512"]),
        (("svamp", "train", write(tmp_path, SVAMP), None, "python"), [":1:", "no program", "ReFT"]),
        (("svamp", "train", write(tmp_path, REFT, name="nl.jsonl"), None, "python"), [":1:", "engine python"]),
    ]:
        with pytest.raises(InputError) as error:
            load_problems(*args)
        assert all(word in str(error.value) for word in words), str(error.value)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(InputError, match="UTF-8"):
        load_problems("gsm8k", "train", str(tmp_path / "latin.jsonl"))


@pytest.mark.parametrize(
    ("task", "path", "asked", "row"),
    [
        ("gsm8k", None, ("openai/gsm8k", "main"), GSM8K),
        ("gsm8k", "someone/gsm8k", ("someone/gsm8k", None), REFT),
        ("svamp", None, ("ChilleD/SVAMP", None), SVAMP),
        ("mathqa", None, ("regisss/math_qa", None), MATHQA),
        ("mathqa-numeric", None, ("regisss/math_qa", None), MATHQA),
    ],
)
def test_the_hub_is_asked_for_the_usual_dataset(task, path, asked, row, monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_problems(task, "validation", path)) == 1
    assert calls == [(*asked, "validation")]


def test_without_network_the_hub_error_says_what_to_do(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError) as error:
        load_problems("gsm8k", "train")
    message = str(error.value)
    assert "openai/gsm8k, train: Couldn't reach the Hub; name another dataset, or a local .json" in message
    assert "\n" not in message


# ---- the toy task ----------------------------------------------------------------------------------------------------


def replay(question: str) -> list[int]:
    """The running totals of a toy problem, from its words."""
    words = question.replace(",", "").replace(".", "").split()
    totals = [int(words[2])]
    for verb, number in itertools.pairwise(words):
        if verb in ("buys", "finds", "gets", "wins", "drops", "gives", "loses", "sells"):
            totals.append(totals[-1] + (1 if verb in ("buys", "finds", "gets", "wins") else -1) * int(number))
    return totals


@pytest.fixture(scope="module")
def toy() -> dict[str, list[Problem]]:
    return {split: load_problems("toy", split) for split in TOY_SIZES}


def test_toy_problems_say_what_they_ask(toy):
    for split, problems in toy.items():
        assert len(problems) == TOY_SIZES[split]
        for problem in problems:
            totals = replay(problem.question)
            assert 3 <= len(totals) <= 5
            assert all(0 <= total <= 20 for total in totals)
            assert all(0 < abs(after - before) < 10 for before, after in itertools.pairwise(totals))
            assert problem.answer == str(totals[-1])
            assert score(make_target(problem), problem.answer, "toy") == 1.0
    assert sum(len(problem.question) for problem in toy["train"]) / TOY_SIZES["train"] < 70


def test_toy_splits_share_no_sequence_of_numbers_and_no_question(toy):
    numbers = {split: {tuple(replay(problem.question)) for problem in problems} for split, problems in toy.items()}
    assert not numbers["train"] & (numbers["test"] | numbers["validation"])
    assert not numbers["test"] & numbers["validation"]
    for problems in toy.values():
        assert len({problem.question for problem in problems}) == len(problems)


def test_toy_annotators_differ_and_things_have_their_own(toy):
    jumps = [problem.cot.startswith("That makes") for problem in toy["train"]]
    assert 0.49 < sum(jumps) / len(jumps) < 0.51
    for k, thing in enumerate(TOY_THINGS):
        some = [jump for jump, problem in zip(jumps, toy["train"], strict=True) if f" {thing}." in problem.question]
        assert abs(sum(some) / len(some) - (0.25 if k % 2 else 0.75)) < 0.03
    for steps in (2, 3, 4):  # how they write does not tell how long the problem is
        some = [
            jump
            for jump, problem in zip(jumps, toy["train"], strict=True)
            if len(replay(problem.question)) == steps + 1
        ]
        assert 0.47 < sum(some) / len(some) < 0.53
    for problem, jump in zip(toy["train"], jumps, strict=True):
        if jump:
            assert problem.cot == f"That makes {problem.answer}."
        else:
            totals = replay(problem.question)
            steps = itertools.pairwise(totals)
            assert problem.cot == " ".join(f"{a}{'+' if b > a else '-'}{abs(b - a)}={b}." for a, b in steps)


def test_toy_programs_return_the_answer(toy):
    problems = load_problems("toy", "test", engine="python")
    for problem, in_words in zip(problems, toy["test"], strict=True):
        assert (problem.question, problem.answer) == (in_words.question, in_words.answer)
        namespace: dict = {}
        exec(make_target(problem, "python"), namespace)  # our own text
        assert namespace["solution"]() == int(problem.answer)
        assert problem.cot.startswith("def solution():\n    result = ") and problem.cot.endswith("\n    return result")
        assert (problem.cot.count("\n") == 2) == in_words.cot.startswith("That makes")


def test_toy_is_the_same_in_every_run(toy):
    random.seed(1)
    assert load_problems("toy", "train", limit=100) == toy["train"][:100]
    first = toy["train"][0]
    assert first.question == "Tom has 14 apples. He sells 1 and buys 6. How many now?" and first.answer == "19"


def test_toy_is_generated_fast():
    start = time.process_time()
    load_problems("toy", "train")
    assert time.process_time() - start < 5.0
