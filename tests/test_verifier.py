"""ReFT's reward model: its data, its loss, its run, and what it does to samples."""

import json
import math
from types import SimpleNamespace

import pytest
import short_runs
import torch
import torch.nn.functional as F
from short_runs import stop_in_step
from soak import state
from test_distributed import assert_equal, launch
from torch import nn

import evaluate
import verifier
from model import load
from reward import InputError
from rollout import Grades

TINY = {"test_limit": 4, "steps": 4, "batch": 4, "lr": 1e-2}


def labelled_rows():
    """30 labelled completions: three of each question, the first one right."""
    for n in range(30):
        yield {
            "question": f"Ann has {n // 3} pens. How many?",
            "answer_cot": f"{n}+{n}={2 * n}",
            "answer_value": "1",
            "label": int(n % 3 == 0),
        }


@pytest.fixture
def labelled(tmp_path):
    """A file of 30 such rows."""
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows()))
    return file


def train(model, file, out, **flags):
    """A few steps of verifier.py."""
    config = verifier.Config(model=str(model), data=str(file), out=str(out), **{**TINY, **flags})
    return verifier.main(config)


@pytest.fixture
def judge(small_run):
    """A random model whose value head is not zero."""
    model = load(small_run, None, "float64")
    nn.init.normal_(model.value_head.weight)
    return model


# ---- reranking -----------------------------------------------------------------------------------


def test_rerank_takes_the_best_of_each_block_and_the_first_of_equals():
    outcomes = ["wrong", "right", "right", "no_answer", "wrong", "right", "no_answer", "no_answer"]
    answers = ["1", "2", "2", None, "1", "2", None, None]
    scores = [0.5, 0.4, 0.6, -math.inf, 0.7, 0.7, -math.inf, -math.inf]
    result = evaluate.sampled_accuracy(Grades([""] * 8, answers, outcomes), 4, scores)
    assert result["rerank@1"] == 3 / 8
    assert result["rerank@2"] == 1 / 4  # of the third block the first, which is wrong
    assert result["rerank@4"] == 1 / 2
    assert "rerank@1" not in evaluate.sampled_accuracy(Grades([""] * 8, answers, outcomes), 4)


@torch.no_grad()
@pytest.mark.parametrize("bound", ["tokens", "context"])
def test_the_score_is_the_value_of_the_last_token_that_is_read(judge, monkeypatch, bound):
    if bound == "tokens":
        monkeypatch.setattr(evaluate, "READ_TOKENS", 5)
    else:
        judge.config.max_positions = 5
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    expected = [judge.values(judge(torch.tensor([row[:5]])))[0, -1].item() for row in rows]
    assert evaluate.verifier_scores(judge, rows) == expected
    assert expected[0] != expected[1]


def test_equal_texts_are_read_once_and_those_without_an_answer_never_win(judge, monkeypatch):
    read = []
    real = evaluate.verifier_scores

    def spy(verifier, rows):
        read.extend(rows)
        return real(verifier, rows)

    monkeypatch.setattr(evaluate, "verifier_scores", spy)
    texts = ["1+1=2", "1+1=2", "none", "1+1=2", "3+3=6", "none"]
    grades = Grades(texts, ["2", "2", None, "2", "6", None], ["right"] * 6)
    monkeypatch.setattr(evaluate, "encode_prompts", lambda *_: [[5, 6], [7]])
    scores = evaluate.rerank_scores(judge, None, None, grades)
    assert len(read) == 4 + 1  # the same text to another question is another row
    assert scores[0] == scores[1] and scores[0] != scores[3]
    assert scores[2] == scores[5] == -math.inf
    row = [7, *judge.encode(["3+3=6"])[0]]
    assert scores[4] == real(judge, [row])[0]


def test_evaluate_prints_rerank_beside_the_others_from_prompts_of_the_verifier(
    small_run, labelled, tmp_path, capsys, monkeypatch
):
    train(small_run, labelled, tmp_path / "verifier", prompt_style="reft")
    real, styles = evaluate.encode_prompts, []

    def spy(problems, model, config):
        styles.append((config.prompt_style, bool(model.value_head.weight.any())))
        return real(problems, model, config)

    monkeypatch.setattr(evaluate, "encode_prompts", spy)
    flags = {"runs": (str(small_run),), "samples": 2, "test_limit": 3, "out": str(tmp_path)}
    config = evaluate.Config(**flags, rerank=str(tmp_path / "verifier"))
    (result,) = evaluate.main(config)
    assert {"maj@2", "pass@2", "rerank@2"} <= {*result}
    assert "rerank@2" in capsys.readouterr().out
    assert styles == [("auto", False), ("reft", True)]
    with pytest.raises(InputError, match="no run of verifier"):
        evaluate.main(evaluate.Config(**flags, rerank=str(small_run)))


# ---- labelled completions ------------------------------------------------------------------------


def test_labels_writes_every_different_completion_and_the_verifier_reads_them(toy_run, tmp_path):
    file = tmp_path / "labelled.jsonl"
    flags = {"runs": (str(toy_run),), "limit": 4, "samples": 3, "max_new_tokens": 12}
    config = evaluate.Config(keep_correct=str(file), labels=True, **flags)
    evaluate.main(config)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    pairs = {(row["question"], row["answer_cot"]) for row in rows}
    assert len(pairs) == len(rows) > 4
    assert {row["label"] for row in rows} == {0}  # barely trained, and not one annotated
    assert evaluate.kept_texts(None, {"a": "wrong", "b": "right"}, config) == ["a", "b"]


def test_the_last_tenth_of_the_questions_is_held_out_and_rows_are_cut(small_run, labelled):
    model = load(small_run, None, None)
    config = verifier.Config(model=str(small_run), data=str(labelled), out="x")
    examples, held_out = verifier.labelled_examples(config, model)
    assert [label for _, label in examples] == [True, False, False] * 9
    assert [label for _, label in held_out] == [True, False, False]
    text = model.tokenizer.decode(held_out[0][0])
    assert "Ann has 9 pens" in text and text.endswith("27+27=54")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "READ_TOKENS", 3)
        short, _ = verifier.labelled_examples(config, model)
    assert [ids for ids, _ in short] == [ids[:3] for ids, _ in examples]
    model.config.max_positions = 4
    short, _ = verifier.labelled_examples(config, model)
    assert [ids for ids, _ in short] == [ids[:4] for ids, _ in examples]


BAD_ROWS = {"label": "right completions and wrong ones", "lable": "KeyError: 'label'"}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_files_that_teach_nothing_are_refused_before_a_folder_is_made(
    small_run, labelled, tmp_path, name
):
    rows = [{"question": f"{n}?", "answer_cot": "1", name: 0} for n in range(30)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=BAD_ROWS[name]):
        train(small_run, labelled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flags_that_need_each_other_are_named(small_run):
    with pytest.raises(InputError, match="--data is missing"):
        verifier.Config(model=str(small_run))
    with pytest.raises(InputError, match="--rerank VERIFIER takes --samples"):
        evaluate.Config(runs=("a",), task="toy", rerank="b")
    with pytest.raises(InputError, match="--labels are for --keep-correct"):
        evaluate.Config(runs=("a",), task="toy", labels=True)


# ---- training ------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_binary_cross_entropy_whatever_the_micro_batch(judge):
    examples = [([5, 6, 7], 1), ([8, 9], 0), ([10, 11, 12, 13, 14], 1)]
    logits = torch.stack([judge.values(judge(torch.tensor([ids])))[0, -1] for ids, _ in examples])
    targets = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    expected = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in judge.named_parameters() if p.grad is not None}
    assert "layers.1.mlp.up.weight" in gradients  # the whole model learns
    for size in (1, 2, 16):
        judge.zero_grad()
        config = SimpleNamespace(micro_batch=size)
        run = SimpleNamespace(model=judge, device="cpu", config=config, update=lambda *args: 0)
        loss, _ = verifier.verifier_step(run, examples, 0.1)
        assert loss == pytest.approx(expected.item(), abs=1e-12)
        for name, parameter in judge.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-12)


def test_a_critic_of_the_model_is_forgotten(small_run, labelled, tmp_path):
    model = load(small_run, None, None)
    nn.init.ones_(model.value_head.weight)
    model.save_pretrained(tmp_path / "critic")
    train(tmp_path / "critic", labelled, tmp_path / "out", task="toy", steps=1, lr=0.0)
    head = load(tmp_path / "out", None, None).value_head
    assert not head.weight.any() and not head.bias.any()


def test_it_learns_which_of_two_completions_is_right(toy_run, tmp_path):
    rows = [
        {"question": f"{n} pens", "answer_cot": text, "label": label}
        for n in range(40)
        for text, label in (("yes", 1), ("no", 0), ("no no", 0))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(toy_run, file, tmp_path / "out", steps=30, batch=12, lr=3e-3)
    assert result == {"accuracy": 1.0, "guessing": pytest.approx(2 / 3)}
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result


def test_a_resumed_verifier_equals_one_run_and_is_no_warm_up(
    small_run, labelled, tmp_path, monkeypatch
):
    train(small_run, labelled, tmp_path / "one", eval_every=2)
    monkeypatch.setattr(short_runs, "train", lambda stage, *args, **flags: train(*args, **flags))
    stop_in_step(2, "verifier", small_run, labelled, tmp_path / "two", eval_every=2)
    train(small_run, labelled, tmp_path / "two", resume=True, eval_every=2)
    assert state(tmp_path / "two") == state(tmp_path / "one")
    with pytest.raises(InputError, match=r"written by verifier\.py; warmup\.py cannot resume it"):
        short_runs.warm(tmp_path / "two", resume=True)
    labelled.write_text(labelled.read_text().replace("pens", "nuts"))
    with pytest.raises(InputError, match="of a run with other the training problems"):
        train(small_run, labelled, tmp_path / "two", resume=True)


def test_two_processes_train_what_one_does(small_run, labelled, tmp_path):
    flags = {"dtype": "float64", "micro_batch": 1, "batch": 5}
    train(small_run, labelled, tmp_path / "one", **flags)
    assert launch(2, lambda: train(small_run, labelled, tmp_path / "two", **flags)) == [0, 0]
    assert_equal(tmp_path / "two", tmp_path / "one")
    one, two = ((tmp_path / name / "evaluation.json").read_text() for name in ("one", "two"))
    assert one == two
