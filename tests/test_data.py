"""Problems from files and from the hub, and what is said of data that is bad."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reward import (
    ANSWER_LINE,
    InputError,
    Problem,
    judge,
    load_problems,
    make_prompt,
    make_target,
    read_options,
    score,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")

OPTIONS = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
GSM8K = {
    "question": "How many?",
    "answer": "9 + 9 = <<9+9=18>>18\nThat is $<<18*60=1080>>1,080.\n#### 1,080",
}
SVAMP = {
    "Body": "Ann has 9.",
    "Question": "How many?",
    "Equation": "( 9.0 + 9.0 )",
    "Answer": "18",
}
MATHQA = {
    "Problem": "how many ?",
    "Rationale": '"it is 30 . answer c"',
    "options": OPTIONS,
    "correct": "C",
}
REFT = {
    "question": " How many? ",
    "answer_cot": "9 + 9\n\nTherefore, the answer is <18>.",
    "answer_value": "18.0",
}
PROGRAM = REFT | {"answer_cot": "def solution():\n    result = 18\n    return result"}
LETTER = {"question": f"how many ?\n{OPTIONS}", "answer_value": "C"}


def test_prompt_and_target_are_those_of_reft():
    problem = Problem("How many?", "9 + 9 = 18", "18")
    assert make_prompt(problem) == "Question:\nHow many?\nAnswer reasoning:\n"
    assert make_target(problem) == "9 + 9 = 18\nTherefore, the answer is: 18"
    for cot in (f"9 + 9{ANSWER_LINE}18.0", "So \\boxed{18} eggs."):
        assert make_target(Problem("How many?", cot, "18")) == cot
    assert make_target(Problem("How many?", "def ...", "18"), "python") == "def ..."


# ---- real files ----


# Task -> its files, with the number of their problems.
FILES = {
    "gsm8k": {"train": 7473, "test": 1319, "reft_test": 1319},
    "svamp": {"train": 700, "test": 300, "reft_nl": 3076, "reft_python": 3043, "reft_test": 1000},
    "mathqa": {"train_gain": 3655, "validation": 4475, "test": 2985, "reft_test": 1605},
    "mathqa-numeric": {
        "train_gain": 3505,
        "validation": 4139,
        "test": 2799,
        "reft_numeric_test": 1605,
    },
}


@needs_data
@pytest.mark.parametrize("task", FILES)
def test_every_row_is_a_right_problem(task, capsys):
    for name, count in FILES[task].items():
        path = DATA / task.removesuffix("-numeric") / f"{name}.jsonl"
        engine = "python" if name == "reft_python" else "nl"
        problems = load_problems(task, "train", str(path), engine=engine)
        assert len(problems) == count
        left_out = path.read_bytes().count(b"\n") - count
        assert (f"left out {left_out} of" in capsys.readouterr().out) == (left_out > 0)
        for problem in problems:
            assert problem.question == problem.question.strip() != ""
            assert "<<" not in problem.cot and "####" not in problem.cot
            assert bool(problem.cot) == ("_test" not in name)
            assert len(read_options(problem.options or "")) == (5 if task == "mathqa" else 0)
            for text in (ANSWER_LINE + problem.answer, make_target(problem)):
                assert score(text, problem.answer, task, problem.options) == 1.0


@needs_data
def test_reft_chains_of_thought_end_in_their_own_answer():
    problems = load_problems("svamp", "train", str(DATA / "svamp/reft_nl.jsonl"))
    wrong = [problem for problem in problems if score(problem.cot, problem.answer, "svamp") < 1]
    # Their text rounds the answer by more than the tolerance.
    ends = {problem.answer: problem.cot.rpartition("<")[2] for problem in wrong}
    assert ends == {"8.9333333333": "9>.", "69.4": "69.32%>.", "0.165": "0.17>."}


@needs_data
def test_right_options_are_the_numbers_of_reft():
    path = str(DATA / "mathqa" / "{}.jsonl")
    letters = load_problems("mathqa", "test", path.format("reft_test"))
    numbers = load_problems("mathqa-numeric", "test", path.format("reft_numeric_test"))
    outcomes = {"right": [], "wrong": [], "no_answer": []}
    for letter, number in zip(letters, numbers, strict=True):  # the same problems
        option = read_options(letter.options)[letter.answer]
        outcome, answer = judge(ANSWER_LINE + option, number.answer, "svamp")
        outcomes[outcome].append(answer)
    assert len(outcomes["no_answer"]) == 45  # times, ratios, "s . 280" for rupees, "384 cm 2"
    # ReFT's numbers lost three minus signs and what stood behind four thousands commas.
    assert sorted(outcomes["wrong"]) == ["-120", "-6", "-60", "13400", "1354", "3375", "4000"]


# ---- rows ----


def write(folder: Path, *rows, name: str = "data.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("gsm8k", GSM8K, Problem("How many?", "9 + 9 = 18\nThat is $1,080.", "1080")),
        ("svamp", SVAMP, Problem("Ann has 9. How many?", "( 9.0 + 9.0 ) = 18", "18")),
        ("mathqa", MATHQA, Problem(f"how many ?\n{OPTIONS}", "it is 30 . answer c", "c", OPTIONS)),
        ("mathqa-numeric", MATHQA, Problem("how many ?", "it is 30 . answer c", "30")),
        ("gsm8k", REFT | {"answer_cot": None}, Problem("How many?", "", "18.0")),
        ("gsm8k", {"question": "How?", "answer_value": 18}, Problem("How?", "", "18")),
        ("mathqa", LETTER, Problem(LETTER["question"], "", "c", OPTIONS)),
        ("mathqa", LETTER | {"question": "how?"}, Problem("how?", "", "c")),
    ],
)
def test_rows_of_every_schema(task, row, problem, tmp_path):
    assert load_problems(task, "train", write(tmp_path, row, name="x.JSONL")) == [problem]
    array = f"[{json.dumps(row)},\n{json.dumps(row)}]"
    assert load_problems(task, "train", write(tmp_path, array, name="x.json")) == [problem] * 2


def test_only_training_needs_programs(tmp_path):
    problem = load_problems("svamp", "train", write(tmp_path, PROGRAM), engine="python")[0]
    assert problem.cot == PROGRAM["answer_cot"]
    problem = load_problems("gsm8k", "test", write(tmp_path, GSM8K), engine="python")[0]
    assert problem == Problem("How many?", "", "1080")


def test_limit_takes_the_first_lines_which_end_at_line_feeds_only(tmp_path):
    strange = GSM8K | {"question": "How\u2028many\x85?"}
    path = write(tmp_path, "\ufeff", strange, "", GSM8K, "no JSON")
    problems = load_problems("gsm8k", "test", path, limit=2)
    assert [problem.question for problem in problems] == [strange["question"], "How many?"]


GOOD = json.dumps(GSM8K)
LETTERS = json.dumps(MATHQA)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("gsm8k", f"{GOOD}\n\n{{'question': 1}}", ":3: not JSON: .* one object a line"),
        ("gsm8k", '[{"question": 1},\n {"question": }]', ":2: not JSON"),
        ("gsm8k", "[" * 10**5, ":1: not JSON"),
        ("gsm8k", f"{GOOD}\n17", ":2: field 'question' is missing .* has question, answer"),
        ("gsm8k", f"[{GOOD}, {LETTERS}]", ": row 2: field 'question' .*\"1 [+] 1 = 2\""),
        ("gsm8k", GOOD.replace("many", r"\ud800"), ":1: field 'question'"),
        ("gsm8k", GOOD.replace("How many?", " "), ":1: the question is empty"),
        ("gsm8k", GOOD.replace("####", "A:"), ":1: 'answer' .* '#### <number>'"),
        ("gsm8k", GOOD.replace("1,080", "1,08"), ":1: the answer '1,08' is not one number"),
        ("mathqa", LETTERS.replace('"C"', '"f"'), ":1: 'correct' is 'f'"),
        ("mathqa", LETTERS.replace("27.675 , ", ""), ":1: 'options' are not five"),
        ("mathqa", json.dumps(REFT), ":1: the answer '18.0' .* a letter a-e"),
        ("mathqa-numeric", LETTERS.replace('"C"', '"d"'), ": none of its 1 rows"),
        ("gsm8k", json.dumps(PROGRAM), ":1: .* not for engine nl"),
        ("gsm8k", "", ": none of its 0 rows"),
    ],
)
def test_bad_data_is_named_by_its_line(task, text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=f"^{re.escape(path)}{message}.*$"):
        load_problems(task, "train", path)


@pytest.mark.parametrize(
    ("task", "path", "message"),
    [
        ("gsm", None, "unknown task 'gsm': .* mathqa-numeric"),
        ("toy", "nl.jsonl", "nl.jsonl: .* generated"),
        ("gsm8k", "none.jsonl", "none.jsonl: cannot be read .* No such file"),
        ("gsm8k", ".", ".: cannot be read .* Is a directory"),
        ("gsm8k", "latin.jsonl", "latin.jsonl: cannot be read as UTF-8 .* 0xe9"),
        ("gsm8k", "x.CSV", r'x.CSV: .*load_dataset\("csv", .*to_json\("x.jsonl"\)'),
        ("gsm8k", "x.parquet", r'x.parquet: .*load_dataset\("parquet", '),
        ("gsm8k", "nl.jsonl", "nl.jsonl:1: .* not for engine python; .*ReFT"),
    ],
)
def test_bad_requests_are_named(task, path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD, name="nl.jsonl")
    Path("latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(InputError, match=f"^{message}.*$"):
        load_problems(task, "train", path, engine="python")


# ---- the hub ----


@pytest.mark.parametrize(
    ("task", "path", "query", "row"),
    [
        ("gsm8k", None, ("openai/gsm8k", "main"), GSM8K),
        ("gsm8k", "someone/gsm8k", ("someone/gsm8k", None), REFT),
        ("svamp", None, ("ChilleD/SVAMP", None), SVAMP),
        ("mathqa", None, ("regisss/math_qa", None), MATHQA),
        ("mathqa-numeric", None, ("regisss/math_qa", None), MATHQA),
    ],
)
def test_the_hub_is_asked_for_the_usual_dataset(task, path, query, row, monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config, split) == (*query, "validation")
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_problems(task, "validation", path)) == 1


def test_an_error_of_the_hub_is_one_line_that_names_its_kind(monkeypatch):
    def load_dataset(name, config, split):
        raise PermissionError("Permission denied\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    reason = "gsm8k, train: cannot be loaded: PermissionError: Permission denied; .* the cache"
    with pytest.raises(InputError, match=f"^openai/{reason}.*$"):
        load_problems("gsm8k", "train")
