"""evaluate.py: the estimators, tables and groups of several runs, offline self-training."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

import evaluate
import warmup
from evaluate import compare_groups, majority_is_right, pass_at_k, print_table, wilson
from model import load
from reward import InputError, load_problems, make_prompt, make_target
from rollout import Grades, grade


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


@pytest.mark.parametrize(("samples", "ks"), [(0, []), (1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_k_doubles_up_to_the_number_of_samples(toy_run, samples, ks):
    problems, config = load_problems("toy", "test", limit=2), warmup.Config(max_new_tokens=2)
    result = evaluate.evaluate(load(toy_run, None, None), problems, config, samples)
    assert [name for name in result if "@" in name] == [f"{kind}@{k}" for k in ks for kind in ("maj", "pass")]


def test_several_runs_give_one_table_one_figure_and_a_file_each(toy_run, tmp_path, capsys):
    config = evaluate.Config(
        runs=(str(toy_run), str(toy_run)), out=str(tmp_path), samples=3, test_limit=20, max_new_tokens=12
    )
    first, second = evaluate.main(config)
    assert first == second  # the same checkpoint, the same seed
    assert set(first) >= {"task", "problems", "greedy_accuracy", "maj@1", "maj@2", "maj@3", "pass@1", "pass@3"}
    assert first["problems"] == 20
    assert json.loads((toy_run / "evaluation.json").read_text())["pass@3"] == first["pass@3"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [str(toy_run)] * 2
    assert "maj@3" in lines[0] and "pass@2" in lines[0]


def test_maj_at_k_is_the_mean_over_blocks_of_k_samples_and_maj_at_1_is_pass_at_1(toy_run, tmp_path, monkeypatch):
    """Two problems of gold 8, and one that is cut; every completion is there to be read."""
    says = {1: ["8", "9", "7"], 5: [*"88978", *"77899", *[None] * 5]}  # samples of a problem -> answers

    def graded(rollout, problems, model, config):
        answers = says[len(rollout.tokens) // 3]
        outcomes = [{"8": "right", None: "cut"}.get(answer, "wrong") for answer in answers]
        return Grades([f"say {answer}" for answer in answers], answers, outcomes, None)

    monkeypatch.setattr(evaluate, "grade", graded)
    problems, config = load_problems("toy", "test", limit=3), warmup.Config(max_new_tokens=2)
    result = evaluate.evaluate(load(toy_run, None, None), problems, config, samples=5, out=tmp_path)
    assert result["greedy_outcomes"] == pytest.approx({"right": 1 / 3, "wrong": 2 / 3})
    assert result["maj@1"] == result["pass@1"] == pytest.approx(4 / 15)  # 3 + 1 + 0 of 15
    assert result["maj@2"] == pytest.approx((1 + 0 + 0 + 1 + 0 + 0) / 6)  # 88 97, 77 89, nothing
    assert result["maj@4"] == result["maj@5"] == pytest.approx(1 / 3)
    assert json.loads((tmp_path / "evaluation.json").read_text())["maj@2"] == result["maj@2"]
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    asked = [(i, 0, says[1][i]) for i in range(3)] + [(n // 5, 1, answer) for n, answer in enumerate(says[5])]
    for line, (i, temperature, answer) in zip(lines, asked, strict=True):
        assert line["question"] == problems[i].question and line["gold"] == problems[i].answer
        assert (line["temperature"], line["answer"], line["completion"]) == (temperature, answer, f"say {answer}")
    assert [line["outcome"] for line in lines[:3]] == ["right", "wrong", "wrong"] and lines[-1]["outcome"] == "cut"


def test_a_model_that_is_no_run_is_not_written_to_and_a_full_disk_loses_no_numbers(
    toy_run, tmp_path, monkeypatch, capsys
):
    shutil.copytree(toy_run, tmp_path / "plain")
    (tmp_path / "plain" / "run.json").unlink()
    before = sorted((tmp_path / "plain").iterdir())
    monkeypatch.chdir(tmp_path)
    flags = {"runs": ("./plain/",), "test_limit": 3, "max_new_tokens": 2, "task": "toy"}
    (result,) = evaluate.main(evaluate.Config(**flags))
    assert sorted((tmp_path / "plain").iterdir()) == before
    assert json.loads(Path("runs/evaluation-plain/evaluation.json").read_text())["problems"] == result["problems"] == 3
    capsys.readouterr()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_json", full)
    monkeypatch.setattr(evaluate, "make_folder", Path)
    assert evaluate.main(evaluate.Config(**flags)) == [result]
    out = capsys.readouterr().out
    assert "warning: runs/evaluation-plain: the evaluation cannot be written (No space left" in out
    assert "greedy accuracy" in out


def test_half_a_line_at_the_end_of_a_log_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "sec')
    assert evaluate.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


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


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path, capsys):
    w0, w1 = (write_run(tmp_path / f"w{seed}", [0.5], seed=seed, model=None) for seed in (0, 1))
    runs = [
        write_run(tmp_path / "a0", [0.5, 0.95], seed=0, skip_ratio=0.0, model=w0),
        write_run(tmp_path / "b0", [0.5, None], seed=0, skip_ratio=0.25, model=w0),
        write_run(tmp_path / "a1", [0.92, 0.97, 0.98], seed=1, skip_ratio=0.0, model=w1),
    ]
    compare_groups(tmp_path, runs, [{"greedy_accuracy": x, "maj@8": x, "problems": 9} for x in (0.9, 0.7, 1.0)])
    plain, nested = json.loads((tmp_path / "study.json").read_text())
    assert plain == {
        "skip_ratio": "0.0",
        "greedy_accuracy": [0.9, 1.0],
        "maj@8": [0.9, 1.0],
        "seconds": [20.0, 30.0],
        "kl_behav": [pytest.approx(0.02)] * 2,
    }
    assert nested["skip_ratio"] == "0.25" and nested["maj@8"] == [0.7] and nested["seconds"] == [20.0]
    assert "0.950 ± 0.071 (2)" in capsys.readouterr().out
    assert (tmp_path / "study.png").stat().st_size > 0


def test_runs_of_different_models_are_never_averaged(tmp_path):
    """Trained from a hub id, or from warm-ups that started from different ones."""
    ratios = (0.0, 0.1)
    runs = [
        write_run(tmp_path / f"{hub}-{r}", [0.9], model=hub, skip_ratio=r) for hub in ("1.5B", "7B") for r in ratios
    ]
    warm = [write_run(tmp_path / f"w-{hub}", [0.5], model=hub) for hub in ("1.5B", "7B")]
    runs += [write_run(tmp_path / f"{Path(w).name}-rl-{s}", [0.9], model=w, seed=s) for w in warm for s in (0, 1)]
    compare_groups(tmp_path, runs, [{"greedy_accuracy": x / 10} for x in range(8)])
    found = sorted(row["greedy_accuracy"] for row in json.loads((tmp_path / "study.json").read_text()))
    assert found == [[0.0], [0.1], [0.2], [0.3], [0.4, 0.5], [0.6, 0.7]]


def test_what_the_model_was_warmed_up_with_tells_groups_apart(tmp_path):
    warm = [write_run(tmp_path / f"w{i}", [0.5], layer_dropout=dropout) for i, dropout in enumerate((0.5, 0.0, 0.0))]
    runs = [write_run(tmp_path / f"r{i}", [0.9], model=model) for i, model in enumerate(warm)]
    compare_groups(tmp_path, runs, [{"greedy_accuracy": x} for x in (0.7, 0.8, 0.9)])
    rows = json.loads((tmp_path / "study.json").read_text())
    assert [(row["warm-up layer_dropout"], row["greedy_accuracy"]) for row in rows] == [
        ("0.0", [0.8, 0.9]),
        ("0.5", [0.7]),
    ]


def test_groups_do_not_depend_on_the_folder_that_evaluate_is_started_from(tmp_path, monkeypatch):
    for name, dropout in (("w0", 0.5), ("w1", 0.0), ("w2", 0.0)):
        write_run(tmp_path / "runs" / name, [0.5], layer_dropout=dropout)
    for i, (warm_up, free) in enumerate((("w0", False), ("w1", False), ("w2", True))):
        flags = {"model": f"runs/{warm_up}", "gradient_checkpointing": free, "unsafe_exec": free, "eval_every": i}
        write_run(tmp_path / "runs" / "study" / str(i), [0.9], **flags)
    for folder in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "study"):
        monkeypatch.chdir(folder)
        runs = sorted(map(str, (tmp_path / "runs" / "study").iterdir()))
        runs = tuple(str(Path(run).relative_to(folder)) for run in runs)
        compare_groups(tmp_path, runs, [{"greedy_accuracy": x} for x in (0.7, 0.8, 0.9)])
        rows = json.loads((tmp_path / "study.json").read_text())
        assert sorted(row["greedy_accuracy"] for row in rows) == [[0.7], [0.8, 0.9]]
        (tmp_path / "study.json").unlink()


@pytest.mark.parametrize("ratios", [(0.25, 0.25, 0.25), (0.0, 0.125, 0.25)])
def test_one_group_or_one_run_a_group_is_no_study(tmp_path, ratios):
    runs = [write_run(tmp_path / f"r{i}", [0.9], skip_ratio=ratio, seed=i) for i, ratio in enumerate(ratios)]
    compare_groups(tmp_path, runs, [{"greedy_accuracy": 0.9}] * 3)
    assert not (tmp_path / "study.json").exists() and not (tmp_path / "study.png").exists()


def test_a_cell_says_how_many_runs_it_is_the_mean_of(capsys):
    lists = [[0.9, 1.0], [0.9], [None, 10.0, 20.0], [None]]
    print_table([{"greedy_accuracy": x} for x in [*lists, (0.25, 0.5), 0.5, "toy", 7]])
    means = ["0.950 ± 0.071 (2)", "0.900 (1)", "15.000 ± 7.071 (2)", "-"]
    assert capsys.readouterr().out.splitlines() == ["greedy accuracy", *means, "0.250-0.500", "0.500", "toy", "7"]


def test_several_groups_give_a_table_a_figure_and_a_file(tmp_path, toy_run, capsys):
    for name, flags in {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"skip_ratio": 0.25}}.items():
        shutil.copytree(toy_run, tmp_path / name)
        kept = json.loads((toy_run / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps(kept | {"skip_ratio": 0.0} | flags))
        records = [{"seconds": 1.0, "greedy_accuracy": 0.2}, {"seconds": 2.0, "greedy_accuracy": 0.95}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = tuple(str(tmp_path / name) for name in "abc")
    evaluate.main(evaluate.Config(runs=runs, out=str(tmp_path), test_limit=10, max_new_tokens=8))
    out = capsys.readouterr().out
    assert "skip ratio" in out and "2.000 ± 0.000 (2)" in out
    study = json.loads((tmp_path / "study.json").read_text())
    assert [len(group["greedy_accuracy"]) for group in study] == [2, 1]
    assert (tmp_path / "study.png").stat().st_size > 0


# ---- offline self-training ------------------------------------------------------------------------------------------


def keep(run, file, **flags):
    """evaluate.py --keep-correct."""
    flags = {"limit": 7, "samples": 4, "max_new_tokens": 4, "max_rows": 13} | flags
    return evaluate.main(evaluate.Config(runs=(str(run),), out=str(file.parent), keep_correct=str(file), **flags))


@pytest.mark.parametrize("engine", ["nl", "python"])
def test_right_completions_are_kept_once_and_warm_up_trains_on_exactly_them(engine, toy_run, tmp_path, monkeypatch):
    problems = load_problems("toy", "train", limit=7, engine=engine)
    other = {"nl": "So \\boxed{{{}}}.\n#### {}", "python": "def solution():\n    return {} # {}"}[engine]  # right too
    asked, said = [], []

    def graded(rollout, batch, model, config):
        """Of the 5 samples of each problem: right, the same again, in another form, in one not to be learned, wrong."""
        assert len(rollout.tokens) == 5 * len(batch)
        targets = [(make_target(p, engine), other.format(p.answer, p.answer), f"#### {p.answer}") for p in batch]
        texts = [
            x for target, box, mark in targets for x in (target, target, box, mark if engine == "nl" else box, "9")
        ]
        asked.extend(batch)
        return Grades(texts, [], [*["right"] * 4, "wrong"] * len(batch), None)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "grade", graded)
        file = tmp_path / "new" / "kept.jsonl"
        assert keep(toy_run, file, engine=engine, samples=5) == [{"sampled": 35, "right": 28, "kept": 14}]
    assert asked == problems  # of the training split, each once
    assert [path.name for path in file.parent.iterdir()] == ["kept.jsonl"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [text for p in problems for text in (make_target(p, engine), other.format(p.answer, p.answer))]
    numbered = [(i, problem, text) for i, text in enumerate(texts) for problem in [problems[i // 2]]]
    assert rows == [
        {"item_id": f"toy_{i // 2}", "question": p.question, "answer_cot": text, "answer_value": p.answer}
        for i, p, text in numbered
    ]  # ReFT's schema

    real = warmup.encode_examples
    monkeypatch.setattr(warmup, "encode_examples", lambda *args: said.append(real(*args)) or said[-1])
    data = {"task": "gsm8k", "data": str(file), "test_data": str(file), "max_new_tokens": 4, "engine": engine}
    warmup.main(warmup.Config(model=str(toy_run), out=str(tmp_path / "warmup"), steps=1, batch=2, **data))
    model = load(toy_run, None, None)
    encoded = [model.tokenizer(make_prompt(p)).input_ids + model.tokenizer(text).input_ids for _, p, text in numbered]
    assert [prompt + target for prompt, target in said[0]] == [ids + model.eos_ids for ids in encoded]


def test_samples_that_are_kept_do_not_depend_on_max_rows(toy_run, tmp_path, monkeypatch):
    texts = {}
    for max_rows in (3, 100):
        rows = texts.setdefault(max_rows, [])
        monkeypatch.setattr(evaluate, "grade", lambda *args, rows=rows: rows.extend((g := grade(*args)).texts) or g)
        keep(toy_run, tmp_path / "x", limit=5, samples=2, max_new_tokens=6, dtype="float64", max_rows=max_rows)
    assert texts[3] == texts[100] and len(set(texts[3])) > 5


def test_the_file_of_kept_completions_is_replaced_only_when_the_new_one_is_whole(toy_run, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("old")
    calls = []

    def fail(rollout, batch, *rest):
        calls.append((tmp_path / "kept").read_text())
        if len(calls) == 2:
            raise OSError("the disk is full")
        return Grades([make_target(p) for p in batch for _ in range(4)], [], ["right"] * 4 * len(batch), None)

    monkeypatch.setattr(evaluate, "grade", fail)
    with pytest.raises(OSError, match="disk"):
        keep(toy_run, tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "old" and calls == ["old"] * 2
    keep(toy_run, tmp_path / "kept")
    assert len((tmp_path / "kept").read_text().splitlines()) == 7 and set(calls) == {"old"}


@pytest.mark.parametrize(
    "flags", [{"samples": 0}, {"runs": ("a", "b")}, {"data": "x.jsonl"}, {"data": "./x.jsonl"}], ids=str
)
def test_keep_correct_takes_one_run_some_samples_and_another_file_than_data(flags):
    with pytest.raises(InputError, match="--keep-correct"):
        flags = {"runs": ("a",), "samples": 1, "keep_correct": "x.jsonl", "task": "gsm8k"} | flags
        evaluate.keep_correct(None, evaluate.Config(**flags))  # refused before the model is touched


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_maj_votes_in_blocks_of_k_pass_takes_all_samples_at_temperature_1_and_greedy_its_own(toy_run, monkeypatch):
    """Two problems, four samples; the answers are written here, in place of what the model says."""
    answers, calls = ["7", "8", "8", "8", "8", "9", "8", "7"], []  # 8 is right
    real = evaluate.sample

    def sampling(*args, **flags):
        calls.append((flags.get("temperature", 1.0), flags.get("num_samples", 1), flags.get("skip")))
        return real(*args, **flags)

    def graded(rollout, *args):
        given = ["7", "8"] if len(rollout.tokens) == 2 else answers
        return Grades(given, given, ["right" if answer == "8" else "wrong" for answer in given], None)

    monkeypatch.setattr(evaluate, "sample", sampling)
    monkeypatch.setattr(evaluate, "grade", graded)
    problems, config = load_problems("toy", "test", limit=2), warmup.Config(max_new_tokens=3)
    model = load(toy_run, None, None)
    model.eos_ids = []  # every completion has 3 tokens
    monkeypatch.setattr(type(config), "sampling", lambda *_: {"eos_id": [], "pad_id": 0, "max_new_tokens": 3})
    result = evaluate.evaluate(model, problems, config, samples=4)
    assert calls == [(0, 1, None), (1.0, 4, None)]
    assert result["greedy_accuracy"] == 0.5 and result["greedy_length"] == 3.0 and result["problems"] == 2
    assert [result[f"maj@{k}"] for k in (1, 2, 4)] == [0.625, 0.75, 1.0]
    assert [result[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([(3 / 4 + 2 / 4) / 2, (1 + 5 / 6) / 2, 1.0])
