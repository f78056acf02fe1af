"""evaluate.py: the estimators, and the table of several runs."""

import itertools
import json
import shutil

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


# ---- groups of runs -------------------------------------------------------------------------------------------------


def write_run(folder, accuracies, **flags):
    """The files of a run that the comparison reads."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"correction": "truncated", "lr": 1.0, "out": str(folder)} | flags))
    records = [
        {"seconds": 10.0 * i, "kl_behav": 0.02, "ess_tokens": 0.8, "greedy_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path):
    runs = [
        write_run(tmp_path / "a0", [0.5, 0.95], seed=0, skip_ratio=0.0, model="w0"),
        write_run(tmp_path / "a1", [0.92, 0.97], seed=1, skip_ratio=0.0, model="w1"),
        write_run(tmp_path / "b0", [0.5, None], seed=0, skip_ratio=0.25, model="w0"),
    ]
    plain, nested = evaluate.group_runs(runs, [{"greedy_accuracy": x, "maj@8": x} for x in (0.9, 1.0, 0.7)])
    assert plain["setting"] == {"skip_ratio": 0.0} and nested["setting"] == {"skip_ratio": 0.25}
    assert plain["greedy_accuracy"] == [0.9, 1.0] and plain["seconds_to_target"] == [20.0, 10.0]
    assert nested["maj@8"] == [0.7] and nested["seconds_to_target"] == [None] and nested["kl_behav"] == [0.02]


def test_what_the_model_was_warmed_up_with_tells_groups_apart(tmp_path):
    warm = [write_run(tmp_path / f"w{i}", [0.5], layer_dropout=dropout) for i, dropout in enumerate((0.5, 0.0))]
    runs = [write_run(tmp_path / f"r{i}", [0.9], model=model) for i, model in enumerate(warm)]
    groups = evaluate.group_runs(runs, [{"greedy_accuracy": 0.9}] * 2)
    assert [group["setting"] for group in groups] == [{"warm-up layer_dropout": 0.0}, {"warm-up layer_dropout": 0.5}]


def test_mean_and_sd_says_how_many_runs_reached_it():
    assert evaluate.mean_and_sd([0.9, 1.0]) == "0.950 ± 0.071"
    assert evaluate.mean_and_sd([0.9]) == "0.900"
    assert evaluate.mean_and_sd([None, 10.0, 20.0], 1) == "15.0 ± 7.1 (2 of 3)"
    assert evaluate.mean_and_sd([None]) == "-"


def test_several_groups_give_a_table_a_figure_and_a_file(tmp_path, toy_run, capsys):
    for name, flags in {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"skip_ratio": 0.25}}.items():
        shutil.copytree(toy_run, tmp_path / name)
        kept = json.loads((toy_run / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps(kept | {"skip_ratio": 0.0} | flags))
        records = [{"seconds": 1.0, "greedy_accuracy": 0.2}, {"seconds": 2.0, "greedy_accuracy": 0.95}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = tuple(str(tmp_path / name) for name in "abc")
    evaluate.main(evaluate.Config(runs=runs, out=str(tmp_path), limit=10, max_new_tokens=8))
    out = capsys.readouterr().out
    assert "skip ratio" in out and "seconds to 0.9" in out and "2.0 ± 0.0" in out
    study = json.loads((tmp_path / "study.json").read_text())
    assert [len(group["runs"]) for group in study] == [2, 1]
    assert (tmp_path / "study.png").stat().st_size > 0
