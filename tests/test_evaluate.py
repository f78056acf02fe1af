"""evaluate.py: the estimators, the files and the table of several runs, offline self-training."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import evaluate
import warmup
from evaluate import majority_is_right, pass_at_k, print_table, wilson
from model import load
from reward import ANSWER_LINE, InputError, load_problems, make_prompt, make_target
from rollout import Grades, grade

# ---- the estimators ------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if correct <= n and k <= n:
            subsets = list(itertools.combinations(range(n), k))
            hits = sum(any(i < correct for i in subset) for subset in subsets)
            assert pass_at_k(n, correct, k) == pytest.approx(hits / len(subsets))


@pytest.mark.parametrize(
    ("answers", "is_right"),
    [
        (["7", "8", "8"], True),
        (["7", "7", "8"], False),
        (["8", "7"], True),  # the first of equals wins
        (["7", "8", "8", "7"], False),
        ([None, None, "8"], True),  # no answer, no vote
        ([None, None], False),
    ],
)
def test_majority_vote(answers, is_right):
    assert majority_is_right(answers, [answer == "8" for answer in answers]) == is_right


def test_wilson_interval():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)  # Agresti and Coull 1998
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1


def test_maj_votes_in_blocks_of_k_pass_takes_all_samples_at_temperature_1_and_greedy_its_own(
    toy_run, tmp_path, monkeypatch
):
    answers = {
        1: list("789"),
        5: [*"98878", *"77899", *[None] * 5],
    }  # of three problems, 8 is right
    calls, real = [], evaluate.sample

    def spy(*args, temperature=1.0, num_samples=1, skip=None, **flags):
        calls.append((temperature, num_samples, skip))
        flags["eos_id"] = []  # all completions have 2 tokens
        return real(*args, temperature=temperature, num_samples=num_samples, **flags)

    def graded(rollout, problems, *_):
        given = answers[len(rollout.tokens) // len(problems)]
        outcomes = [{"8": "right", None: "cut"}.get(answer, "wrong") for answer in given]
        return Grades([f"say {answer}" for answer in given], given, outcomes)

    monkeypatch.setattr(evaluate, "sample", spy)
    monkeypatch.setattr(evaluate, "grade", graded)
    problems = load_problems("toy", "test", limit=3)
    config = warmup.Config(max_new_tokens=2)
    model = load(toy_run, None, None)
    result = evaluate.evaluate(model, problems, config, samples=5, out=tmp_path)
    assert calls == [(0, 1, None), (1.0, 5, None)]
    result.pop("greedy_interval")
    assert result == {
        "task": "toy",
        "problems": 3,
        "greedy_accuracy": 1 / 3,
        "greedy_length": 2,
        "greedy_outcomes": {"right": 1 / 3, "wrong": 2 / 3},
        "maj@1": pytest.approx(4 / 15),
        "pass@1": pytest.approx(4 / 15),
        "maj@2": pytest.approx(2 / 6),  # 98 87, 77 89, and nothing
        "pass@2": pytest.approx((9 / 10 + 4 / 10) / 3),
        "maj@4": pytest.approx(1 / 3),
        "pass@4": pytest.approx((1 + 8 / 10) / 3),
        "maj@5": pytest.approx(1 / 3),
        "pass@5": pytest.approx(2 / 3),
    }
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["pass@5"] == result["pass@5"]

    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [line["temperature"] for line in lines] == [0] * 3 + [1] * 15
    assert [line["answer"] for line in lines] == answers[1] + answers[5]
    assert lines[9] == {
        "question": problems[1].question,
        "gold": problems[1].answer,
        "temperature": 1,
        "completion": "say 7",
        "answer": "7",
        "outcome": "wrong",
    }
    assert lines[-1]["outcome"] == "cut"


# ---- the script ----------------------------------------------------------------------------------


def test_each_run_is_asked_its_own_task_and_all_give_one_table_and_a_file_each(
    toy_run, tmp_path, capsys
):
    tasks = ["toy", "toy-long"]
    runs = [str(shutil.copytree(toy_run, tmp_path / task)) for task in tasks]
    Path(runs[1], "run.json").write_text('{"task": "toy-long"}')
    config = evaluate.Config(runs=runs, samples=3, test_limit=8, max_new_tokens=12)
    results = evaluate.main(config)
    for run, task, result in zip(runs, tasks, results, strict=True):
        written = json.loads(Path(run, "evaluation.json").read_text())
        assert written["task"] == result["task"] == task
        assert written["pass@3"] == result["pass@3"]
    head, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == runs
    assert "maj@3" in head


def test_a_table_shows_intervals_shares_and_three_decimals(capsys):
    shares = {"right": 0.25, "cut": 0.75}
    print_table([{"greedy_accuracy": value} for value in ((0.25, 0.5), 0.5, "toy", 7, shares)])
    cells = ["greedy accuracy", "0.250-0.500", "0.500", "toy", "7", "right 0.250, cut 0.750"]
    assert capsys.readouterr().out.splitlines() == cells


def test_a_model_that_is_no_run_is_not_written_to_and_a_full_disk_loses_no_numbers(
    toy_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    plain = Path("plain")
    shutil.copytree(toy_run, plain)
    (plain / "run.json").unlink()
    before = sorted(plain.iterdir())
    config = evaluate.Config(runs=("./plain/",), test_limit=3, max_new_tokens=2, task="toy")
    (result,) = evaluate.main(config)
    assert sorted(plain.iterdir()) == before
    file = Path("runs/evaluation-plain/evaluation.json")
    assert json.loads(file.read_text())["problems"] == 3
    capsys.readouterr()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_json", full)
    monkeypatch.setattr(evaluate, "make_folder", Path)
    assert evaluate.main(config) == [result]
    out = capsys.readouterr().out
    warning = "warning: runs/evaluation-plain: the evaluation cannot be written (No space left"
    assert warning in out and "greedy accuracy" in out


@pytest.mark.parametrize("runs", [("a/b", "a-b"), ("a", "./a/")])
def test_two_runs_that_would_write_to_one_folder_are_refused(runs, tmp_path):
    with pytest.raises(InputError, match="the same folder"):
        evaluate.main(evaluate.Config(runs=runs, out=str(tmp_path), task="toy"))
    assert not list(tmp_path.iterdir())


def test_half_a_line_at_the_end_of_a_log_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "sec')
    assert evaluate.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_run_without_numbers_has_no_figure(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    evaluate.draw_curves(tmp_path, ("loss", "greedy_accuracy"))
    assert not (tmp_path / "curves.png").exists()


# ---- offline self-training -----------------------------------------------------------------------


def keep(run, file, **flags):
    """evaluate.py --keep-correct."""
    flags = {"limit": 7, "samples": 4, "max_new_tokens": 4, "max_rows": 13, **flags}
    config = evaluate.Config(runs=(str(run),), keep_correct=str(file), **flags)
    (counts,) = evaluate.main(config)
    return counts


@pytest.mark.parametrize("engine", ["nl", "python"])
def test_right_completions_are_kept_once_and_warm_up_trains_on_exactly_them(
    engine, toy_run, tmp_path, monkeypatch
):
    problems = load_problems("toy", "train", limit=7, engine=engine)

    def right(problem):
        """Two forms that warm-up would learn as they stand."""
        answer = problem.answer
        if engine == "nl":
            return [make_target(problem), f"So \\boxed{{{answer}}}.\n#### {answer}"]
        return [problem.cot, f"def solution():\n    return {answer} # no more"]

    def graded(rollout, batch, *_):
        texts = []
        for problem in batch:
            target, other = right(problem)
            no_target = f"#### {problem.answer}" if engine == "nl" else other
            no_row = f"{ANSWER_LINE}{problem.answer}"  # a file would lose its first line
            wrong = "\\boxed{99}"
            if engine == "python":
                no_row = f"def solution ():\n    return {problem.answer}"
                wrong = "def solution():\n    return 99"
            texts += [target, target, other, no_target, no_row, wrong]
        return Grades(texts, [], [*["right"] * 5, "wrong"] * len(batch))

    file = tmp_path / "new" / "kept.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "grade", graded)
        counts = keep(toy_run, file, engine=engine, samples=6)
    assert counts == {"sampled": 42, "right": 35, "kept": 14}
    assert [path.name for path in file.parent.iterdir()] == ["kept.jsonl"]
    kept = [(problem, text) for problem in problems for text in right(problem)]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {
            "item_id": f"toy_{n // 2}",
            "question": problem.question,
            "answer_cot": text,
            "answer_value": problem.answer,
        }
        for n, (problem, text) in enumerate(kept)
    ]

    model = load(toy_run, None, None)
    config = warmup.Config(model=str(toy_run), engine=engine)
    again = load_problems("gsm8k", "train", str(file), engine=engine)
    examples = warmup.encode_examples(again, model, config)
    for example, (problem, text) in zip(examples, kept, strict=True):
        prompt, target = model.encode([make_prompt(problem), text])
        assert example == (prompt, target + model.eos_ids)


def test_samples_that_are_kept_do_not_depend_on_max_rows(toy_run, tmp_path, monkeypatch):
    texts = []

    def graded(*args):
        grades = grade(*args)
        texts.extend(grades.texts)
        return grades

    monkeypatch.setattr(evaluate, "grade", graded)
    for max_rows in (3, 100):
        flags = {"limit": 5, "samples": 2, "max_new_tokens": 6, "dtype": "float64"}
        keep(toy_run, tmp_path / "kept", max_rows=max_rows, **flags)
    assert texts[:10] == texts[10:]
    assert len(set(texts)) > 5


@pytest.mark.parametrize(("flags", "count"), [({}, 10), ({"kept_samples": 2}, 2)])
def test_of_each_problem_so_many_samples_and_the_annotated_one_are_kept_in_a_file_replaced_whole(
    flags, count, toy_run, tmp_path, monkeypatch
):
    file = tmp_path / "kept"
    file.write_text("old")
    seen = []

    def graded(rollout, batch, *_):
        seen.append(file.read_text())
        if len(seen) == 2:
            raise OSError("the disk is full")
        texts = [f"{n} \\boxed{{{problem.answer}}}" for problem in batch for n in range(12)]
        return Grades(texts, [], ["right"] * len(texts))

    monkeypatch.setattr(evaluate, "grade", graded)
    with pytest.raises(OSError, match="disk"):
        keep(toy_run, file, samples=12, **flags)
    assert file.read_text() == "old"
    keep(toy_run, file, samples=12, **flags)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert Counter(row["item_id"] for row in rows) == {f"toy_{i}": count + 1 for i in range(7)}
    texts = [row["answer_cot"] for row in rows if row["item_id"] == "toy_0"]
    assert len(set(texts)) == count + 1
    assert texts[-1] == make_target(load_problems("toy", "train", limit=1)[0])
    assert len(seen) > 2 and set(seen) == {"old"}


@pytest.mark.parametrize(
    "flags",
    [
        {"samples": 0},
        {"runs": ("a", "b")},
        {"data": "./x.jsonl"},
        {"keep_correct": "."},
    ],
)
def test_keep_correct_takes_one_run_some_samples_and_another_file_than_data(flags):
    flags = {"runs": ("a",), "samples": 1, "keep_correct": "x.jsonl", "task": "gsm8k", **flags}
    with pytest.raises(InputError, match="--keep-correct"):
        evaluate.keep_correct(None, evaluate.Config(**flags))  # refused before the model is touched
