"""Whole pipelines on small random checkpoints that have the config features of the models people train."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CodeLlamaTokenizer,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import evaluate
import rl
import warmup
from model import COPIED, load
from reward import InputError, Problem, load_problems, make_prompt, make_target
from rollout import SYSTEM_PROMPTS, encode_prompts, sample, turn_end
from warmup import encode_examples

SIZE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.2}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def codellama(**ids):
    return LlamaConfig(
        **SIZE | ids, intermediate_size=48, num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False,
    )  # fmt: skip


def galactica(**ids):
    return OPTConfig(
        vocab_size=SIZE["vocab_size"], hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48,
        word_embed_proj_dim=32, max_position_embeddings=256, init_std=0.2, activation_function="gelu",
        enable_bias=False, layer_norm_elementwise_affine=False, dropout=0.1, **ids,
    )  # fmt: skip


def qwen25(**ids):  # two kv heads, biases on q, k, v alone, an embedding with more rows than the tokenizer has tokens
    return Qwen2Config(
        **SIZE | ids, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rms_norm_eps=1e-6, tie_word_embeddings=True,
        use_sliding_window=False, sliding_window=64,
    )  # fmt: skip


def llama3(**ids):
    return LlamaConfig(
        **SIZE | ids, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512,
        rope_parameters=LLAMA31_ROPE, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip


def qwen3(**ids):  # heads wider than hidden_size / num_heads, norms on q and k
    return Qwen3Config(
        **SIZE | ids, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )  # fmt: skip


QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_CHAT = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
CHECKPOINTS = {  # the config, the special tokens, what the tokenizer knows of them, the EOS of generation_config
    "codellama": (codellama, None, {}, "</s>"),
    "galactica": (galactica, ["<s>", "<pad>", "</s>", "<unk>", "[START_REF]"], {}, None),
    "qwen2.5-math-instruct": (qwen25, QWEN_TOKENS, QWEN_CHAT, ["<|im_end|>", "<|endoftext|>"]),
    "qwen2.5 base": (qwen25, QWEN_TOKENS, QWEN_CHAT | {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
    "llama3.1-instruct": (
        llama3,
        LLAMA3_TOKENS,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3_CHAT},
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "qwen3": (qwen3, [*QWEN_TOKENS, "<think>", "</think>"], QWEN_CHAT, ["<|im_end|>", "<|endoftext|>"]),
}
CHAT = ("qwen2.5-math-instruct", "llama3.1-instruct", "qwen3")


def texts() -> list[str]:
    return [make_prompt(problem) for problem in load_problems("toy", "train", limit=50)]


def codellama_tokenizer() -> CodeLlamaTokenizer:
    """As many pieces as the embedding has rows, and <FILL_ME> beyond them; a space before every text, no padding."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=SIZE["vocab_size"], special_tokens=pieces, show_progress=False)
    bpe.train_from_iterator(texts(), trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = CodeLlamaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])
    assert tokenizer.vocab_size == SIZE["vocab_size"] < len(tokenizer)
    return tokenizer


def make_tokenizer(special: list[str], known: dict) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens; the BOS that the tokenizer knows is put in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    if bos := known.get("bos_token"):
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **known)


def make_checkpoint(name: str, folder: Path) -> Path:
    """A random checkpoint as the hub has it: bf16 in several safetensors files; Galactica: fp16 in .bin files."""
    make_config, special, known, ends = CHECKPOINTS[name]
    tokenizer = codellama_tokenizer() if special is None else make_tokenizer(special, known)
    numbers = {token: i for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))}
    eos = [numbers[end] for end in ends] if isinstance(ends, list) else numbers[ends or "</s>"]
    bos = numbers.get(known.get("bos_token", "<s>"))
    torch.manual_seed(0)
    config = make_config(bos_token_id=bos, eos_token_id=eos, pad_token_id=numbers.get("<pad>"))
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float16 if ends is None else torch.bfloat16)
    if ends is None:
        config.dtype = torch.float16
        config.save_pretrained(folder)
        weights = {k: v for k, v in hf.state_dict().items() if k != "lm_head.weight"}
        names = sorted(weights)
        shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, keys in shards.items():
            torch.save({k: weights[k] for k in keys}, folder / file)
        size = sum(weight.nbytes for weight in weights.values())
        index = {
            "metadata": {"total_size": size},
            "weight_map": {k: file for file, keys in shards.items() for k in keys},
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        hf.generation_config.eos_token_id = eos
        hf.save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Flags of gsm8k on local files in ReFT's schema."""
    folder, flags = tmp_path_factory.mktemp("data"), {"task": "gsm8k"}
    for split, flag in (("train", "data"), ("test", "test_data")):
        problems = load_problems("toy", split, limit=12)
        rows = [{"question": p.question, "answer_cot": p.cot, "answer_value": p.answer} for p in problems]
        flags[flag] = str(folder / f"{split}.jsonl")
        Path(flags[flag]).write_text("\n".join(map(json.dumps, rows)))
    return flags


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """Name and folder of a checkpoint."""
    return request.param, make_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint"))


def greedy(hf, prompt: list[int], count: int) -> list[int]:
    """What transformers generates."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "do_sample": False}
        out = hf.generate(tokens, max_new_tokens=count, **options)
    return out[0, len(prompt) :].tolist()


def test_the_pipeline_ends_in_a_directory_that_transformers_opens_with_equal_logits(checkpoint, data, tmp_path):
    _, source = checkpoint
    short = {"max_new_tokens": 8, "dtype": "float32"} | data
    warm, reinforced = tmp_path / "warmup", tmp_path / "rl"
    warmup.main(warmup.Config(model=str(source), out=str(warm), steps=2, batch=4, lr=1e-3, **short))
    flags = {"steps": 2, "rollout_batch": 4, "minibatch": 4, "samples": 2, "skip_ratio": 0.25, "lr": 1e-3}
    rl.main(rl.Config(model=str(warm), out=str(reinforced), **flags, **short))
    (result,) = evaluate.main(evaluate.Config(runs=(str(reinforced),), out=str(tmp_path), samples=2))
    assert result["problems"] == 12 and 0 <= result["pass@2"] <= 1

    decoder = load(reinforced, None, None)
    hf = AutoModelForCausalLM.from_pretrained(reinforced)
    problems = load_problems(data["task"], "test", data["test_data"])
    prompts = encode_prompts(problems, decoder, warmup.Config(), 8)
    tokens = torch.tensor([prompts[0]])
    with torch.no_grad():
        assert (decoder.logits(decoder(tokens)) - hf(tokens).logits).abs().max() < 1e-4
    rollout = sample(decoder, prompts[:1], max_new_tokens=8, eos_id=decoder.eos_ids, pad_id=0, temperature=0)
    assert greedy(hf, prompts[0], 8) == rollout.tokens[0, len(prompts[0]) : rollout.lengths[0]].tolist()

    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, reinforced))
    changed = {key for key in before if before[key] != after.get(key)} - {"transformers_version", "dtype"}
    assert not changed, changed  # rope, heads, biases, tied or not: all as before
    assert load(source, None, None).eos_ids == decoder.eos_ids
    copied = [name for name in COPIED if (source / name).exists()]
    assert {"tokenizer.json", "tokenizer_config.json"} <= {*copied}
    copied.remove("tokenizer_config.json")  # here by transformers 5, so that it changes
    assert all((reinforced / name).read_bytes() == (source / name).read_bytes() for name in copied)
    again, first = AutoTokenizer.from_pretrained(reinforced), AutoTokenizer.from_pretrained(source)
    assert again("1 + 1 = 2").input_ids == first("1 + 1 = 2").input_ids
    assert again.chat_template == first.chat_template and again.get_vocab() == first.get_vocab()


# ---- prompts --------------------------------------------------------------------------------------------------------


def prompts_of(folder, problems, **flags):
    """Prompts as ids and as text, with special tokens; the tokenizer."""
    model = load(folder, None, None)
    prompts = encode_prompts(problems, model, warmup.Config(**flags), 0)
    return prompts, model.tokenizer.batch_decode(prompts), model.tokenizer


def test_chat_models_read_a_chat_and_base_models_refts_prompt(checkpoint, data):
    name, folder = checkpoint
    problems = load_problems("toy", "test", limit=3)
    prompts, texts, tokenizer = prompts_of(folder, problems)
    bos = tokenizer.bos_token
    for problem, prompt, text in zip(problems, prompts, texts, strict=True):
        assert prompt.count(tokenizer.bos_token_id) == (bos is not None)  # one BOS where there is one, in front
        assert bos is None or prompt[0] == tokenizer.bos_token_id
        text = text.removeprefix(bos or "").strip(" ")
        if name in CHAT:
            assert SYSTEM_PROMPTS["nl"] in text and "\\boxed{}" in text and problem.question in text
            assert text.endswith(("<|im_start|>assistant\n", "assistant<|end_header_id|>\n\n"))
        else:
            assert text == make_prompt(problem)


def test_prompt_style_overrides_what_the_checkpoint_is(checkpoint):
    name, folder = checkpoint
    problems = load_problems("toy", "test", limit=1)
    if name in CHAT:
        assert SYSTEM_PROMPTS["nl"] in prompts_of(folder, problems, prompt_style="chat")[1][0]
    else:  # no template, or one whose answers end in no EOS, so that nothing could finish
        with pytest.raises(InputError, match="--prompt-style is chat"):
            prompts_of(folder, problems, prompt_style="chat")
    assert make_prompt(problems[0]) in prompts_of(folder, problems, prompt_style="reft")[1][0]


def test_control_tokens_that_a_problem_spells_stay_text(checkpoint):
    """In ReFT's prompt, in a chat and in a target; CodeLlama's <FILL_ME> has no row in the embedding."""
    name, folder = checkpoint
    model = load(folder, None, None)
    tokenizer, style = model.tokenizer, "chat" if name in CHAT else "reft"
    spelled = " ".join(str(token) for token in tokenizer.added_tokens_decoder.values() if "▁" not in str(token))
    assert len(spelled) > 3
    plain, odd = (Problem(f"How many {word}?", f"There are {word}.", "2") for word in ("x", spelled))
    for prompt_style in {"reft", style}:
        config = warmup.Config(prompt_style=prompt_style)
        (prompt, target), (odd_prompt, odd_target) = encode_examples([plain, odd], model, config)
        special = {*tokenizer.added_tokens_decoder}
        assert [i for i in odd_prompt if i in special] == [i for i in prompt if i in special]
        assert [i for i in odd_target if i in special] == target[-1:] and max(odd_prompt) < model.config.vocab_size
        assert odd.question in tokenizer.decode(odd_prompt) and odd.cot in tokenizer.decode(odd_target)


def test_warm_up_targets_end_with_the_eos_of_a_turn(checkpoint):
    name, folder = checkpoint
    model, problems = load(folder, None, None), load_problems("toy", "train", limit=2)
    tokenizer = model.tokenizer
    last = {
        "codellama": "</s>",
        "galactica": "</s>",
        "qwen2.5 base": "<|endoftext|>",
        "llama3.1-instruct": "<|eot_id|>",
    }.get(name, "<|im_end|>")
    assert (turn_end(model) is not None) == (name in CHAT)
    for problem, (_, target) in zip(problems, encode_examples(problems, model, warmup.Config()), strict=True):
        assert tokenizer.convert_ids_to_tokens(target[-1]) == last and target[-1] in model.eos_ids
        answer = f"\\boxed{{{problem.answer}}}" if name in CHAT else problem.answer  # as the system prompt asks
        assert tokenizer.decode(target[:-1]).strip(" ") == make_target(replace(problem, answer=answer))


def test_evaluate_takes_the_style_of_the_run(data, tmp_path, monkeypatch):
    folder = make_checkpoint("qwen3", tmp_path / "qwen3")
    styles = []
    real = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: styles.append(args[2].prompt_style) or real(*args))
    test_data = {name: data[name] for name in ("task", "test_data")}
    config = evaluate.Config(runs=(str(folder),), out=str(tmp_path), test_limit=2, max_new_tokens=4, **test_data)
    evaluate.main(config)
    (folder / "run.json").write_text(json.dumps({"task": "gsm8k", "prompt_style": "reft"}))
    evaluate.main(config)
    evaluate.main(replace(config, prompt_style="chat"))
    assert styles == ["auto", "reft", "chat"]


# ---- several EOS ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAT)
def test_every_eos_id_ends_a_completion_and_the_sampled_one_gets_the_gradient(name, tmp_path):
    model = load(make_checkpoint(name, tmp_path / name), None, "float64")
    eos_ids = model.eos_ids
    assert len(eos_ids) == 2
    prompt = model.tokenizer("1 + 1 = ", add_special_tokens=False).input_ids
    rollout = sample(model, [prompt], max_new_tokens=60, eos_id=eos_ids, pad_id=eos_ids[0], num_samples=200)
    rows, last = torch.arange(200), rollout.lengths - 1
    ends = rollout.tokens[rows, last]
    for eos in eos_ids:
        ended = (ends == eos).nonzero()[:, 0]
        assert len(ended) > 0 and rollout.finished[ended].all()
        row = ended[:1]
        tokens, mask = rollout.tokens[row], rollout.action_mask[row]
        assert mask[0, last[row] - 1] and not mask[0, last[row] :].any()  # it is the last action
        assert not torch.isin(tokens[0, len(prompt) : last[row]], torch.tensor(eos_ids)).any()  # and the first EOS
        logp, _ = rl.action_stats(model, tokens, mask)
        logp.retain_grad()
        loss = rl.policy_loss(logp, logp.detach(), logp.detach(), mask.double(), mask, 0.2, "none", 2.0, 1)
        loss.backward()
        assert logp.grad[0, last[row] - 1] == -1
        hidden = model(tokens)[0, last[row] - 1]
        expected = model.logits(hidden).log_softmax(-1)[0, eos]  # the one that was sampled, not its neighbour
        assert logp[0, last[row] - 1].item() == pytest.approx(expected.item(), abs=1e-9)
    assert (rollout.lengths[~rollout.finished] == len(prompt) + 60).all()
