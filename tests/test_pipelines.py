"""Whole pipelines on small random checkpoints with the features of the models people train."""

import json
from dataclasses import replace
from typing import NamedTuple

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
from reward import Problem, load_problems, make_prompt, make_target
from rollout import SYSTEM_PROMPTS, encode_prompts, sample, turn_end

SIZE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
WIDE = {"intermediate_size": 48, "initializer_range": 0.2}
GALACTICA = {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
    "activation_function": "gelu",
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "dropout": 0.1,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CODELLAMA_ROPE = {"rope_type": "default", "rope_theta": 1e6}
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class Checkpoint(NamedTuple):
    """A kind of model: the class of its config and its features, the tokens that end a text."""

    config: type
    features: dict
    eos: list[str]  # of generation_config; warm-up targets end with the first
    special: list[str] | None = None  # tokens of the tokenizer; None: CodeLlama's pieces
    tokenizer: dict = {}  # what it knows of them
    is_chat: bool = False


QWEN = {**WIDE, "num_key_value_heads": 2, "tie_word_embeddings": True}
LLAMA3 = {**WIDE, "num_key_value_heads": 1, "rope_parameters": LLAMA31_ROPE}
QWEN_ENDS = ["<|im_end|>", "<|endoftext|>"]
QWEN_CHAT = {"eos_token": "<|im_end|>", "chat_template": CHATML}
CHECKPOINTS = {
    "codellama": Checkpoint(LlamaConfig, {**WIDE, "rope_parameters": CODELLAMA_ROPE}, ["</s>"]),
    "galactica": Checkpoint(OPTConfig, GALACTICA, ["</s>"], ["<s>", "</s>", "[START_REF]"]),
    "qwen2.5-instruct": Checkpoint(Qwen2Config, QWEN, QWEN_ENDS, QWEN_TOKENS, QWEN_CHAT, True),
    "qwen3": Checkpoint(
        Qwen3Config,
        {**QWEN, "head_dim": 16},
        QWEN_ENDS,
        [*QWEN_TOKENS, "<think>", "</think>"],
        QWEN_CHAT,
        True,
    ),
    "llama3.1-instruct": Checkpoint(
        LlamaConfig,
        LLAMA3,
        ["<|end_of_text|>", "<|eot_id|>"],
        LLAMA3_TOKENS,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "chat_template": LLAMA3_CHAT,
        },
        True,
    ),
}
CHATS = [name for name, checkpoint in CHECKPOINTS.items() if checkpoint.is_chat]


def train_bpe(bpe, vocab_size, **options):
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    problems = load_problems("toy", "train", limit=50)
    bpe.train_from_iterator(map(make_prompt, problems), trainer)


def codellama_tokenizer():
    """As many pieces as the embedding has rows, <FILL_ME> beyond them; a space before a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    train_bpe(bpe, SIZE["vocab_size"], special_tokens=pieces)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = CodeLlamaTokenizer(vocab=trained["vocab"], merges=merges)
    assert tokenizer.vocab_size == SIZE["vocab_size"] < len(tokenizer)
    return tokenizer


def byte_tokenizer(special, known):
    """Byte-level BPE of 300 tokens; the BOS that it knows is put in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train_bpe(bpe, 300, special_tokens=special, initial_alphabet=alphabet)
    bos = known.get("bos_token")
    if bos:
        front = [(bos, bpe.token_to_id(bos))]
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=front)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **known)


def make_checkpoint(name, folder):
    """A random checkpoint as the hub has it: bf16, in several safetensors files."""
    kind = CHECKPOINTS[name]
    tokenizer = codellama_tokenizer()
    if kind.special is not None:
        tokenizer = byte_tokenizer(kind.special, kind.tokenizer)
    eos_ids = tokenizer.convert_tokens_to_ids(kind.eos)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos_ids, "pad_token_id": None}
    config = kind.config(**SIZE, **kind.features, **ids)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hf.generation_config.eos_token_id = eos_ids
    hf.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """What a checkpoint is, and its folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return CHECKPOINTS[request.param], make_checkpoint(request.param, folder)


# ---- all stages ----------------------------------------------------------------------------------


def test_the_pipeline_ends_in_a_directory_that_transformers_opens_with_equal_logits(
    checkpoint, tmp_path
):
    _, source = checkpoint
    warm, reinforced = tmp_path / "warmup", tmp_path / "rl"
    few = {"task": "toy", "limit": 12, "test_limit": 12, "max_new_tokens": 8}
    short = {"steps": 2, "lr": 1e-3, "dtype": "float32", **few}
    warmup.main(warmup.Config(model=str(source), out=str(warm), batch=4, **short))
    sizes = {"rollout_batch": 4, "minibatch": 4, "samples": 2, "skip_ratio": 0.25}
    rl.main(rl.Config(model=str(warm), out=str(reinforced), **sizes, **short))
    (result,) = evaluate.main(evaluate.Config(runs=(str(reinforced),), samples=2, test_limit=12))
    assert result["problems"] == 12

    decoder = load(reinforced, None, None)
    hf = AutoModelForCausalLM.from_pretrained(reinforced)
    tokens = torch.arange(256)[None]
    with torch.no_grad():
        gap = decoder.logits(decoder(tokens)) - hf(tokens).logits
    assert gap.abs().max() < 1e-4

    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, reinforced)]
    changed = {name for name in configs[0] if configs[0][name] != configs[1].get(name)}
    assert changed <= {"transformers_version", "dtype"}  # rope, heads, biases: all as before
    assert load(source, None, None).eos_ids == decoder.eos_ids
    copied = {name for name in COPIED if (source / name).exists()}
    copied.remove("tokenizer_config.json")  # which older readers have to understand
    assert "tokenizer.json" in copied
    for name in copied:
        assert (reinforced / name).read_bytes() == (source / name).read_bytes()
    again, first = [AutoTokenizer.from_pretrained(folder) for folder in (reinforced, source)]
    assert again("1 + 1 = 2").input_ids == first("1 + 1 = 2").input_ids
    assert again.chat_template == first.chat_template


# ---- prompts and targets -------------------------------------------------------------------------


def test_chat_models_read_a_chat_and_base_models_refts_prompt_unless_prompt_style_says_otherwise(
    checkpoint,
):
    kind, folder = checkpoint
    model, problems = load(folder, None, None), load_problems("toy", "test", limit=3)
    bos = model.tokenizer.bos_token

    def texts(**flags):
        prompts = encode_prompts(problems, model, warmup.Config(**flags))
        decoded = model.tokenizer.batch_decode(prompts)
        if bos:
            assert [text.count(bos) for text in decoded] == [1] * 3
            decoded = [text.removeprefix(bos) for text in decoded]
        return [text.strip(" ") for text in decoded]

    expected = [make_prompt(problem) for problem in problems]
    assert texts(prompt_style="reft") == expected
    if not kind.is_chat:
        assert texts() == expected
        return
    assert texts() == texts(prompt_style="chat")
    for problem, text in zip(problems, texts(), strict=True):
        assert SYSTEM_PROMPTS["nl"] in text and problem.question in text
        assert text.endswith(("assistant\n", "assistant<|end_header_id|>\n\n"))


def test_control_tokens_that_a_problem_spells_stay_text(checkpoint):
    """In ReFT's prompt, in a chat and in a target; CodeLlama's <FILL_ME> has no embedding."""
    kind, folder = checkpoint
    model = load(folder, None, None)
    special = model.tokenizer.added_tokens_decoder
    spelled = " ".join(str(token) for token in special.values() if "▁" not in str(token))
    assert len(spelled) > 3
    texts = [(f"How many {words}?", f"There are {words}.") for words in ("x", spelled)]
    problems = [Problem(question, cot, "2") for question, cot in texts]
    for style in ("reft", "chat") if kind.is_chat else ("reft",):
        config = warmup.Config(prompt_style=style)
        plain, odd = warmup.encode_examples(problems, model, config)
        for plain_ids, ids, text in zip(plain, odd, texts[1], strict=True):
            assert [i for i in ids if i in special] == [i for i in plain_ids if i in special]
            assert text in model.tokenizer.decode(ids)
            assert max(ids) < model.config.vocab_size
        assert odd[1][-1] in model.eos_ids


def test_warm_up_targets_end_with_the_eos_of_a_turn(checkpoint):
    kind, folder = checkpoint
    model, problems = load(folder, None, None), load_problems("toy", "train", limit=2)
    tokenizer = model.tokenizer
    assert (turn_end(model) is not None) == kind.is_chat
    last = tokenizer.eos_token if kind.is_chat else kind.eos[0]
    examples = warmup.encode_examples(problems, model, warmup.Config())
    for problem, (_, target) in zip(problems, examples, strict=True):
        assert tokenizer.convert_ids_to_tokens(target[-1]) == last
        assert target[-1] in model.eos_ids
        if kind.is_chat:  # as the system prompt asks
            problem = replace(problem, answer=f"\\boxed{{{problem.answer}}}")
        assert tokenizer.decode(target[:-1]).strip(" ") == make_target(problem)


@pytest.mark.parametrize("name", CHATS)
def test_every_eos_id_ends_a_completion(name, tmp_path):
    model = load(make_checkpoint(name, tmp_path), None, "float64")
    (prompt,) = model.encode(["1 + 1 = "])
    flags = {"eos_id": model.eos_ids, "pad_id": model.eos_ids[0], "num_samples": 200}
    rollout = sample(model, [prompt], max_new_tokens=60, **flags)
    ends = set()
    for (_, completion), is_finished in zip(rollout.pairs(), rollout.finished, strict=True):
        *body, end = completion
        assert not set(body) & set(model.eos_ids)
        assert (end in model.eos_ids) == is_finished
        assert is_finished or len(completion) == 60
        ends.add(end)
    assert set(model.eos_ids) <= ends and len(model.eos_ids) == 2
