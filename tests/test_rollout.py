"""rollout.py: what is sampled, what is recorded of it, and that neither depends on the batch."""

import contextlib

import pytest
import torch
from families import CONFIGS, random_hf_model
from tokenizers import processors

from model import Decoder, load, measure_layers, nested_kl, sample_skip
from reward import InputError, Problem, load_problems
from rollout import (
    LOOK_EVERY,
    SYSTEM_PROMPTS,
    Config,
    NestedConfig,
    Rollout,
    SharedConfig,
    draw,
    encode_prompts,
    grade,
    graphed,
    main,
    prompt_seeds,
    sample,
    skip_pool,
    token_logp,
)

INNER = torch.tensor([False, True, False, False])
PROMPTS = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 3, 12)]


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(CONFIGS["qwen2"]()).double()


def run(decoder, prompts=PROMPTS, **changes):
    flags = {"max_new_tokens": 20, "eos_id": [1, 2, 3], "pad_id": 0, "num_samples": 3, "seed": 4}
    return sample(decoder, prompts, **(flags | changes))


@pytest.mark.parametrize("family", ["qwen2", "galactica", "llama3"])
def test_greedy_equals_generate(family, tmp_path):
    hf = random_hf_model(family)
    hf.save_pretrained(tmp_path)
    rollout = run(Decoder.from_pretrained(tmp_path), num_samples=1, temperature=0)
    for row, prompt in enumerate(PROMPTS):
        inputs = torch.tensor([prompt])  # with its mask: generate() would take an id 0 in the prompt for padding
        flags = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [1, 2, 3], "pad_token_id": 0}
        expected = hf.generate(inputs, attention_mask=torch.ones_like(inputs), **flags)[0]
        assert rollout.tokens[row, : rollout.lengths[row]].tolist() == expected.tolist()
        assert len(expected) == rollout.lengths[row]


@pytest.mark.parametrize("skip", [None, INNER, ~INNER], ids=["full", "inner", "first and last"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_logp_behav_equals_one_masked_forward_in_fp32(skip, temperature):
    torch.manual_seed(0)
    decoder = Decoder(CONFIGS["qwen2"]())
    rollout = run(decoder, skip=skip, temperature=temperature)
    with torch.no_grad():
        logits = decoder.logits(decoder(rollout.tokens, skip))[:, :-1] / (temperature or 1.0)
    logp = token_logp(logits, rollout.tokens[:, 1:])
    assert (logp - rollout.logp_behav)[rollout.action_mask].abs().max() < 1e-5
    assert (rollout.logp_behav[~rollout.action_mask] == 0).all()


def assert_same(a: Rollout, b: Rollout):
    """Equal completions, and equal log-probabilities up to float64 rounding."""
    for name in ("tokens", "lengths", "prompt_lens", "action_mask", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.logp_behav - b.logp_behav).abs().max() < 1e-12


@pytest.mark.parametrize("skip", [None, INNER], ids=["full", "nested"])
def test_completions_do_not_depend_on_batch_size_or_slot(decoder, skip):
    whole = run(decoder, skip=skip)
    for max_rows in (1, 2, 5, 11, 12, 100):
        assert_same(run(decoder, skip=skip, max_rows=max_rows), whole)
    seeds = prompt_seeds(4, len(PROMPTS))
    reversed_ = run(decoder, PROMPTS[::-1], skip=skip, seed=seeds[::-1])
    for i in range(len(PROMPTS)):
        for j in range(3):
            a, b = 3 * i + j, 3 * (len(PROMPTS) - 1 - i) + j
            assert whole.tokens[a, : whole.lengths[a]].tolist() == reversed_.tokens[b, : reversed_.lengths[b]].tolist()


def test_the_picture_holds(decoder):
    rollout = run(decoder)
    N, T = rollout.tokens.shape
    assert N == 12 and rollout.action_mask.shape == rollout.logp_behav.shape == (N, T - 1)
    assert rollout.lengths.max() == T
    for n in range(N):
        start, end = int(rollout.prompt_lens[n]), int(rollout.lengths[n])
        assert rollout.tokens[n, :start].tolist() == PROMPTS[n // 3]
        assert rollout.action_mask[n].nonzero().flatten().tolist() == list(range(start - 1, end - 1))
        assert (rollout.tokens[n, end:] == 0).all()
        assert bool(rollout.finished[n]) == (int(rollout.tokens[n, end - 1]) in (1, 2, 3))
        assert not set(rollout.tokens[n, start : end - 1].tolist()) & {1, 2, 3}
        assert rollout.finished[n] or end - start == 20
    assert 0 < rollout.finished.sum() < N  # both kinds occur, or the test shows nothing


def test_a_sampled_pad_id_stays_in_the_mask_and_an_eos_in_the_prompt_ends_nothing(decoder):
    rollout = run(decoder, [[1, 7, 2], [5, 1]], num_samples=40, pad_id=8)
    inside = rollout.action_mask & (rollout.tokens[:, 1:] == 8)
    assert inside.any()
    assert (rollout.lengths - rollout.prompt_lens).double().mean() > 3
    assert rollout.tokens[:40, :3].tolist() == [[1, 7, 2]] * 40


def test_samples_follow_the_softmax_and_differ_from_each_other(decoder):
    count = 4000
    rollout = run(decoder, [PROMPTS[0]], num_samples=count, max_new_tokens=1)
    with torch.no_grad():
        expected = decoder.logits(decoder(torch.tensor([PROMPTS[0]]))[0, -1]).softmax(-1) * count
    observed = torch.bincount(rollout.tokens[:, -1], minlength=97).double()
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 150  # 96 degrees of freedom: exceeded with probability 4e-4


def test_a_skipped_layer_does_no_work(decoder):
    calls = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(decoder.layers)]
    run(decoder, skip=INNER)
    for hook in hooks:
        hook.remove()
    assert set(calls) == {0, 2, 3}


def test_finished_rows_leave_the_batch(decoder):
    rows = []
    hook = decoder.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    rollout = run(decoder, num_samples=30)
    hook.remove()
    assert rows[0] == len(PROMPTS)  # a prompt is prefilled once, whatever the number of samples
    assert sum(rows[1:]) < 1.4 * int(rollout.action_mask.sum())
    assert rows[-1] < rows[1]


def test_no_eos_means_full_length(decoder):
    rollout = run(decoder, eos_id=[])
    assert (rollout.lengths - rollout.prompt_lens == 20).all() and not rollout.finished.any()


@pytest.mark.parametrize(("max_rows", "every"), [(1, 16), (5, 3), (12, 16)])
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_the_step_of_a_gpu_completes_alike(family, max_rows, every, monkeypatch):
    """Rows bucketed, all columns, ended rows noticed late: as a CUDA graph wants it, without the graph."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIGS[family]()).double()
    room = 64 - 12 if family == "opt" else 20  # up to the last learned position
    flags = {"skip": INNER, "max_new_tokens": room, "eos_id": [1, 2, 3, 4]}
    expected = run(decoder, **flags)
    monkeypatch.setitem(LOOK_EVERY, "cpu", every)
    assert_same(run(decoder, max_rows=max_rows, **flags), expected)
    assert 0 < expected.finished.sum() < 12


def test_prompts_of_very_different_lengths(decoder):
    prompts = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 70, 2, 33)]
    together = run(decoder, prompts, max_rows=5)
    seeds = prompt_seeds(4, 4)
    for i, prompt in enumerate(prompts):
        alone = run(decoder, [prompt], seed=[seeds[i]])
        for j in range(3):
            n = 3 * i + j
            assert together.tokens[n, : together.lengths[n]].tolist() == alone.tokens[j, : alone.lengths[j]].tolist()


@pytest.mark.parametrize("every", [1, 16])
def test_eos_as_the_first_token_ends_every_row_at_once(decoder, every, monkeypatch):
    monkeypatch.setitem(LOOK_EVERY, "cpu", every)
    for max_rows in (1, 5, None):
        rollout = run(decoder, eos_id=list(range(97)), max_rows=max_rows)
        assert (rollout.lengths == rollout.prompt_lens + 1).all() and rollout.finished.all()
        assert rollout.action_mask.sum() == 12 and rollout.tokens.shape[1] == 13
        assert_same(rollout, run(decoder, max_new_tokens=1, eos_id=list(range(97))))


def test_a_prompt_runs_once_for_all_its_samples(decoder, monkeypatch):
    monkeypatch.setattr("rollout.PREFILL", 2)
    prompts = []

    def count(_, inputs):
        if inputs[0].shape[1] > 1:
            prompts.append(len(inputs[0]))

    hook = decoder.register_forward_pre_hook(count)
    run(decoder)
    hook.remove()
    assert prompts == [2, 2]


def test_waiting_rows_take_the_place_of_ended_ones(decoder):
    rows = []
    hook = decoder.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:2]))
    rollout = run(decoder, num_samples=30, max_rows=16)
    hook.remove()
    rows = [n for n, columns in rows if columns == 1]
    assert max(rows) <= 16 and sum(rows) == int(rollout.action_mask.sum()) - 120  # the prefill draws the first tokens
    waiting = rows[: len(rows) // 2]
    assert sum(waiting) > 0.9 * 16 * len(waiting)


def test_bf16_sampling_is_near_the_fp32_log_probabilities():
    torch.manual_seed(0)
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.autocast = True  # --dtype bfloat16
    rollout = run(decoder, skip=INNER, num_samples=20)
    assert rollout.logp_behav.dtype == torch.float32
    decoder.autocast = False
    with torch.no_grad():
        logp = token_logp(decoder.logits(decoder(rollout.tokens, INNER))[:, :-1], rollout.tokens[:, 1:])
    gap = (rollout.logp_behav - logp)[rollout.action_mask]  # (actions,)
    assert 0 < gap.abs().mean() < 0.02 and gap.abs().max() < 0.1 and gap.mean().abs() < 0.002


def test_a_rollout_can_be_trained_on(decoder):
    rollout = run(decoder)
    assert not any(t.is_inference() for t in vars(rollout).values() if t is not None)
    (decoder(rollout.tokens).sum() * rollout.logp_behav.sum()).backward()
    decoder.zero_grad()


def test_graphed_runs_one_step_a_call_and_captures_once_a_size(monkeypatch):
    """With a stand-in for the CUDA calls: what is run while capturing computes nothing, a replay does."""
    done, captured, capturing = [], [], []

    class Graph:
        def replay(self):
            done.append(self.size)

    @contextlib.contextmanager
    def capture(graph, pool):
        capturing.append(graph)
        yield
        capturing.pop()

    class Stream:
        def wait_stream(self, other):
            pass

    def step(*size):
        if capturing:
            capturing[-1].size = size
            captured.append(size)
        else:
            done.append(size)

    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: None,
        "Stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = [(4, 9), (4, 9), (2, 9), (4, 9), (2, 9)]
    replay = graphed(step)
    for size in calls:
        replay(*size)
    assert done == calls and captured == [(4, 9), (2, 9)]


def test_draw_never_takes_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, 1.0)[0].tolist() == [1, 3, 3]


def test_a_cut_completion_earns_nothing(toy_run):
    model = load(toy_run, None, None)
    text = model.tokenizer("That makes 8.\nTherefore, the answer is: 8").input_ids
    tokens = torch.tensor([[5, *text], [5, *text]])
    ends = torch.full((2,), tokens.shape[1])
    rollout = Rollout(tokens, torch.ones(2, dtype=torch.int64), ends, None, None, torch.tensor([True, False]), None)
    texts, answers, outcomes, rewards = grade(rollout, [Problem("q", "", "8")], model, SharedConfig())
    assert rewards.tolist() == [1.0, 0.0] and texts[0] == texts[1]
    assert answers == ["8", None] and outcomes == ["right", "cut"]


def test_programs_are_run_and_graded_by_what_they_return(toy_run):
    model = load(toy_run, None, None)
    bodies = ("return 4 + 4", "return 7", "return 'eight'", "while True: pass", "return 8")
    rows = [model.tokenizer(f"def solution():\n    {body}").input_ids for body in bodies]
    ends = torch.tensor([1 + len(row) for row in rows])
    tokens = torch.tensor([[5, *row, *[0] * (int(ends.max()) - 1 - len(row))] for row in rows])
    ended = torch.tensor([True] * 4 + [False])
    rollout = Rollout(tokens, torch.ones(5, dtype=torch.int64), ends, None, None, ended, None)
    grades = grade(rollout, [Problem("q", "", "8")], model, SharedConfig(engine="python"))
    assert grades.rewards.tolist() == pytest.approx([1.0, 0.1, 0.0, 0.0, 0.0])
    assert grades.outcomes == ["right", "wrong", "error", "timeout", "cut"]
    assert grades.answers == ["8", "7", None, None, None]


def test_kl_of_nested_models_is_exact_over_the_vocabulary_and_a_mean_over_completion_tokens(decoder):
    nested = run(decoder, skip=INNER)
    with torch.no_grad():
        log_mu = decoder.logits(decoder(nested.tokens, INNER))[:, :-1].log_softmax(-1)
        log_pi = decoder.logits(decoder(nested.tokens))[:, :-1].log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_pi, log_mu, reduction="none", log_target=True).sum(-1)  # KL(mu || pi)
    kl = nested_kl(decoder, nested.pairs(), torch.stack([torch.zeros_like(INNER), INNER]))
    assert kl[0] == 0 and abs(kl[1] - expected[nested.action_mask].mean()) < 1e-12 and kl[1] > 0


def test_cheap_layers_are_twice_as_many_as_are_skipped_and_those_that_are_worth_least(toy_run):
    model = load(toy_run, None, None)
    model.hf_config.layer_kl = [0.0, 0.3, 0.1, 8.0, 0.2, 0.4, 9.0, 0.0]  # never the first or the last
    cheap = NestedConfig(skip_layers="cheap")
    assert skip_pool(model, 1, cheap) == [2, 4] and skip_pool(model, 2, cheap) == [2, 4, 1, 5]
    assert skip_pool(model, 2, NestedConfig()) == [1, 2, 3, 4, 5, 6]
    assert {sample_skip(8, 0.125, pool=[2, 4]).nonzero().item() for _ in range(60)} == {2, 4}
    assert skip_pool(model, 2, NestedConfig(skip_layers="5,3")) == [5, 3]
    for wrong in ("0,2", "1,1", "1,7"):
        with pytest.raises(InputError, match="different numbers from 1 to 6"):
            skip_pool(model, 1, NestedConfig(skip_layers=wrong))
    with pytest.raises(InputError, match="must be inner, cheap, or numbers"):
        NestedConfig(skip_layers="all")
    assert (NestedConfig(task="toy-long").skip_layers, NestedConfig(task="svamp").skip_layers) == ("inner", "cheap")


def test_what_layers_are_worth_is_measured_once_and_carried_with_the_checkpoint(toy_run, tmp_path):
    model = load(toy_run, None, None)
    pairs = run(model).pairs()
    measure_layers(model, pairs)
    worth = model.hf_config.layer_kl
    assert worth[2] == nested_kl(model, pairs, torch.arange(8)[None] == 2).item() > 0
    measure_layers(model, [([1], [2])])
    model.save_pretrained(tmp_path)
    assert load(tmp_path, None, None).hf_config.layer_kl == model.hf_config.layer_kl == worth


def test_prompts_beyond_the_context_are_refused(decoder):
    with pytest.raises(ValueError, match="context"):
        run(decoder, max_new_tokens=40000)
    with pytest.raises(ValueError, match="empty"):
        run(decoder, [[1], []])


def test_the_script_prints_completions_of_both_models_and_what_skipping_does(toy_run, capsys):
    flags = {"skip_ratio": 0.25, "test_limit": 6, "max_new_tokens": 8, "max_rows": 4, "dtype": "float64"}
    config = Config(model=str(toy_run), **flags)
    results = main(config)
    out = capsys.readouterr().out
    (pi, _, kl_of_pi), (mu, _, kl_of_mu) = results["pi"], results["mu"]
    assert kl_of_pi == 0 < kl_of_mu
    model, problems = load(toy_run, None, "float64"), load_problems("toy", "test", limit=6)
    skip, prompts = sample_skip(8, 0.25, torch.Generator().manual_seed(0)), encode_prompts(problems, model, config, 8)
    full, nested = (sample(model, prompts, skip=mask, seed=0, **config.sampling(model)) for mask in (None, skip))
    assert kl_of_mu == pytest.approx(nested_kl(model, nested.pairs(), skip[None]).item(), abs=1e-12)
    assert pi.texts == grade(full, problems, model, config).texts != mu.texts
    assert mu.texts == grade(nested, problems, model, config).texts
    shown = [
        f"--- {problem.question} (gold: {problem.answer})\n"
        f"pi, reward {pi.rewards[n]:g}: {pi.texts[n]!r}\nmu, reward {mu.rewards[n]:g}: {mu.texts[n]!r}\n"
        for n, problem in enumerate(problems[:4])
    ]
    assert "".join(shown) in out
    worth = nested_kl(model, full.pairs(), torch.eye(8) > 0)
    for layer in range(8):
        assert f"{layer:5} {worth[layer]:9.4f} {'left out by mu ' * bool(skip[layer])}" in out
    assert f"6 problems; mu leaves out layers {skip.nonzero().flatten().tolist()} of 8\n" in out
    for name, (grades, speed, kl) in results.items():
        accuracy = grades.outcomes.count("right") / 6
        assert f"{name}: accuracy {accuracy:.3f}, {speed:,.0f} tokens/s, KL({name}||pi) {kl:.4f} per token\n" in out


# ---- prompts --------------------------------------------------------------------------------------------------------

TURNS = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


def prompt_of(folder, template=None, question="1 + 1?", style="auto"):
    """One prompt as text, in the words of a chat template."""
    model = load(folder, None, None)
    model.tokenizer.chat_template = template
    (prompt,) = encode_prompts([Problem(question, "2", "2")], model, SharedConfig(prompt_style=style), 0)
    return model.tokenizer.decode(prompt)


def test_a_template_without_a_system_role_has_that_text_in_front_of_the_question(toy_run):
    system = SYSTEM_PROMPTS["nl"]
    assert prompt_of(toy_run, TURNS) == f"{system}<eos>1 + 1?<eos>"
    assert prompt_of(toy_run, NO_SYSTEM + TURNS) == f"{system}\n\n1 + 1?<eos>"


def test_a_template_that_writes_the_date_writes_the_same_one_tomorrow(toy_run):
    clock = (
        "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ strftime_now('%H:%M:%S.%f') }} {{ day() }} "
    )
    assert prompt_of(toy_run, clock + TURNS).startswith("26 Jul 2024 26 Jul 2024 Please")


@pytest.mark.parametrize("template", ["{% if %}", "{{ a.b.c }}", "{{ raise_exception('no') }}", {"tool_use": TURNS}])
def test_a_template_that_fails_is_one_line_and_refts_prompt_does_without(template, toy_run):
    with pytest.raises(InputError, match=r"the chat template .*--prompt-style reft"):
        prompt_of(toy_run, template)
    assert prompt_of(toy_run, template, style="reft").startswith("Question:")


@pytest.mark.parametrize("template", [None, TURNS.replace("<eos>", "<pad>")])
def test_a_chat_in_which_no_answer_could_end_is_refused_and_is_no_chat_by_itself(template, toy_run):
    with pytest.raises(InputError, match="--prompt-style is chat"):
        prompt_of(toy_run, template, style="chat")
    assert prompt_of(toy_run, template).startswith("Question:")


def test_what_a_tokenizer_adds_stays_in_front_of_a_prompt_and_not_behind(toy_run):
    model = load(toy_run, None, None)
    both = processors.TemplateProcessing("<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])
    model.tokenizer.backend_tokenizer.post_processor = both
    (prompt,) = encode_prompts([Problem("1 + 1?", "2", "2")], model, SharedConfig(), 0)
    assert model.tokenizer.decode(prompt) == "<pad>Question:\n1 + 1?\nAnswer reasoning:\n"


@pytest.mark.parametrize("template", [None, TURNS])
def test_half_a_character_in_a_question_is_one_line(template, toy_run):
    with pytest.raises(InputError):
        prompt_of(toy_run, template, question="How \ud800 many?")


def test_few_long_training_problems_are_left_out_and_counted_and_no_test_problem_is(toy_run, capsys):
    def problems(long, count):
        return [Problem("How many? " * (100 if i < long else 1), f"c{i}", str(i)) for i in range(count)]

    model, some = load(toy_run, None, None), problems(1, 101)
    prompts = encode_prompts(some, model, SharedConfig(), 8, training=True)
    assert len(prompts) == len(some) == 100 and some[0].answer == "1"
    assert "1 of 101 problems" in capsys.readouterr().out
    for count, training in ((100, True), (101, False)):
        with pytest.raises(InputError, match=r"1 of .*context of 256.*--max-new-tokens 8.*problem 1 .*How many"):
            encode_prompts(problems(1, count), model, SharedConfig(), 8, training=training)


@pytest.mark.parametrize("between", [0, 405], ids=["a control token", "an id without a token"])
def test_what_is_sampled_in_the_midst_of_an_answer_is_not_dropped(between, toy_run):
    model = load(toy_run, None, None)
    ids = [*model.tokenizer("The answer is: 1").input_ids, between, *model.tokenizer("8").input_ids, 1]
    tokens = torch.tensor([[5, *ids]])
    ends = torch.tensor([tokens.shape[1]])
    rollout = Rollout(tokens, torch.ones_like(ends), ends, None, None, torch.tensor([True]), None)
    grades = grade(rollout, [Problem("q", "", "18")], model, SharedConfig())
    assert grades.rewards[0] < 1 and "18" not in grades.texts[0] and not grades.texts[0].endswith("<eos>")


def test_a_prompt_that_fits_exactly_is_accepted_and_one_token_more_refused(decoder, toy_run, monkeypatch):
    model, problems = load(toy_run, None, None), load_problems("toy", "test", limit=1)
    (prompt,) = encode_prompts(problems, model, SharedConfig(), 1)
    room = model.config.max_positions - len(prompt)
    assert encode_prompts(problems, model, SharedConfig(), room) == [prompt]
    with pytest.raises(InputError, match="exceed the model's context"):
        encode_prompts(problems, model, SharedConfig(), room + 1)
    monkeypatch.setattr(decoder.config, "max_positions", 64)
    room = decoder.config.max_positions - 1
    prompt = [7] * (room - 2)
    assert run(decoder, [prompt], max_new_tokens=3, eos_id=[], num_samples=1).lengths.tolist() == [room + 1]
    with pytest.raises(ValueError, match="context"):
        run(decoder, [prompt], max_new_tokens=4)
