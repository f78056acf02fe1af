"""evaluate.py: the estimators, and the table of several runs."""

import itertools
import json

import pytest

import evaluate
from evaluate import majority_is_right, pass_at_k, powers_of_two, wilson


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if correct <= n and k <= n:
            subsets = list(itertools.combinations(range(n), k))
            expected = sum(any(i < correct for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, correct, k) == pytest.approx(expected)


def test_majority_vote():
    assert majority_is_right(["7", "8", "8"], [False, True, True])
    assert not majority_is_right(["7", "7", "8"], [False, False, True])
    assert majority_is_right(["8", "7"], [True, False])  # the first of equals
    assert majority_is_right([None, None, "8"], [False, False, True])  # no answer, no vote
    assert not majority_is_right([None, None], [False, False])


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)  # Agresti and Coull 1998
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_powers_of_two_end_at_the_number_of_samples():
    assert powers_of_two(0) == [] and powers_of_two(1) == [1]
    assert powers_of_two(6) == [1, 2, 4, 6] and powers_of_two(8) == [1, 2, 4, 8]


def test_several_runs_give_one_table_one_figure_and_a_file_each(toy_run, tmp_path, capsys):
    config = evaluate.Config(
        runs=(str(toy_run), str(toy_run)), out=str(tmp_path), samples=3, limit=20, max_new_tokens=12
    )
    first, second = evaluate.main(config)
    assert first == second  # the same checkpoint, the same seed
    assert set(first) >= {"task", "problems", "greedy_accuracy", "maj@1", "maj@2", "maj@3", "pass@1", "pass@3"}
    assert first["problems"] == 20
    assert json.loads((toy_run / "evaluation.json").read_text())["pass@3"] == first["pass@3"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [str(toy_run)] * 2
    assert "maj@3" in lines[0] and "pass@2" in lines[0]
    assert (tmp_path / "evaluation.png").stat().st_size > 0
