"""model.py against transformers, the cache against no cache, checkpoints that cannot be used."""

import json
import shutil

import pytest
import torch
from families import CONFIGS, random_hf_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

from model import Decoder, load, measure_layers, nested_kl, sample_skip, skip_pool
from reward import InputError

MASKS = {"none": (), "inner": (1, 2), "first": (0,), "last": (3,), "first and last": (0, 3)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50}


def skip_of(layers):
    return torch.tensor([layer in layers for layer in range(4)])


def tokens_of(rows=3, columns=20):
    return torch.randint(0, 97, (rows, columns), generator=torch.Generator().manual_seed(1))


def logits_of(decoder, tokens=None, skip=None):
    with torch.no_grad():
        return decoder.logits(decoder(tokens_of() if tokens is None else tokens, skip))


def hf_logits(hf):
    with torch.no_grad():
        return hf(tokens_of(), use_cache=False).logits


def is_close(x, expected, tolerance=1e-4):
    return (x - expected).abs().max() < tolerance


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same weights as a transformers model and as ours."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = random_hf_model(request.param)
    hf.save_pretrained(folder)
    return hf, Decoder.from_pretrained(folder)


# ---- the layers ----------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_transformers_also_right_padded_and_row_by_row(pair):
    hf, decoder = pair
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, 7:] = mask[1, 13:] = 0
    expected = hf(tokens_of(), attention_mask=mask).logits
    logits = logits_of(decoder)
    assert is_close(logits[mask.bool()], expected[mask.bool()])
    for row, tokens in enumerate(tokens_of()):
        assert is_close(logits_of(decoder, tokens[None, :11])[0], logits[row, :11])


@pytest.mark.parametrize("layers", MASKS.values(), ids=MASKS)
def test_masked_forward_equals_transformers_without_those_layers(pair, layers, monkeypatch):
    hf, decoder = pair
    modules = getattr(hf.model, "decoder", hf.model)._modules
    kept = [layer for i, layer in enumerate(modules["layers"]) if i not in layers]
    monkeypatch.setitem(modules, "layers", torch.nn.ModuleList(kept))
    assert is_close(logits_of(decoder, skip=skip_of(layers)), hf_logits(hf))


@torch.no_grad()
@pytest.mark.parametrize("layers", MASKS.values(), ids=MASKS)
def test_cached_equals_uncached_at_ragged_positions(pair, layers):
    _, decoder = pair
    tokens, skip = tokens_of(), skip_of(layers)
    expected = decoder(tokens, skip)
    cache = decoder.new_cache(3, 20, skip)
    assert len(cache) == 4 - len(layers)  # a skipped layer owns no cache
    assert is_close(decoder(tokens[:, :7], skip, cache), expected[:, :7])
    position = torch.tensor([[3], [5], [7]])  # what the prefill wrote behind them is overwritten
    for _ in range(13):
        hidden = decoder(tokens.gather(1, position), skip, cache, position)[:, 0]
        assert is_close(hidden, expected[torch.arange(3), position[:, 0]])
        position = position + 1


@torch.no_grad()
def test_the_cache_under_autocast_gives_what_no_cache_gives(pair, monkeypatch):
    _, decoder = pair
    monkeypatch.setattr(decoder, "autocast", True)
    cache = decoder.new_cache(3, 20)
    assert cache.dtype == torch.bfloat16
    decoder(tokens_of()[:, :19], None, cache)
    hidden = decoder(tokens_of()[:, 19:], None, cache, torch.full((3, 1), 19))
    assert is_close(hidden, decoder(tokens_of())[:, 19:], 0.15)  # bf16 has three digits


def test_autocast_leaves_logits_and_values_in_fp32_and_float64_stays_float64():
    decoder = Decoder(CONFIGS["qwen2"]())
    full = logits_of(decoder)
    decoder.autocast = True
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(decoder)
    assert logits.dtype == decoder.values(decoder(tokens_of())).dtype == torch.float32
    assert 0 < (logits - full).abs().max() < 0.3
    assert logits_of(Decoder(CONFIGS["llama3"]()).double()).dtype == torch.float64


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_every_weight_but_those_of_skipped_layers(checkpointing):
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.gradient_checkpointing = checkpointing
    decoder.logits(decoder(tokens_of(), skip_of([1]))).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        is_used = not name.startswith(("layers.1.", "value_head"))
        assert (parameter.grad is not None and parameter.grad.any().item()) == is_used, name


def test_a_new_decoder_has_residual_outputs_shrunk_by_sqrt_2_layers_no_biases_and_no_critic():
    sizes = SMALL | {"hidden_size": 256, "num_hidden_layers": 8}
    decoder = Decoder(LlamaConfig(**sizes, attention_bias=True, initializer_range=0.3))
    attention = decoder.layers[3].attention
    assert attention.qkv.weight.std().item() == pytest.approx(0.3, rel=0.02)
    for residual in (attention.out, decoder.layers[3].mlp.down):
        assert residual.weight.std().item() == pytest.approx(0.3 / 4, rel=0.02)
    assert not attention.qkv.bias.any() and not decoder.values(torch.ones(256)).any()


# ---- eq. (2) -------------------------------------------------------------------------------------


def test_sample_skip_is_uniform_among_inner_layers():
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([sample_skip(8, 0.25, generator) for _ in range(3000)])
    assert (masks.sum(1) == 2).all()
    assert not masks[:, 0].any() and not masks[:, 7].any()
    assert is_close(masks[:, 1:7].double().mean(0), 1 / 3, 0.04)
    assert not sample_skip(8, 0.0).any()


@pytest.mark.parametrize("ratio", [0.75, 1.0, -0.5, 0.05])
def test_sample_skip_refuses_every_inner_layer_or_none_where_some_was_asked_for(ratio):
    with pytest.raises(InputError, match=r"take 0, or 0.125 \(one layer\) to 0.625"):
        sample_skip(8, ratio)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_model_without_two_inner_layers_can_skip_none(num_layers):
    assert not sample_skip(num_layers, 0).any()
    with pytest.raises(InputError, match=f"of {num_layers} layers: take 0, since"):
        sample_skip(num_layers, 0.5)


def test_cheap_layers_are_twice_as_many_as_are_skipped_and_cost_least():
    model = Decoder(LlamaConfig(**SMALL | {"num_hidden_layers": 8}))
    assert skip_pool(model, 2, "inner") == skip_pool(model, 0, "cheap") == [1, 2, 3, 4, 5, 6]
    model.hf_config.layer_kl = [0.0, 0.3, 0.1, 8.0, 0.2, 0.4, 9.0, 0.0]
    assert skip_pool(model, 1, "cheap") == [2, 4] and skip_pool(model, 2, "cheap") == [2, 4, 1, 5]
    assert skip_pool(model, 2, "5,3") == [5, 3]
    masks = [sample_skip(8, 0.125, pool=[2, 4]) for _ in range(60)]
    assert {mask.nonzero().item() for mask in masks} == {2, 4}
    for wrong in ("0,2", "1,1", "1,7"):
        with pytest.raises(InputError, match="different numbers from 1 to 6"):
            skip_pool(model, 1, wrong)


@pytest.mark.parametrize("carried", [None, [0.1], "x", {"a": 1}, [0.1, 0.2, 0.3, float("nan")]])
def test_layers_are_measured_once_and_again_where_the_config_carries_no_number_for_each(carried):
    model = Decoder(CONFIGS["qwen2"]())
    model.hf_config.layer_kl = carried
    measure_layers(model, [([1, 2], [3, 4])], "identity")
    measured = model.hf_config.layer_kl
    assert measured[2] == nested_kl(model, [([1, 2], [3, 4])], skip_of([2])[None]).item() > 0
    measure_layers(model, [([5], [6])], "identity")
    assert model.hf_config.layer_kl == measured and len(measured) == 4


# ---- checkpoints that are read -------------------------------------------------------------------


def test_saved_directory_opens_in_transformers_with_the_same_logits(pair, tmp_path):
    hf, decoder = pair
    decoder.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(hf) and torch.equal(hf_logits(again), hf_logits(hf))
    assert not list(tmp_path.glob("value_head*.safetensors"))  # servers load every such file
    config = json.loads((tmp_path / "config.json").read_text())
    rope = decoder.config.rope or {"rope_theta": None}
    assert config.get("rope_theta") == rope["rope_theta"]  # for readers older than transformers 5
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1  # whoever may read one file may read them all


def changed_checkpoint(folder, family, change):
    """A random checkpoint whose weights were changed."""
    random_hf_model(family).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "config", [{"hidden_act": "swish"}, {"_attn_implementation": "flash_attention_2"}], ids=str
)
def test_configs_that_mean_the_same_are_read_and_saved(config, tmp_path):
    hf = random_hf_model("codellama")
    hf.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    decoder = Decoder.from_pretrained(tmp_path)
    assert is_close(logits_of(decoder), hf_logits(hf))
    decoder.save_pretrained(tmp_path / "again")


def test_value_head_survives_saving(tmp_path):
    decoder = Decoder(CONFIGS["qwen2"]())
    torch.nn.init.normal_(decoder.value_head.weight)
    hidden = decoder(tokens_of())
    decoder.save_pretrained(tmp_path)
    values = Decoder.from_pretrained(tmp_path).values(hidden)
    assert values.shape == (3, 20) and torch.equal(values, decoder.values(hidden))
    (tmp_path / "value_head.pt").unlink()
    assert (Decoder.from_pretrained(tmp_path).values(hidden) == 0).all()


def test_shards_in_bf16_are_read_as_fp32_and_saving_over_them_leaves_nothing_of_them(tmp_path):
    old = random_hf_model("llama3").to(torch.bfloat16)
    old.generation_config.eos_token_id = [5, 6]
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    old = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert is_close(logits_of(Decoder.from_pretrained(tmp_path)), hf_logits(old))
    new = Decoder(CONFIGS["qwen2"]())
    new.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(new))
    assert "eos_token_id" not in again.files.get("generation_config.json", b"").decode()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


# ---- checkpoints that are refused ----------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
BAD_CONFIGS = {
    "linear": LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "swash": LlamaConfig(**SMALL, hidden_act="swash"),
    "sliding": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "do_layer_norm": OPTConfig(**SMALL, word_embed_proj_dim=32, do_layer_norm_before=False),
    "word_embed_proj_dim": OPTConfig(**SMALL, word_embed_proj_dim=16),
}


@pytest.mark.parametrize("feature", BAD_CONFIGS)
def test_a_config_feature_that_would_be_ignored_is_refused(feature):
    with pytest.raises(InputError, match=feature):
        Decoder(BAD_CONFIGS[feature])


@pytest.mark.parametrize("model_type", ["gpt2", "foobar"])  # transformers knows only one of them
def test_unknown_architecture_names_the_supported_ones(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match=rf"{model_type}.*llama, qwen2, qwen3, opt"):
        Decoder.from_pretrained(tmp_path)


LOST = json.dumps({"metadata": {}, "weight_map": {"a": "gone.safetensors"}})


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("config.json", "{", r"config\.json: cannot"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', r"config\.json: cannot"),
        ("config.json", '{"model_type": "llama", "head_dim": -1}', r"config\.json: cannot"),
        ("model.safetensors", "not safetensors", r"model\.safetensors"),
        ("model.safetensors.index.json", LOST, r"gone\.safetensors"),
        ("value_head.pt", "not torch", r"value_head\.pt: cannot"),
        ("tokenizer.json", "{}", r"tokenizer\.json"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: cannot"),
        ("generation_config.json", "{", r"generation_config\.json: cannot"),
        ("generation_config.json", "[]", r"generation_config\.json: cannot"),
    ],
)
def test_a_broken_file_is_named(file, text, named, toy_run, tmp_path):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=named):
        load(folder, None, None)


UP = "model.layers.2.mlp.up_proj.weight"
WRONG_WEIGHTS = {
    f"missing.*{UP}": lambda weights: weights.pop(UP),
    rf"{UP}.*\[3, 3\].*\[48, 32\]": lambda weights: weights.update({UP: torch.zeros(3, 3)}),
    "unexpected.*up_proj.bias": lambda weights: weights.update({UP[:-6] + "bias": torch.ones(48)}),
    "unexpected.*'module.lm_head": lambda weights: [
        weights.update({f"module.{name}": weights.pop(name)}) for name in list(weights)
    ],
    "nan or infinite": lambda weights: weights[UP].fill_(torch.nan),
}


@pytest.mark.parametrize("message", WRONG_WEIGHTS)
def test_missing_misshapen_foreign_and_nan_weights_are_named(message, tmp_path):
    changed_checkpoint(tmp_path, "codellama", WRONG_WEIGHTS[message])
    with pytest.raises(InputError, match=message):
        Decoder.from_pretrained(tmp_path)


HEADS = {
    "a head alone": lambda weights: {"lm_head.weight": weights.pop("model.embed_tokens.weight")},
    "a copy": lambda weights: {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    "another": lambda weights: {"lm_head.weight": weights["model.embed_tokens.weight"] + 1},
}


@pytest.mark.parametrize("head", HEADS)
def test_a_tied_checkpoint_holds_its_matrix_once_or_twice_but_no_other_head(head, tmp_path):
    changed_checkpoint(tmp_path, "qwen2", lambda weights: weights.update(HEADS[head](weights)))
    if head == "another":
        with pytest.raises(InputError, match="tie_word_embeddings"):
            Decoder.from_pretrained(tmp_path)
    else:
        expected = hf_logits(random_hf_model("qwen2"))
        assert is_close(logits_of(Decoder.from_pretrained(tmp_path)), expected)
