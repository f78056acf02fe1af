"""warmup.py: eq. (1), the data order, and the whole job in a shortened form."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

import rl
import warmup
from evaluate import read_metrics
from model import load
from reward import InputError, Problem, load_problems, score
from rollout import token_logp
from warmup import Run, batch_indices, collate, encode_examples, micro_batches

SHORT = {"steps": 3, "limit": 60, "test_limit": 8, "batch": 8, "max_new_tokens": 2, "dtype": "float64"}


def weights(run, dtype="float64"):
    return list(load(run, None, dtype).parameters())


def train(out, **flags):
    warmup.main(warmup.Config(out=str(out), **(SHORT | flags)))
    return out


def test_the_loss_counts_the_completion_with_eos_and_nothing_else(toy_run, tmp_path):
    model = load(toy_run, None, "float64")
    problems = load_problems("toy", "train", limit=3)
    examples = encode_examples(problems, model, warmup.Config())
    tokens, lengths, mask = collate(examples, "cpu")
    for n, (prompt, completion) in enumerate(examples):
        assert tokens[n, 1:][mask[n]].tolist() == completion and completion[-1:] == model.eos_ids
        assert tokens[n, : lengths[n]].tolist() == prompt + completion
        text = model.tokenizer.decode(completion[:-1])
        assert text == f"{problems[n].cot}\nTherefore, the answer is: {problems[n].answer}"
    with torch.no_grad():
        logp = token_logp(model.logits(model(tokens))[:, :-1], tokens[:, 1:])
    expected = -sum(logp[n][mask[n]].sum() for n in range(3)) / mask.sum()
    train(tmp_path / "one", model=str(toy_run), steps=1, limit=3, batch=3, lr=0.0, layer_dropout=0.0)
    assert read_metrics(tmp_path / "one")[0]["loss"] == pytest.approx(expected.item(), abs=1e-12)
    losses = []
    for row, (prompt, completion) in enumerate(examples):  # one by one, without padding
        alone = torch.tensor([prompt + completion])
        with torch.no_grad():
            row_logp = token_logp(model.logits(model(alone))[:, :-1], alone[:, 1:])[0, len(prompt) - 1 :]
        losses.append(-row_logp.sum())
        assert len(row_logp) == int(mask[row].sum())
    assert sum(losses) / mask.sum() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("cot", "target"),
    [
        ("1 + 1 = 2", "1 + 1 = 2\nTherefore, the answer is: \\boxed{2}"),
        ("1 + 1 = 2\nTherefore, the answer is: 2", "1 + 1 = 2\nTherefore, the answer is: \\boxed{2}"),
        ("It is \\boxed{2}.", "It is \\boxed{2}."),
    ],
)
def test_in_a_chat_the_answer_of_a_target_is_boxed(cot, target, toy_run):
    model = load(toy_run, None, None)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    for engine, expected in (("nl", target), ("python", cot)):
        ((_, ids),) = encode_examples([Problem("1 + 1?", cot, "2")], model, warmup.Config(engine=engine))
        assert model.tokenizer.decode(ids) == expected + "<eos>"
    assert score(target, "2", "gsm8k") == 1


def test_few_targets_that_do_not_fit_are_left_out(toy_run):
    problems = [Problem("1 + 1?", "1 " * (300 if i == 3 else 1), str(i)) for i in range(150)]
    examples = encode_examples(problems, load(toy_run, None, None), warmup.Config())
    assert len(examples) == len(problems) == 149 and "3" not in {problem.answer for problem in problems}


def test_micro_batch_size_does_not_change_the_training(tmp_path):
    runs = [train(tmp_path / str(size), micro_batch=size) for size in (1, 5, 64)]
    for run in runs[1:]:
        assert all((p - q).abs().max() < 1e-9 for p, q in zip(weights(run), weights(runs[0]), strict=True))
        assert read_metrics(run)[-1]["loss"] == pytest.approx(read_metrics(runs[0])[-1]["loss"], abs=1e-9)


def test_layer_dropout_trains_nested_models_in_its_share_of_batches(tmp_path, monkeypatch):
    masks = []
    real = warmup.Decoder.forward
    spy = lambda self, t, skip=None, *a, **k: masks.append(skip) or real(self, t, skip, *a, **k)  # noqa: E731
    monkeypatch.setattr(warmup.Decoder, "forward", spy)
    train(tmp_path, steps=40, batch=2, layer_dropout=0.5)  # one pass a step
    skips = [mask for mask in masks[:40] if mask is not None]
    assert 12 < len(skips) < 28
    assert all(int(skip.sum()) == 2 for skip in skips) and len({tuple(skip.tolist()) for skip in skips}) > 5


def test_layer_dropout_draws_as_many_layers_from_the_pool_as_rl_will_and_says_how_well_the_model_does_without(tmp_path):
    flags = {"layer_dropout": 1.0, "skip_ratio": 0.125, "skip_layers": "cheap", "eval_every": 4}
    masks, real = [], warmup.supervised_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "supervised_step", lambda *args: masks.append(args[3]) or real(*args))
        run = train(tmp_path, steps=8, batch=4, **flags)
    worth = json.loads((run / "config.json").read_text())["layer_kl"]
    cheapest = sorted(range(1, 7), key=lambda layer: worth[layer])[:2]
    assert {tuple(mask.nonzero().flatten().tolist()) for mask in masks} == {(cheapest[0],), (cheapest[1],)}
    kl = [record.get("kl_behav") for record in read_metrics(run)]
    assert [x is None for x in kl] == [True, True, True, False] * 2 and all(x > 0 for x in kl if x is not None)


def test_the_learning_rate_rises_over_a_tenth_of_the_run_and_falls_linearly_over_all_of_it(tmp_path):
    train(tmp_path, steps=20, lr=1.0, batch=2, eval_every=8)
    records = read_metrics(tmp_path)
    expected = [min(step / 2, (21 - step) / 18) for step in range(1, 21)]  # the last step still learns
    assert [record["lr"] for record in records] == pytest.approx(expected)
    assert [record["step"] for record in records if "greedy_accuracy" in record] == [8, 16]


@pytest.mark.parametrize(
    ("flags", "steps"), [({"epochs": 2.0}, 6), ({"epochs": 0.5}, 2), ({"steps": 3, "epochs": 9}, 3)]
)
def test_epochs_times_problems_over_batch_steps_are_taken_unless_steps_says_otherwise(tmp_path, flags, steps):
    train(tmp_path, **{"steps": None, "limit": 13, "batch": 4} | flags)
    assert len(read_metrics(tmp_path)) == steps


@pytest.fixture
def run(toy_run, tmp_path):
    """A Run of stage 1 with Adam's parameters away from their defaults."""
    model = load(toy_run, None, "float64")
    config = warmup.Config(model=str(toy_run), out=str(tmp_path / "run"), limit=2, max_new_tokens=4)
    return Run("warmup", config, model, {"the training problems": [2]}, 10, decay=0.5, beta2=0.75)


def test_matrices_decay_norms_and_biases_do_not(run):
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.update(0.1, torch.tensor(0.0))
    for name, parameter in run.model.named_parameters():
        assert torch.allclose(parameter, before[name] * (0.95 if parameter.dim() == 2 else 1.0), atol=1e-15), name
    assert all(group["betas"] == (0.9, 0.75) for group in run.optimizer.param_groups)


@pytest.mark.parametrize(("size", "kept"), [(0.5, 0.5), (40.0, 1.0)])
def test_the_gradient_is_clipped_to_norm_1_and_its_norm_before_is_returned(run, size, kept):
    weight, seen = run.model.norm.weight, []
    weight.grad = torch.zeros_like(weight)
    weight.grad[3] = size
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.norm().item()))
    assert run.update(0.0, torch.tensor(1.0)) == pytest.approx(size) and seen == pytest.approx([kept], rel=1e-6)


def test_an_example_that_fills_the_context_exactly_is_accepted_and_one_token_more_refused(toy_run):
    model, problems = load(toy_run, None, None), load_problems("toy", "train", limit=1)
    ((prompt, completion),) = encode_examples(problems, model, warmup.Config())
    length, config = len(prompt) + len(completion), model.config
    config.max_positions = length
    assert encode_examples(problems, model, warmup.Config()) == [(prompt, completion)]
    config.max_positions = length - 1
    with pytest.raises(InputError, match=f"context of {length - 1} tokens.* of {length} tokens"):
        encode_examples(problems, model, warmup.Config())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    a, b, c = (train(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(weights(a), weights(c), strict=True))


def test_batches_walk_through_every_epoch_once():
    order = [i for step in range(1, 8) for i in batch_indices(3, step, 5, 7)]
    for epoch in range(5):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert order[:7] != order[7:14]
    assert Counter(batch_indices(0, 1, 10, 4)) == Counter([0, 1, 2, 3, 0, 1, 2, 3, *batch_indices(0, 1, 10, 4)[8:]])


def test_micro_batches_hold_every_row_once_and_no_more_columns_than_needed():
    lengths = torch.tensor([5, 9, 2, 7, 7])
    parts = list(micro_batches(lengths, 2))
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == [0, 1, 2, 3, 4]
    assert [T for _, T in parts] == [5, 7, 9]
    assert all(int(lengths[rows].max()) == T for rows, T in parts)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 25])
def test_the_learning_rate_rises_for_a_tenth_of_the_steps_reaches_lr_and_falls_in_a_line(tmp_path, steps):
    train(tmp_path, steps=steps, batch=2, lr=1e-3)
    rates = [record["lr"] / 1e-3 for record in read_metrics(tmp_path)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1) and peak <= steps / 10
    falls = [a - b for a, b in pairwise([*rates[peak + 1 :], 0])]
    assert falls == pytest.approx([1 / (0.9 * steps)] * len(falls))


def test_pretrained_checkpoints_continue_training(toy_run, tmp_path):
    warmup.main(warmup.Config(model=str(toy_run), out=str(tmp_path), steps=2, limit=40, test_limit=40, batch=8))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["lr"] == 1e-5 and run["layer_dropout"] == 0  # ReFT's numbers, not those of the small decoder
    changed = [not torch.equal(p, q) for p, q in zip(weights(tmp_path), weights(toy_run), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_the_next_command_carries_the_flags_of_this_run(toy_run, tmp_path, capsys):
    warmup.main(warmup.Config(out=str(tmp_path / "toy"), steps=1, limit=4, test_limit=4))
    assert f"next: python rl.py --skip-ratio 0.25 --model {tmp_path / 'toy'}\n" in capsys.readouterr().out
    data, out = tmp_path / "a.jsonl", tmp_path / "svamp"
    data.write_text('{"question": "1 + 1?", "answer_cot": "1 + 1 = 2.", "answer_value": "2"}\n')
    flags = {"task": "svamp", "data": str(data), "test_data": str(data), "max_new_tokens": 4, "steps": 1}
    warmup.main(warmup.Config(model=str(toy_run), out=str(out), **flags))
    command = f"python rl.py --model {out}\n"  # without layer dropout nested models are much worse
    assert f"next: {command}" in capsys.readouterr().out
    config = rl.Config(model=str(out))
    assert {name: getattr(config, name) for name in ("task", "data", "test_data", "max_new_tokens")} == {
        name: flags[name] for name in ("task", "data", "test_data", "max_new_tokens")
    }


def test_checkpoints_on_the_way_can_be_opened(tmp_path, monkeypatch):
    saved, real = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run: real(run) or saved.append(weights(run.out)))
    train(tmp_path, steps=6, save_every=2)
    assert len(saved) == 3  # after 2, 4 and, once, at the end
    assert not torch.equal(saved[0][0], saved[1][0]) and not torch.equal(saved[1][0], saved[2][0])


def test_problems_without_a_chain_of_thought_are_refused(tmp_path, toy_run):
    rows = [{"item_id": "a", "question": "What is 1 + 1?", "answer_value": "2"}] * 2
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    flags = {
        "model": str(toy_run),
        "task": "gsm8k",
        "data": str(file),
        "test_data": str(file),
        "out": str(tmp_path / "o"),
    }
    with pytest.raises(InputError, match="chain of thought"):
        warmup.main(warmup.Config(**flags))
    assert not (tmp_path / "o").exists()


def test_end_to_end_reinforcement_learns_which_reasoning_pays(main_job):
    """The main job, shortened: RL with skipped layers makes much more of a warm-up that imitates both annotators."""
    folder, job = main_job
    assert job.wait() == 0, (folder / "log").read_text()
    supervised, reinforced = (
        json.loads((folder / f"runs/{name}/evaluation.json").read_text()) for name in ("warmup", "rl")
    )
    assert reinforced["greedy_accuracy"] > supervised["greedy_accuracy"] + 0.15
    records = read_metrics(folder / "runs" / "rl")
    assert all(0 < record["kl_behav"] < 0.3 for record in records)
    assert all(len(record["skipped_layers"]) == 2 for record in records)
