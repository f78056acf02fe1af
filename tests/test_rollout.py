"""rollout.py: what is sampled, what is recorded of it, and that neither depends on the batch."""

import copy

import pytest
import torch
from families import CONFIGS, random_hf_model
from layers import Config, main
from tokenizers import processors

from model import Decoder, load, nested_kl, sample_skip
from reward import InputError, Problem, load_problems
from rollout import (
    SYSTEM_PROMPTS,
    Rollout,
    Sampler,
    draw,
    encode_prompts,
    fitting,
    grade,
    prompt_seeds,
    sample,
)
from warmup import collate

INNER = torch.tensor([False, True, False, False])
IDS = torch.randint(0, 97, (51,), generator=torch.Generator().manual_seed(0))
PROMPTS = [ids.tolist() for ids in IDS.split([5, 33, 1, 12])]
EOS = [1, 2, 3]
PAD = 0


def make_decoder(family="qwen2"):
    torch.manual_seed(0)
    return Decoder(CONFIGS[family]())


@pytest.fixture(scope="module")
def decoder():
    return make_decoder().double()


def run(decoder, prompts=PROMPTS, **changes):
    flags = {
        "max_new_tokens": 20,
        "eos_id": EOS,
        "pad_id": PAD,
        "num_samples": 3,
        "seed": 4,
    }
    return sample(decoder, prompts, **{**flags, **changes})


def run_as_gpu(decoder, every=16, **changes):
    """`run` with the steps of a GPU: a power of two rows, all columns, ends are noticed late."""
    real = Sampler.__init__

    def with_gpu_steps(self, *args):
        real(self, *args)
        self.graphed_decode = self.decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__init__", with_gpu_steps)
        patch.setattr("rollout.LOOK_EVERY", every)
        return run(decoder, **changes)


@torch.no_grad()
def log_probs(decoder, tokens, skip=None, temperature=1.0):
    """One pass: the log-probabilities of every next token, (N, T-1, vocab)."""
    logits = decoder.logits(decoder(tokens, skip))[:, :-1]
    return (logits / temperature).log_softmax(-1)


def logp_gap(decoder, rollout, **flags):
    """logp_behav minus what one pass makes of it, (actions,)."""
    logp = log_probs(decoder, rollout.tokens, rollout.skip, **flags)
    logp = logp.gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1)
    return (rollout.logp_behav - logp)[rollout.action_mask]


def assert_same(a, b):
    """Equal completions, and equal log-probabilities up to float64 rounding."""
    for name in ("tokens", "lengths", "prompt_lens", "action_mask", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.logp_behav - b.logp_behav).abs().max() < 1e-12


# ---- what is sampled, and what is recorded of it -------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "galactica", "llama3"])
def test_greedy_equals_generate(family, tmp_path):
    hf = random_hf_model(family)
    hf.save_pretrained(tmp_path)
    rollout = run(Decoder.from_pretrained(tmp_path), num_samples=1, temperature=0)
    for prompt, completion in rollout.pairs():
        inputs = torch.tensor([prompt])
        expected = hf.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),  # else an id 0 would be read as padding
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert prompt + completion == expected[0].tolist()


@pytest.mark.parametrize("skip", [None, INNER, ~INNER], ids=["full", "inner", "first and last"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
    ],
)
def test_logp_behav_equals_one_masked_forward(skip, temperature, dtype, rounding):
    decoder = make_decoder().to(dtype)
    rollout = run(decoder, skip=skip, temperature=temperature)
    gap = logp_gap(decoder, rollout, temperature=temperature or 1.0)
    assert gap.abs().max() < rounding


@pytest.mark.parametrize("run", [run, run_as_gpu])
def test_the_picture_holds(run, decoder):
    rollout = run(decoder)
    N, T = rollout.tokens.shape
    assert T == rollout.lengths.max()
    assert rollout.action_mask.shape == rollout.logp_behav.shape == (N, T - 1)
    assert (rollout.logp_behav[~rollout.action_mask] == 0).all()
    for n, tokens in enumerate(rollout.tokens.tolist()):
        start = int(rollout.prompt_lens[n])
        end = int(rollout.lengths[n])
        actions = rollout.action_mask[n].nonzero().flatten().tolist()
        assert tokens[:start] == PROMPTS[n // 3]
        assert actions == list(range(start - 1, end - 1))
        assert not set(tokens[start : end - 1]) & set(EOS)
        assert tokens[end:] == [PAD] * (T - end)
        assert rollout.finished[n] == (tokens[end - 1] in EOS)
        assert rollout.finished[n] or end - start == 20
    assert 0 < rollout.finished.sum() < N  # both occur, or the test shows nothing


def test_a_sampled_pad_id_stays_in_the_mask_and_an_eos_in_the_prompt_ends_nothing(decoder):
    rollout = run(decoder, [[1, 7, 2], [5, 1]], num_samples=40, pad_id=8)
    assert (rollout.action_mask & (rollout.tokens[:, 1:] == 8)).any()
    assert (rollout.lengths - rollout.prompt_lens).double().mean() > 3
    assert rollout.tokens[:40, :3].tolist() == [[1, 7, 2]] * 40


def test_draw_never_takes_a_token_of_probability_zero():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, [1, 3]] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = draw(logits, uniform, 1.0)
    assert tokens.tolist() == [1, 3, 3]


def test_bf16_sampling_is_near_the_fp32_log_probabilities():
    decoder = make_decoder()
    decoder.autocast = True  # --dtype bfloat16
    rollout = run(decoder, skip=INNER, num_samples=20)
    assert rollout.logp_behav.dtype == torch.float32
    decoder.autocast = False
    gap = logp_gap(decoder, rollout)
    assert 0 < gap.abs().mean() < 0.02
    assert gap.abs().max() < 0.1
    assert gap.mean().abs() < 0.002


def test_kl_of_nested_models_is_exact_over_the_vocabulary_and_a_mean_over_tokens(decoder):
    nested = run(decoder, skip=INNER)
    log_mu = log_probs(decoder, nested.tokens, INNER)
    log_pi = log_probs(decoder, nested.tokens)
    kl = (log_mu.exp() * (log_mu - log_pi)).sum(-1)  # (N, T-1)
    expected = kl[nested.action_mask].mean().item()
    masks = torch.stack([torch.zeros_like(INNER), INNER])
    measured = nested_kl(decoder, nested.pairs(), masks).tolist()
    assert measured == pytest.approx([0, expected], abs=1e-12)
    assert expected > 0


# ---- what the batch does not change, and how little of it is computed ----------------------------


@pytest.mark.parametrize("skip", [None, INNER], ids=["full", "nested"])
def test_completions_depend_neither_on_slots_nor_on_neighbours(decoder, skip):
    whole = run(decoder, skip=skip)
    for max_rows in (1, 2, 5, 11, 12, 100):
        assert_same(run(decoder, skip=skip, max_rows=max_rows), whole)
    alone = []
    seeds = prompt_seeds(4, len(PROMPTS))
    for prompt, seed in zip(PROMPTS, seeds, strict=True):
        rollout = run(decoder, [prompt], skip=skip, seed=[seed])
        alone += rollout.pairs()
    assert alone == whole.pairs()


@pytest.mark.parametrize(("max_rows", "every"), [(1, 16), (5, 3), (12, 16)])
@pytest.mark.parametrize(
    ("family", "room"),
    [
        ("qwen2", 20),
        ("opt", 64 - 33),  # up to its last learned position
    ],
)
def test_the_steps_of_a_gpu_complete_alike(family, room, max_rows, every):
    decoder = make_decoder(family).double()
    flags = {"skip": INNER, "max_new_tokens": room, "eos_id": [1, 2, 3, 4]}
    expected = run(decoder, **flags)
    assert_same(run_as_gpu(decoder, every, max_rows=max_rows, **flags), expected)
    assert 0 < expected.finished.sum() < 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_with_its_graphs_completes_as_the_cpu_does_in_float64(decoder):
    gpu = copy.deepcopy(decoder).cuda()
    expected = run(decoder, skip=INNER).pairs()
    assert run(gpu, skip=INNER, max_rows=5).pairs() == expected


@pytest.mark.parametrize("run", [run, run_as_gpu])
@pytest.mark.parametrize("max_rows", [1, 5, None])
def test_eos_as_the_first_token_ends_a_row_and_no_eos_means_full_length(run, max_rows, decoder):
    every_id = list(range(97))
    for eos_id, length in ((every_id, 1), ([], 20)):
        rollout = run(decoder, eos_id=eos_id, max_rows=max_rows)
        assert (rollout.lengths - rollout.prompt_lens == length).all()
        assert (rollout.finished == (length == 1)).all()
    at_limit = run(decoder, eos_id=every_id, max_new_tokens=1)
    assert at_limit.finished.all()


@pytest.fixture
def passes(decoder):
    """(rows, columns) of every pass of the decoder."""
    shapes = []
    hook = decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    yield shapes
    hook.remove()


def test_a_prompt_runs_once_for_all_its_samples_and_ended_rows_leave(decoder, passes):
    actions = int(run(decoder, num_samples=30).action_mask.sum())
    assert passes.pop(0) == (4, 33)
    rows = [rows for rows, _ in passes]
    assert sum(rows) < 1.1 * actions
    assert rows == sorted(rows, reverse=True)


def test_waiting_rows_take_the_place_of_ended_ones(decoder, passes):
    run(decoder, num_samples=30, max_rows=16)
    rows = [rows for rows, columns in passes if columns == 1]
    busy = rows[: len(rows) // 2]
    assert max(rows) == 16
    assert sum(busy) > 0.9 * 16 * len(busy)


def test_a_skipped_layer_does_no_work(decoder, monkeypatch):
    monkeypatch.setattr(decoder.layers[1], "forward", None)
    run(decoder, skip=INNER)
    with pytest.raises(TypeError):
        run(decoder, skip=~INNER)


def test_an_empty_prompt_is_refused(decoder):
    with pytest.raises(ValueError, match="empty"):
        run(decoder, [[1], []])


# ---- the layers that mu leaves out ---------------------------------------------------------------


def test_toy_tasks_skip_inner_layers_and_others_cheap_ones(toy_run):
    for task, pool in (("toy-long", "inner"), ("svamp", "cheap")):
        assert Config(model=str(toy_run), task=task).skip_layers == pool


# ---- prompts -------------------------------------------------------------------------------------

TURNS = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
RAISE = "{{ raise_exception('no system role') }}"
NO_SYSTEM = f"{{% if messages[0]['role'] == 'system' %}}{RAISE}{{% endif %}}{TURNS}"


def prompt_of(folder, template=None, question="1 + 1?", **flags):
    """One prompt as text, in the words of a chat template."""
    model = load(folder, None, None)
    model.tokenizer.chat_template = template
    config = Config(model=str(folder), **flags)
    problem = Problem(question, "2", "2")
    (prompt,) = encode_prompts([problem], model, config)
    return model.tokenizer.decode(prompt)


def test_a_template_without_a_system_role_has_that_text_in_front_of_the_question(toy_run):
    system = SYSTEM_PROMPTS["nl"]
    assert prompt_of(toy_run, TURNS) == f"{system}<eos>1 + 1?<eos>"
    assert prompt_of(toy_run, NO_SYSTEM) == f"{system}\n\n1 + 1?<eos>"


def test_a_template_that_writes_the_date_writes_the_same_one_tomorrow(toy_run):
    clock = "{{ strftime_now('%H:%M:%S.%f') }} "
    macro = "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }} "
    prompt = prompt_of(toy_run, clock + macro + TURNS)
    assert prompt.startswith("26 Jul 2024 26 Jul 2024 Please")


FAILING = ["{% if %}", "{{ a.b.c }}", "{{ raise_exception('no') }}", {"tool_use": TURNS}]


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_one_line_and_refts_prompt_does_without(template, toy_run):
    with pytest.raises(InputError, match=r"the chat template .*--prompt-style reft"):
        prompt_of(toy_run, template)
    assert prompt_of(toy_run, template, prompt_style="reft").startswith("Question:")


@pytest.mark.parametrize("template", [None, TURNS.replace("<eos>", "<pad>")])
def test_a_chat_in_which_no_answer_could_end_is_refused_and_is_no_chat_by_itself(template, toy_run):
    with pytest.raises(InputError, match="--prompt-style is chat"):
        prompt_of(toy_run, template, prompt_style="chat")
    assert prompt_of(toy_run, template).startswith("Question:")


def test_what_a_tokenizer_adds_stays_in_front_of_a_prompt_and_not_behind(toy_run):
    model = load(toy_run, None, None)
    ends = [("<pad>", 0), ("<eos>", 1)]
    around = processors.TemplateProcessing("<pad> $A <eos>", special_tokens=ends)
    model.tokenizer.backend_tokenizer.post_processor = around
    config = Config(model=str(toy_run))
    (prompt,) = encode_prompts([Problem("1 + 1?", "2", "2")], model, config)
    assert model.tokenizer.decode(prompt) == "<pad>Question:\n1 + 1?\nAnswer reasoning:\n"


# ---- what does not fit ---------------------------------------------------------------------------


def test_training_leaves_out_what_does_not_fit_and_says_how_many_and_tests_refuse(decoder, capsys):
    rows = [[7] * 50, [7] * 51, [96], [97]]  # the embedding has 97 rows
    room = decoder.config.max_positions - 50
    assert fitting(rows, decoder, room, is_training=True) == [0, 2]
    assert capsys.readouterr().out.startswith("left out: 2 of 4 problems exceed the 50 tokens")
    assert fitting(rows[::2], decoder, room, is_training=False) == [0, 1]
    assert not capsys.readouterr().out
    for refused, is_training in [(rows, False), (rows[1::2], True)]:
        with pytest.raises(InputError, match=f"2 of {len(refused)} problems .*--max-new-tokens"):
            fitting(refused, decoder, room, is_training)


def test_a_prompt_that_fits_exactly_is_completed_and_one_token_more_is_refused():
    decoder = make_decoder("opt")  # 64 learned positions
    flags = {"prompts": [[7] * 61], "eos_id": [], "num_samples": 1}
    assert run(decoder, max_new_tokens=3, **flags).lengths.tolist() == [64]
    with pytest.raises(ValueError, match="context"):
        run(decoder, max_new_tokens=4, **flags)


# ---- grading -------------------------------------------------------------------------------------


def grades_of(folder, completions, gold, finished=None, **flags):
    """The grades of completions as text or token ids, of one problem."""
    model = load(folder, None, None)
    config = Config(model=str(folder), **flags)
    rows = [model.encode([x])[0] if isinstance(x, str) else x for x in completions]
    tokens, lengths, _ = collate([([5], row) for row in rows], "cpu")
    starts = torch.ones_like(lengths)
    is_finished = torch.tensor(finished or [True] * len(rows))
    rollout = Rollout(tokens, starts, lengths, None, None, is_finished, None)
    return grade(rollout, [Problem("q", "", gold)], model, config)


def test_a_cut_completion_has_no_answer(toy_run):
    text = "That makes 8.\nTherefore, the answer is: 8"
    texts, answers, outcomes = grades_of(toy_run, [text, text], "8", [True, False])
    assert texts == [text, text]
    assert answers == ["8", None]
    assert outcomes == ["right", "cut"]


def test_programs_are_run_and_graded_by_what_they_return(toy_run):
    bodies = ["return 4 + 4", "return 7", "return 'eight'", "while True: pass", "return 8"]
    programs = [f"def solution():\n    {body}" for body in bodies]
    is_finished = [True] * 4 + [False]
    grades = grades_of(toy_run, programs, "8", is_finished, engine="python")
    assert grades.outcomes == ["right", "wrong", "error", "timeout", "cut"]
    assert grades.answers == ["8", "7", None, None, None]


@pytest.mark.parametrize("between", [0, 605], ids=["a control token", "an id without a token"])
def test_what_is_sampled_in_the_midst_of_an_answer_is_not_dropped(between, toy_run):
    encode = load(toy_run, None, None).encode
    before, after = encode(["The answer is: 1", "8"])
    grades = grades_of(toy_run, [[*before, between, *after, 1]], "18")
    assert grades.outcomes != ["right"]
    assert "18" not in grades.texts[0]
    assert not grades.texts[0].endswith("<eos>")


# ---- the script ----------------------------------------------------------------------------------


def test_the_script_prints_completions_of_both_models_and_what_skipping_does(toy_run, capsys):
    config = Config(
        model=str(toy_run),
        skip_ratio=0.25,
        masks=2,
        limit=200,
        test_limit=6,
        max_new_tokens=8,
        max_rows=4,
        dtype="float64",
    )
    results = main(config)
    out = capsys.readouterr().out

    model = load(toy_run, None, "float64")
    problems = load_problems("toy", "test", limit=6)
    prompts = encode_prompts(problems, model, config)
    generator = torch.Generator().manual_seed(0)
    masks = [sample_skip(8, 0.25, generator) for _ in range(2)]
    for name, skips in (("pi", [torch.zeros_like(masks[0])] * 2), ("mu", masks)):
        outcomes, kls = [], []
        for seed, skip in enumerate(skips):
            rollout = sample(model, prompts, skip=skip, seed=seed, **config.sampling(model))
            kls.append(nested_kl(model, rollout.pairs(), skip[None]).item())
            grades = grade(rollout, problems, model, config)
            outcomes += grades.outcomes
            assert f"{name}, without {skip.nonzero().flatten().tolist()}: KL" in out
        assert results[name] == (grades, pytest.approx(sum(kls) / 2, abs=1e-12))
        assert f"\n{name}, {grades.outcomes[3]}: {grades.texts[3]!r}\n" in out
        accuracy = outcomes.count("right") / 12
        assert f"{name}: accuracy {accuracy:.3f}, " in out
        assert f" tokens/s, KL({name}||pi) {sum(kls) / 2:.4f} per token\n" in out
    assert results["pi"][0].texts != results["mu"][0].texts
    assert f"--- {problems[3].question} (gold: {problems[3].answer})\n" in out
