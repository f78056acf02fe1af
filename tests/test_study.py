"""study.py: which runs are averaged, and what a reader sees of them."""

import json

import study


def write_run(folder, accuracy=0.5, **flags):
    """The files of a run that the comparison reads."""
    folder.mkdir(parents=True)
    records = [
        {"seconds": 10.0, "kl_behav": 0.01, "greedy_accuracy": 0.5},
        {"seconds": 20.0, "kl_behav": 0.03},
        {"seconds": 30.0, "kl_behav": None, "greedy_accuracy": accuracy},
    ]
    result = {"greedy_accuracy": accuracy, "maj@8": accuracy, "problems": 9}
    (folder / "run.json").write_text(json.dumps({"lr": 1.0, "out": str(folder), **flags}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "evaluation.json").write_text(json.dumps(result))
    return str(folder)


def compare(runs, out):
    """The rows of study.json."""
    study.main(runs, str(out))
    return json.loads((out / "study.json").read_text())


def test_runs_that_differ_in_nothing_but_their_seed_are_one_group(tmp_path, capsys):
    runs = []
    for name, accuracy, seed, ratio in (
        ("a", 0.9, 0, 0.0),
        ("b", 0.7, 0, 0.25),
        ("c", 1.0, 1, 0.0),
    ):
        warm_up = write_run(tmp_path / f"warm-up-{name}", seed=seed)
        flags = {"seed": seed, "skip_ratio": ratio, "model": warm_up}
        runs.append(write_run(tmp_path / name, accuracy, **flags))
    plain, nested = compare(runs, tmp_path)
    assert plain == {
        "skip_ratio": "0.0",
        "greedy_accuracy": [0.9, 1.0],
        "maj@8": [0.9, 1.0],
        "seconds": [30.0, 30.0],
        "kl_behav": [0.02, 0.02],
    }
    assert nested["skip_ratio"] == "0.25"
    header, plain, nested, _ = capsys.readouterr().out.splitlines()
    assert header.startswith("skip ratio")
    assert "0.950 ± 0.071 (2)" in plain
    assert "0.700 (1)" in nested
    assert (tmp_path / "study.png").stat().st_size > 0


def test_flags_of_the_warm_up_tell_groups_apart_wherever_the_study_is_started(
    tmp_path, monkeypatch
):
    folder = tmp_path / "runs"
    for number, dropout in enumerate((0.5, 0.0, 0.0)):
        write_run(folder / f"w{number}", layer_dropout=dropout)
        flags = {"model": f"runs/w{number}", "eval_every": number}
        write_run(folder / "study" / str(number), **flags)
    for start in (tmp_path, folder, folder / "study"):
        monkeypatch.chdir(start)
        runs = [str(folder / "study" / str(n)) for n in range(3)]
        runs = [run.removeprefix(f"{start}/") for run in runs]
        rows = compare(runs, tmp_path)
        found = [(row["warm-up layer_dropout"], len(row["maj@8"])) for row in rows]
        assert found == [("0.0", 2), ("0.5", 1)]


def test_runs_of_different_models_are_never_averaged(tmp_path):
    sources = ["1.5B", "7B"]  # of the hub
    sources += [write_run(tmp_path / f"w{source}", model=source) for source in sources]
    runs = [write_run(tmp_path / f"r{n}", model=source) for n, source in enumerate(sources)]
    assert len(compare(runs, tmp_path)) == 4


def test_a_cell_leaves_out_what_a_run_does_not_have():
    assert study.mean_cell([None, 10.0, 20.0]) == "15.000 ± 7.071 (2)"
    assert study.mean_cell([None]) == "-"
