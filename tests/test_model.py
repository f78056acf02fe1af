"""model.py against transformers, and the cache against no cache."""

import json
import shutil

import pytest
import torch
from families import CONFIGS, random_hf_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

from model import Decoder, load, sample_skip
from reward import InputError

MASKS = {"none": (), "inner": (1, 2), "first": (0,), "last": (3,), "first and last": (0, 3)}


def skip_of(layers) -> torch.Tensor:
    skip = torch.zeros(4, dtype=torch.bool)
    skip[list(layers)] = True
    return skip


def tokens_of(rows: int = 3, columns: int = 20) -> torch.Tensor:
    return torch.randint(0, 97, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same weights as a transformers model and as ours."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = random_hf_model(request.param)
    hf.save_pretrained(folder)
    return hf, Decoder.from_pretrained(folder)


@torch.no_grad()
def test_logits_equal_transformers_also_right_padded(pair):
    hf, decoder = pair
    tokens, mask = tokens_of(), torch.ones(3, 20, dtype=torch.int64)
    mask[0, 7:] = mask[1, 13:] = 0
    expected = hf(tokens, attention_mask=mask).logits
    logits = decoder.logits(decoder(tokens))
    assert (logits - expected)[mask.bool()].abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layers", MASKS.values(), ids=MASKS)
def test_masked_forward_equals_transformers_without_those_layers(pair, layers):
    hf, decoder = pair
    body = getattr(hf.model, "decoder", hf.model)
    all_layers = body.layers
    try:
        body.layers = torch.nn.ModuleList(layer for i, layer in enumerate(all_layers) if i not in layers)
        expected = hf(tokens_of(), use_cache=False).logits
    finally:
        body.layers = all_layers
    assert (decoder.logits(decoder(tokens_of(), skip_of(layers))) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layers", MASKS.values(), ids=MASKS)
def test_cached_equals_uncached_at_ragged_positions(pair, layers):
    _, decoder = pair
    tokens, skip = tokens_of(), skip_of(layers)
    expected = decoder(tokens, skip)
    cache = decoder.new_cache(3, 20, skip)
    assert len(cache) == 4 - len(layers)  # a skipped layer owns no cache
    assert (decoder(tokens[:, :7], skip, cache) - expected[:, :7]).abs().max() < 1e-4
    position = torch.tensor([3, 5, 7])  # rows stand at different columns; what the prefill wrote there is overwritten
    for _ in range(13):
        hidden = decoder(tokens.gather(1, position[:, None]), skip, cache, position[:, None])[:, 0]
        assert (hidden - expected[torch.arange(3), position]).abs().max() < 1e-4
        position = position + 1


@torch.no_grad()
def test_batch_equals_its_rows_one_by_one(pair):
    _, decoder = pair
    together = decoder(tokens_of())
    for row, tokens in enumerate(tokens_of()):
        assert (decoder(tokens[None, :11])[0] - together[row, :11]).abs().max() < 1e-4


@torch.no_grad()
def test_saved_directory_opens_in_transformers_with_the_same_logits(pair, tmp_path):
    hf, decoder = pair
    decoder.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(hf)
    assert torch.equal(again(tokens_of()).logits, hf(tokens_of()).logits)
    assert not list(tmp_path.glob("value_head*.safetensors"))  # inference servers load every such file
    config = json.loads((tmp_path / "config.json").read_text())
    if decoder.config.rope is not None:
        assert config["rope_theta"] == decoder.config.rope["rope_theta"]  # for readers older than transformers 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama3", "qwen2", "galactica"])
def test_sharded_and_bf16_checkpoints_load(family, tmp_path):
    hf = random_hf_model(family).to(torch.bfloat16)
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    decoder = Decoder.from_pretrained(tmp_path)
    assert decoder.embed.weight.dtype == torch.float32  # master weights
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens_of()).logits
    assert (decoder.logits(decoder(tokens_of())) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_pytorch_bin_without_the_model_prefix_loads(tmp_path):
    hf = random_hf_model("opt")
    hf.config.save_pretrained(tmp_path)
    weights = {k.removeprefix("model."): v for k, v in hf.state_dict().items() if k != "lm_head.weight"}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    decoder = Decoder.from_pretrained(tmp_path)
    assert (decoder.logits(decoder(tokens_of())) - hf(tokens_of()).logits).abs().max() < 1e-4


def test_value_head_starts_at_zero_and_survives_saving(tmp_path):
    decoder = Decoder(CONFIGS["qwen2"]())
    hidden = decoder(tokens_of())
    assert (decoder.values(hidden) == 0).all() and decoder.values(hidden).shape == (3, 20)
    decoder.save_pretrained(tmp_path / "zero")
    assert (Decoder.from_pretrained(tmp_path / "zero").values(hidden) == 0).all()
    torch.nn.init.normal_(decoder.value_head.weight)
    decoder.save_pretrained(tmp_path / "normal")
    assert torch.equal(Decoder.from_pretrained(tmp_path / "normal").values(hidden), decoder.values(hidden))


def test_autocast_leaves_logits_and_values_in_fp32():
    decoder = Decoder(CONFIGS["qwen2"]())
    full = decoder.logits(decoder(tokens_of()))
    decoder.autocast = True
    hidden = decoder(tokens_of())
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder.logits(hidden).dtype == decoder.values(hidden).dtype == torch.float32
    assert 0 < (decoder.logits(hidden) - full).abs().max() < 0.3


def test_float64_stays_float64():
    decoder = Decoder(CONFIGS["llama3"]()).double()
    assert decoder.logits(decoder(tokens_of())).dtype == torch.float64


def test_gradient_reaches_every_weight_but_those_of_skipped_layers():
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.logits(decoder(tokens_of(), skip_of((1,)))).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        used = not name.startswith(("layers.1.", "value_head"))
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == used, name


def test_sample_skip_is_uniform_among_inner_layers():
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([sample_skip(8, 0.25, generator) for _ in range(3000)])
    assert (masks.sum(1) == 2).all()
    assert not masks[:, 0].any() and not masks[:, 7].any()
    assert (masks[:, 1:7].double().mean(0) - 1 / 3).abs().max() < 0.04
    assert not sample_skip(8, 0.0).any()


@pytest.mark.parametrize("ratio", [0.75, 1.0, -0.5, 0.05])
def test_sample_skip_refuses_to_skip_every_inner_layer_or_none_where_some_was_asked_for(ratio):
    with pytest.raises(InputError, match=r"take 0, or 0.125 \(one layer\) to 0.625"):
        sample_skip(8, ratio)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
BAD_CONFIGS = {
    "unknown rope type": (
        lambda: LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0}),
        "linear",
    ),
    "sliding window": (lambda: Qwen2Config(**SMALL, **SLIDING), "sliding"),
    "post-norm OPT": (lambda: OPTConfig(**SMALL, word_embed_proj_dim=32, do_layer_norm_before=False), "do_layer_norm"),
    "projected OPT": (lambda: OPTConfig(**SMALL, word_embed_proj_dim=16), "word_embed_proj_dim"),
    "activation": (lambda: LlamaConfig(**SMALL, hidden_act="swash"), "swash"),
}


@pytest.mark.parametrize(("make", "named"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_feature_that_would_be_ignored_is_refused(make, named):
    with pytest.raises(InputError, match=named):
        Decoder(make())


@pytest.mark.parametrize("model_type", ["gpt2", "foobar"])  # transformers knows one and not the other
def test_unknown_architecture_names_the_supported_ones(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match=rf"{model_type}.*llama, qwen2, qwen3, opt"):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", json.dumps({"model_type": "llama", "hidden_size": "wide"})),
        ("model.safetensors", "not safetensors"),
        ("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {"a": "gone.safetensors"}})),
        ("value_head.pt", "not torch"),
        ("tokenizer.json", "{"),
    ],
)
def test_a_broken_file_is_named(file, text, toy_run, tmp_path):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=r"gone\.safetensors" if "index" in file else file.replace(".", r"\.")):
        load(folder, None, None)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    Decoder(CONFIGS["qwen2"]()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        load(tmp_path, None, None)


def test_a_head_that_is_said_to_be_tied_and_is_not_is_refused(tmp_path):
    Decoder(CONFIGS["qwen2"]()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    Decoder.from_pretrained(tmp_path)  # a copy of the embedding is no contradiction
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings"):
        Decoder.from_pretrained(tmp_path)


@torch.no_grad()
def test_saving_over_an_older_checkpoint_leaves_nothing_of_it(tmp_path):
    old = random_hf_model("llama3")
    old.generation_config.eos_token_id = [5, 6]
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert torch.equal(again.logits(again(tokens_of())), decoder.logits(decoder(tokens_of())))
    assert not json.loads(again.files.get("generation_config.json", b"{}")).get("eos_token_id")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@torch.no_grad()
def test_the_cache_under_autocast_gives_what_no_cache_gives(pair):
    _, decoder = pair
    decoder.autocast = True
    try:
        expected = decoder(tokens_of())
        cache = decoder.new_cache(3, 20)
        assert cache.dtype == torch.bfloat16
        steps = [decoder(tokens_of()[:, :7], None, cache)]
        for t in range(7, 20):
            steps.append(decoder(tokens_of()[:, t : t + 1], None, cache, torch.full((3, 1), t)))
        assert (torch.cat(steps, 1) - expected).abs().max() < 0.15  # bf16: three digits, of values of order 1
    finally:
        decoder.autocast = False


def broken_checkpoint(folder, change):
    random_hf_model("codellama").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_missing_misshapen_and_foreign_weights_are_named(tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"missing.*{name}"):
        Decoder.from_pretrained(broken_checkpoint(tmp_path / "a", lambda w: w.pop(name)))
    with pytest.raises(InputError, match=rf"{name}.*\[3, 3\].*\[48, 32\]"):
        Decoder.from_pretrained(broken_checkpoint(tmp_path / "b", lambda w: w.update({name: torch.zeros(3, 3)})))
    with pytest.raises(InputError, match=r"up_proj.bias"):
        foreign = name.replace("weight", "bias")
        Decoder.from_pretrained(broken_checkpoint(tmp_path / "c", lambda w: w.update({foreign: torch.zeros(48)})))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([5, 6], 7, [5, 6, 7]), (None, [7, 7], [7]), ([], None, [1]), (None, None, [1])],
    ids=str,
)
def test_eos_ids_of_both_configs_are_one_set_else_the_tokenizer_has_one(
    generation, config, expected, toy_run, tmp_path
):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    for file, eos in (("generation_config.json", generation), ("config.json", config)):
        text = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(text | {"eos_token_id": eos}))
    decoder = load(folder, None, None)
    assert decoder.eos_ids == expected
    decoder.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again", None, None).eos_ids == expected
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()  # older readers open it too


def test_a_vocabulary_larger_than_the_embedding_is_refused(toy_run, tmp_path):
    Decoder(CONFIGS["qwen2"]()).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy_run / file, tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        load(tmp_path, None, None)


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


CRITIC = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
SCALES = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("k_scale", "v_scale", "k_proj.k_scale")}
QUIRKS = {  # what is done to the weights, to the config, and beside them
    "another name of silu": ({}, {"hidden_act": "swish"}, None),
    "a rope that stretches by 1": (
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e6}},
        None,
    ),
    "scales of a quantized cache": (SCALES, {}, None),
    "a whole file beside a stale index": ({}, {}, ("model.safetensors.index.json", '{"weight_map": {"a": "gone"}}')),
    "the value head of TRL": (CRITIC, {}, None),
}


@torch.no_grad()
@pytest.mark.parametrize("quirk", QUIRKS)
def test_checkpoints_that_transformers_opens_are_read(quirk, tmp_path):
    more, config, file = QUIRKS[quirk]
    broken_checkpoint(tmp_path, lambda weights: weights.update(more))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens_of()).logits
    with_config(tmp_path, **config)
    if file:
        (tmp_path / file[0]).write_text(file[1])
    decoder = Decoder.from_pretrained(tmp_path)
    assert (decoder.logits(decoder(tokens_of())) - expected).abs().max() < 1e-4
    assert decoder.values(torch.ones(32)) == (33 if more is CRITIC else 0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_a_tied_checkpoint_may_hold_the_head_alone(family, tmp_path):
    hf = random_hf_model(family)
    hf.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop(next(name for name in weights if "embed_tokens" in name))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    decoder = Decoder.from_pretrained(tmp_path)
    assert (decoder.logits(decoder(tokens_of())) - hf(tokens_of()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_weights_are_named_as_they_are_in_the_file(prefix, tmp_path):
    def rename(weights):
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    with pytest.raises(InputError, match=f"unexpected.*'{prefix}lm_head.weight'"):
        Decoder.from_pretrained(broken_checkpoint(tmp_path, rename))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_named_as_one(file, toy_run, tmp_path):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(InputError, match=f"{file}: a Git LFS pointer"):
        load(folder, None, None)


def test_an_adapter_is_to_be_merged_first(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="LoRA adapter; merge"):
        load(tmp_path, None, None)


def test_a_tokenizer_of_pieces_names_the_package_that_it_needs(toy_run, tmp_path):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(InputError, match=r"tokenizer\.model, .*sentencepiece"):
        load(folder, None, None)


def test_code_of_a_checkpoint_is_refused_without_a_question_on_the_terminal(toy_run, tmp_path, monkeypatch):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    code = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "n")
    with pytest.raises(InputError, match="tokenizer"):
        load(folder, None, None)
    assert not asked


@pytest.mark.parametrize("ids", [400, -1, [1, 400], "1", {}, [None], 1.5, True], ids=str)
def test_eos_ids_that_are_no_ids_of_the_embedding_are_refused(ids, toy_run, tmp_path):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(InputError, match="end-of-sequence"):
        load(folder, None, None)


def test_a_broken_generation_config_is_named(toy_run, tmp_path):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: cannot be read"):
        load(folder, None, None)


def test_what_is_saved_tells_no_local_path_and_speaks_as_transformers_4(toy_run, tmp_path):
    folder = shutil.copytree(toy_run, tmp_path / "source")
    file, marks = folder / "tokenizer_config.json", {"pad_token": "<pad>", "eos_token": "<eos>"}
    local = {"name_or_path": str(folder), "is_local": True, "local_files_only": False}
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<pad>"]}
    file.write_text(json.dumps(marks | local | newer))
    load(folder, None, None).save_pretrained(tmp_path / "run")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<pad>"]}
    assert json.loads((tmp_path / "run" / file.name).read_text()) == marks | kind
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "run").glob("*.json"))


def test_a_new_decoder_has_residual_outputs_shrunk_by_sqrt_2_layers_no_biases_and_no_critic():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, vocab_size=97
    )
    config.attention_bias, config.initializer_range = True, 0.3
    decoder = Decoder(config)
    for layer in decoder.layers:
        for weight, expected in ((layer.attention.qkv, 0.3), (layer.attention.out, 0.075), (layer.mlp.down, 0.075)):
            assert weight.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not layer.attention.qkv.bias.any() and (layer.mlp_norm.weight == 1).all()
    assert not decoder.value_head.weight.any() and not decoder.value_head.bias.any()
