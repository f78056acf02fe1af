"""The environment: problems (x, e, y), how an answer is read out of a completion, and the reward r of eq. (3).

An answer counts only after a final-answer marker, and the last marker wins:

    the answer is ...    as in "Therefore, the answer is: 18"; any case, with or without colon or one line break
    #### ...             GSM8K
    \\boxed{...}          if its braces balance
    A: ...               at the start of a line

What follows must be one whole number (for MathQA a letter a-e), with or without a unit, by the grammar below. What does
not fit is no answer, and no part of it is one. No text of a completion is ever evaluated, and all arithmetic is exact.

ReFT's code calls float() on everything after one exact marker, pays 0.1 for any text on MathQA and takes numbers that
differ by 0.01 for equal. Here 0.1 needs an answer of the right kind, and same_number() is the tolerance.
"""

import itertools
import json
import random
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TASKS = ("toy", "gsm8k", "svamp", "mathqa", "mathqa-numeric")


class InputError(ValueError):
    """Data, flags or files that cannot be used, in one line: what is wrong, where, what to do. Scripts exit with 2."""


@dataclass(frozen=True)
class Problem:
    """One problem. options: for mathqa the five options in one text, as the data has them."""

    question: str  # x
    cot: str  # e, the annotated chain of thought, with engine "python" a program; "" when there is none
    answer: str  # y, a number, or for mathqa a letter a-e
    options: str | None = None


def make_prompt(problem: Problem) -> str:
    """What the model reads: ReFT's prompt."""
    return f"Question:\n{problem.question}\nAnswer reasoning:\n"


ANSWER_LINE = "\nTherefore, the answer is: "


def make_target(problem: Problem, engine: str = "nl") -> str:
    """What warm-up teaches the model to write, without EOS. A program (engine "python") is the whole target.

    So is a chain of thought with its answer in a box, as chat models write it.
    """
    whole = engine == "python" or "\\boxed{" in problem.cot
    return problem.cot if whole else f"{problem.cot}{ANSWER_LINE}{problem.answer}"


# ---- the reward ----


def score(completion: str, gold: str, task: str, options: str | None = None) -> float:
    """Reward of a completion that ended with EOS; one that was cut has no answer and earns 0. Raises on no text."""
    answer = read_answer(completion, task, options)
    if answer is None:
        return 0.0  # eq. (3): no answer
    right = answer == gold.strip().lower() if task == "mathqa" else same_number(answer, gold_number(gold))
    return 1.0 if right else 0.1  # eq. (3): right; wrong, but of the right kind


def extract_answer(completion: str, task: str, options: str | None = None) -> str | None:
    """The answer in one canonical spelling ("18.00", "$18" and "36/2" all give "18"), None when there is none."""
    answer = read_answer(completion, task, options)
    return number_text(answer.value) if isinstance(answer, Number) else answer


class Number(NamedTuple):
    """A number as written: its exact value, and how many decimals it shows (1.50: 2, 1.5e3: -2, 1/2: 0)."""

    value: Fraction
    decimals: int


def same_number(answer: Number, gold: Number | None) -> bool:
    """Whether answer is right: equal, or near a gold that is no integer.

    Near: 0.01 off at most, both absolutely and relatively, or gold rounded to the decimals that the answer shows. An
    answer that shows none is no rounding: 0 is wrong for 0.4.
    """
    if gold is None or gold.value.denominator == 1:
        return gold is not None and answer.value == gold.value
    error = abs(answer.value - gold.value)
    rounded = answer.decimals > 0 and answer.value != 0 and error <= Fraction(1, 2 * 10**answer.decimals)
    return rounded or error <= Fraction(1, 100) * min(1, abs(gold.value))


def number_text(value: Fraction) -> str:
    """18 or -3.6, or 1/3 where the decimals have no end."""
    decimal = Decimal(value.numerator) / value.denominator
    return f"{decimal:f}" if Fraction(decimal) == value else str(value)


# ---- where the answer stands ----

# The greedy start makes the last marker win. At most one line break is skipped: what follows an empty line is another
# paragraph. Time is linear: only the braces of a box can fail after the marker's words, and a box tries few characters
# twice.
MARKER = re.compile(
    r"""(?s:.*) (?: \\boxed[^\S\n]* \{ (?P<box> (?:[^{}\n] | \{(?:[^{}\n]|\{[^{}\n]*\})*\} )* ) \}
                  | (?: (?i:the\ (?:final\ |correct\ )?answer\ is)(?![^\W\d_]) | \#\#\#\# | (?<![^\n])A: )
                    [^\S\n]* :? [^\S\n]* [*_]* [^\S\n]* \n? (?P<line>[^\n]*) )""",
    re.VERBOSE,
)


def read_answer(completion: str, task: str, options: str | None = None) -> Number | str | None:
    """The answer after the last marker: a Number, for mathqa a letter. None when there is none."""
    marker = MARKER.match(completion)
    if marker is None:
        return None
    text = marker["line"] if marker["box"] is None else marker["box"]
    return read_letter(text, options) if task == "mathqa" else read_number(text)


# ---- the grammar of numbers and letters ----

MAX_LINE = 1000  # characters read after a marker
THIN = "\u2009"  # the thin space may part thousands, as the comma does
PLAIN = str.maketrans(
    {"−": "-", "–": "-", "⁄": "/", "∕": "/", "×": "x", "·": "x", "≈": "=", "\u202f": THIN, "½": " 1/2 "}
    | {"¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ", "‘": "'", "’": "'", "“": '"', "”": '"', "`": " "}
)
LATEX = (  # applied in this order; no replacement joins what stood apart
    (r"\{,\}", ","),
    (r"\\,", THIN),
    (r"\^\s?\{?\\(?:circ|degree)\}?", "° "),
    (r"\^\{([^{}]*)\}", r"^\1 "),
    (r"\\([$%{}])", r"\1"),
    (r"\\[dt]?frac\{([^{}\s]*)\}\{([^{}\s]*)\}", r" \1/\2 "),
    (r"\\[dt]?frac ?([0-9])([0-9])", r" \1/\2 "),
    (r"\\(?:text|math)[a-z]*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:times|cdot)(?![a-z])", "x"),
    (r"\\approx(?![a-z])", "="),
    (r"\\(?:(?:left|right|displaystyle|quad)(?![a-z])|[()\[\] ;:!])", " "),
)

SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
SCALES = "|".join(SCALE)
UINT = rf"(?:[1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}})+|(?:{THIN}[0-9]{{3}})+)|[0-9]+)"
MONEY = r"(?:(?:(?:us\ ?)?[$€£¥₹]|rs\ ?\.|(?:rs|usd|eur|inr)\b)\s*){0,3}"
ABOUT = r"(?:approximately|about|around|roughly|exactly|only|equal\ to)\s+"
AFFIX = r"\s*(?:%|percent\b|°(?:\s?[cf]\b)?|[$€£¥₹¢])"
UNIT = r"(?:[cmk]?m|[mk]?g|m?l|lbs?|oz|ft|in|hr?s?|mins?|s|mph)(?!\w)"
OTHER = rf"(?:{SCALES}|or|half|halves|thirds|k|x|pi|π|sqrt|plus|minus|over|divided|squared|cubed|[ap]\s?\.?\s?m)\b"
BECAUSE = r"(?:because|since|as|after|when|if|for|in|from|on|at|with)\b"
NUMBER = re.compile(
    rf"""
    [\s*_"'(\[{{]* (?:{ABOUT})? {MONEY} (?:(?P<sign>[-+])\s*)? {MONEY}
    (?: (?:(?P<whole>{UINT})\s+)? (?P<over>{UINT}) \s*/\s* (?P<under>{UINT})                # 3/4, 2 3/4
      | (?P<int>{UINT})? (?:\.(?P<frac>[0-9]+))? (?<=[0-9])                                 # 18, 1,800.50, .5
        (?: e(?P<e>[-+]?[0-9]{{1,3}}) | \s*[x*]\s*10\s*\^\s*(?P<ten>[-+]?[0-9]{{1,3}}) )?   # 1.8e3, 1.8 x 10^3
    )
    (?:\s*(?P<scale>{SCALES})\b)? (?:{AFFIX})? (?:{UNIT})? [\s*_"')\]}}$]* (?:/(?=[^\W\d_]))?  # 18 million, 18%, 18kg
    (?: (?<![0-9*_$]) (?!{OTHER})                           # Words of a unit. Not OTHER: "18 or" is not 18.
        [^\W\d_²³]+ (?:\s?\^\s?[23]|[23]|\s?[²³])? (?!\w) [\s*_"')\]}}$/'-]* )*
    (?: \Z | [.!?] (?![.!?\s]*[0-9=])                       # The end: of the line or the sentence,
      | [,;:] (?!\s*(?:(?:or|and)\b\s*)?{MONEY}[-+]?\s*\.?[0-9]) (?!\s*or\b)                # no list, ratio or time,
      | (?<=\s)\( (?!\s*[-+]?[0-9.,]+\s*\)) | — | (?<!\w){BECAUSE} )                        # or an explanation starts.
    """,
    re.VERBOSE,
)
EQUALS = re.compile(r"(?<![<>!=])=(?![=>])")
LETTER = re.compile(
    r"""[\s*_"'(\[{$]* (?:(?:option|choice|answer|letter)\b\s*:?\s*[(\[]?\s*)? (?P<letter>[a-e])
    (?!.*(?:,|/|\bor\b|\band\b)\s*(?:(?:option|choice)\s+)?[(\[]?(?:[b-e]\b|a\s*(?:[)\].,]|\Z)))  # no list of letters
    [*_"'$\s]* (?: \Z | [()\]},;:!?] | \.(?!\w) | (?:because|since|as)\b )""",
    re.VERBOSE,
)


def plain(text: str) -> str:
    """At most MAX_LINE characters of a line, in lower case, typographic and LaTeX spellings written plainly."""
    line = text[:MAX_LINE].lower().translate(PLAIN)
    if len(text) > MAX_LINE:
        line += "\\"  # fits no rule, so a number that the cut divides is none
    if "\\" in line or "{" in line:
        for pattern, replacement in LATEX:
            line = re.sub(pattern, replacement, line)
    return re.sub(r"<([^<>]*)>", r" \1 ", line) if "<" in line else line


def read_number(text: str) -> Number | None:
    """The number that a line starts with, or in "12 - 4 = 8" the one after the equals sign. None when none fits."""
    line = plain(text)
    match = NUMBER.match(line)
    for equals in EQUALS.finditer(line) if match is None else ():
        if match := NUMBER.match(line, equals.end()):
            break
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    shift = int(match["e"] or match["ten"] or 0) + SCALE.get(match["scale"], 0)
    if match["over"]:
        whole, over, under = natural(match["whole"]), natural(match["over"]), natural(match["under"])
        if under == 0 or (match["whole"] and over >= under):
            return None
        return Number(sign * 10**shift * (whole + Fraction(over, under)), 0)
    frac = match["frac"] or ""
    digits, decimals = sign * natural((match["int"] or "") + frac), len(frac) - shift
    return Number(Fraction(digits, 10**decimals) if decimals > 0 else Fraction(digits * 10**-decimals), decimals)


def natural(digits: str | None) -> int:
    """1080 of "1,080", 0 of nothing."""
    return int(digits.replace(",", "").replace(THIN, "")) if digits else 0


gold_number = lru_cache(maxsize=1 << 16)(read_number)


def read_letter(text: str, options: str | None) -> str | None:
    """The MathQA option that a line names: by its letter, else by the text or the exact value of just one option."""
    line = plain(text)
    if match := LETTER.match(line):
        return match["letter"]
    choices, said = read_options(options or ""), option_key(line)
    fits = [letter for letter, words, _ in choices if said and words == said]
    if not fits and (number := read_number(text)):
        fits = [letter for letter, _, value in choices if value == number.value]
    return fits[0] if len(fits) == 1 else None


def option_key(line: str) -> str:
    """An option's text without spaces and outer punctuation, to compare it."""
    return "".join(line.split()).strip(".,;:!?*_\"'$()[]{}")


@lru_cache(maxsize=1 << 16)
def read_options(options: str) -> list[tuple[str, str, Fraction | None]]:
    """(letter, text, value or None) of the five options of "a ) 38 , b ) 27 , ..." or "['a ) 38', 'b ) 27', ...]".

    A repeated letter ("d ) d ) 12") is dropped. An empty list if there are not five.
    """
    pieces = re.split(r"(?:^\W*|['\"]? ?, ?['\"]?)([a-e]) ?\)", options.lower())
    if pieces[1::2] != list("abcde"):
        return []
    choices = []
    for letter, piece in zip("abcde", pieces[2::2], strict=True):
        text = plain(piece.strip(" '\"]").removeprefix(f"{letter} ) "))
        number = read_number(text)
        choices.append((letter, option_key(text), number and number.value))
    return choices


# ---- the problems ----

# Task -> hub dataset, its configuration, the fields of a row.
MATHQA = ("regisss/math_qa", None, "Problem, Rationale, options, correct")
HUB = {
    "gsm8k": ("openai/gsm8k", "main", "question, answer"),
    "svamp": ("ChilleD/SVAMP", None, "Body, Question, Equation, Answer"),
    "mathqa": MATHQA,
    "mathqa-numeric": MATHQA,
}


def load_problems(
    task: str, split: str, path: str | None = None, limit: int | None = None, engine: str = "nl"
) -> list[Problem]:
    """The first `limit` problems of a split. Raises InputError.

    task: one of TASKS. split: "train", "validation" or "test"; a local file is one split and is read whole.
    path: a .json or .jsonl file, or a hub id; None is the usual hub dataset of the task. Rows have the fields of that
    dataset, or those of ReFT: question, answer_value, answer_cot (only training needs it).
    engine: "nl" for chains of thought in words, "python" for programs.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}: name one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: load at least one problem")
    if task == "toy":
        if path is not None:
            raise InputError(f"{path}: the problems of task toy are generated, they are not read from data")
        return toy_problems(split, limit, engine)
    source = path or HUB[task][0]
    is_file = path is not None and (path.endswith((".json", ".jsonl")) or Path(path).exists())
    problems, rows = [], 0
    for where, row in read_file(path) if is_file else read_hub(source, task, split):
        rows += 1
        if problem := to_problem(row, task, split, engine, where):
            problems.append(problem)
        if len(problems) == limit:
            break
    if not problems:
        raise InputError(f"{source}: none of its {rows} rows is a problem for task {task}")
    if len(problems) < rows:
        print(f"{source}: left out {rows - len(problems)} of {rows} rows, whose right option is not one number")
    return problems


def read_file(path: str) -> Iterator[tuple[str, object]]:
    """("file:line", row) of a file of JSON lines, ("file: row n", row) of one that is a JSON array."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    is_array = text.lstrip().startswith("[")
    for number, line in enumerate([text] if is_array else text.split("\n"), 1):  # splitlines() would split JSON texts
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = number + getattr(error, "lineno", 1) - 1
            raise InputError(f"{path}:{at}: not JSON: {error}; give one object a line, or one array") from error
        if is_array:
            yield from ((f"{path}: row {i}", item) for i, item in enumerate(row, 1))
        else:
            yield f"{path}:{number}", row


def read_hub(name: str, task: str, split: str) -> Iterator[tuple[str, object]]:
    """("hub id, split row n", row) of a dataset of the hub."""
    import datasets

    usual, config, _ = HUB[task]
    try:
        rows = datasets.load_dataset(name, config if name == usual else None, split=split)
    except Exception as error:  # no network, no such dataset, no such split, ...: the way out is the same
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name}, {split}: {reason}; name another dataset, or a local .json or .jsonl file") from error
    yield from ((f"{name}, {split} row {i}", row) for i, row in enumerate(rows, 1))


def to_problem(row: object, task: str, split: str, engine: str, where: str) -> Problem | None:
    """The problem of one row. None when mathqa-numeric leaves it out, because its right option is not one number."""

    def field(name: str) -> str:
        value = row.get(name) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            fields = f"{HUB[task][2]}, or ReFT's question, answer_cot, answer_value"
            raise InputError(f"{where}: field {name!r} is missing or no text; a row for {task} has {fields}")
        return str(value).strip()

    options, is_reft = None, isinstance(row, dict) and "answer_value" in row
    if is_reft:
        question, answer = field("question"), field("answer_value")
        cot = field("answer_cot") if row.get("answer_cot") is not None else ""
        last_line = question.rpartition("\n")[2]
        options = last_line if task == "mathqa" and read_options(last_line) else None
    elif task == "gsm8k":
        question, (cot, mark, answer) = field("question"), field("answer").rpartition("####")
        if not mark:
            raise InputError(f"{where}: 'answer' does not end in a line '#### <number>'")
        cot = re.sub(r"<<[^<>\n]*>>", "", cot).strip()
    elif task == "svamp":
        question = field("question_concat") if "question_concat" in row else f"{field('Body')} {field('Question')}"
        answer = field("Answer")
        cot = f"{field('Equation')} = {answer}"
    else:
        question, cot, options = field("Problem"), field("Rationale").strip('" '), field("options")
        answer = field("correct").lower()
        values = {letter: value for letter, _, value in read_options(options)}
        if answer not in values:
            raise InputError(f"{where}: 'correct' is {answer!r}; it must name one of five options a ) to e )")
        if task == "mathqa":
            question += f"\n{options}"
        elif values[answer] is None:
            return None
        else:
            options, answer = None, number_text(values[answer])

    if engine == "python" and not is_reft:
        if split == "train":
            raise InputError(f"{where}: no program in it; for engine python name data of ReFT, or use task toy")
        cot = ""
    if cot and engine != ("python" if "def solution(" in cot else "nl"):
        raise InputError(f"{where}: this chain of thought is not for engine {engine}; programs are for engine python")
    if not question:
        raise InputError(f"{where}: the question is empty")
    if score(f"#### {answer}", answer, task, options) != 1.0:
        kind = "a letter a-e" if task == "mathqa" else "one number"
        raise InputError(f"{where}: the answer {answer.strip()!r} is not {kind}")
    return Problem(question, cot, answer.lower().replace(",", "").strip(), options)


def to_row(problem: Problem, completion: str, task: str, engine: str, item_id: str) -> dict[str, str] | None:
    """A right completion as a row of ReFT's schema, from which `make_target` makes it again; None where it does not.

    That is so for a completion in words that has its answer neither in a box nor, plainly, after ANSWER_LINE.
    """
    cot, _, answer = completion.rpartition(ANSWER_LINE)
    if engine == "python" or "\\boxed{" in completion:
        cot, answer = completion, problem.answer
    row = {"item_id": item_id, "question": problem.question, "answer_cot": cot, "answer_value": answer}
    try:
        again = to_problem(row, task, "train", engine, item_id)
    except InputError:
        return None
    same = (again.question, again.options) == (problem.question, problem.options)
    return row if same and again.cot and make_target(again, engine) == completion else None


# ---- the toy task ----

TOY_SIZES = {"train": 48_000, "validation": 512, "test": 512}
TOY_PEOPLE = (("Ann", "She"), ("Ben", "He"), ("Eva", "She"), ("Leo", "He"), ("Mia", "She"), ("Tom", "He"))
TOY_THINGS = ("apples", "balls", "books", "cards", "coins", "pens", "shells", "stamps")
TOY_GAINS = ("buys", "finds", "gets", "wins")
TOY_LOSSES = ("drops", "gives", "loses", "sells")


def toy_problems(split: str, limit: int | None, engine: str) -> list[Problem]:
    """Gains and losses in words: 2-4 steps, every running total in 0..20, the same problems in every run.

    A hash of the numbers of a problem says which split it belongs to: no two splits share a sequence of numbers. Each
    question has one annotated chain of thought, and annotators differ: half of all chains write every step, half jump to
    the answer. Things have their annotators and annotators their habits: three of four, one way or the other.
    """
    size = TOY_SIZES[split] if limit is None else limit
    if size > TOY_SIZES[split]:
        raise InputError(f"limit {limit}: toy {split} has {TOY_SIZES[split]} problems")
    rng = random.Random(f"toy {split}")
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        totals = [rng.randint(0, 20)]
        for _ in range(rng.randint(2, 4)):
            totals.append(rng.choice([n for n in range(21) if 0 < abs(n - totals[-1]) < 10]))
        steps = [after - before for before, after in itertools.pairwise(totals)]
        name, pronoun = rng.choice(TOY_PEOPLE)
        *events, last = (f"{rng.choice(TOY_GAINS if step > 0 else TOY_LOSSES)} {abs(step)}" for step in steps)
        thing = rng.randrange(len(TOY_THINGS))
        question = f"{name} has {totals[0]} {TOY_THINGS[thing]}. {pronoun} {', '.join(events)} and {last}."
        cot = toy_cot(totals, rng.random() < (0.75 if thing % 2 else 0.25), engine)
        home = {0: "test", 1: "validation"}.get(zlib.crc32(bytes(totals)) % 10, "train")
        if home == split:
            problems.setdefault(question, Problem(f"{question} How many now?", cot, str(totals[-1])))
    return list(problems.values())


def toy_cot(totals: list[int], every_step: bool, engine: str) -> str:
    """What one annotator writes: every step, or only where they end; in words, or as a program of ReFT's form."""
    steps = list(itertools.pairwise(totals))
    if engine == "python":
        lines = [f"result = result {'+' if after > before else '-'} {abs(after - before)}" for before, after in steps]
        lines = [f"result = {totals[0]}", *lines] if every_step else [f"result = {totals[-1]}"]
        return "\n    ".join(["def solution():", *lines, "return result"])
    if every_step:
        return " ".join(f"{before}{after - before:+d}={after}." for before, after in steps)
    return f"That makes {totals[-1]}."


def benchmark(seconds: float = 1.0) -> None:
    """Print how many completions one core scores in a second, per task."""
    options = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
    prose = "She sells 16 - 3 - 4 = 9 duck eggs a day.\nSo she makes 9 * 2 = $18 every day at the market.\n"
    for task in TASKS:
        answers = ["a", "(b)", "c ) 30", "38"] if task == "mathqa" else ["18", "$1,080.", "0.25", "18 eggs"]
        batch = [(f"{prose}Therefore, the answer is: {answer}", answers[0]) for answer in answers]
        if task == "toy":
            batch = [(make_target(problem), problem.answer) for problem in load_problems("toy", "test")]
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            for completion, gold in batch:
                score(completion, gold, task, options)
            count += len(batch)
        print(f"{task:15} {count / elapsed:10,.0f} completions/s")


if __name__ == "__main__":
    import sandbox  # only here: as a module reward.py knows nobody

    benchmark()
    sandbox.benchmark()
