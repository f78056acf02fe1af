"""Linear maps in place of skipped layers: least squares by other hands, and every path of them."""

from functools import partial

import pytest
import torch
from families import CONFIGS
from short_runs import reinforce, stop_in_step, train, warm
from soak import state
from test_distributed import assert_equal, launch, short_rl
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

import model as model_file
import warmup
from evaluate import read_metrics
from model import (
    Decoder,
    fit_maps,
    is_measured,
    load,
    measure_layers,
    nested_kl,
    read_json,
    sample_skip,
)
from reward import InputError
from rl import Config, batch_stats
from rollout import sample

EACH_ALONE = torch.eye(4) > 0
LINEAR = {"skip_with": "linear", "skip_ratio": 0.25, "skip_layers": "inner"}


def random_pairs(count=60):
    """(prompt, completion) pairs of random token ids, of several lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(50, (n,), generator=generator).tolist()

    return [(ids(3 + n % 3), ids(9 + n % 4)) for n in range(count)]


@pytest.fixture(params=CONFIGS)
def model(request):
    """A random decoder of four layers in float64 whose layers do something."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIGS[request.param]()).double()
    for parameter in decoder.layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.fixture
def mapped(model):
    """The same with its maps."""
    model.linear_maps = fit_maps(model, random_pairs())
    return model


@torch.no_grad()
def test_the_maps_are_ridge_regressions_of_what_each_layer_adds(model, monkeypatch):
    monkeypatch.setattr(model_file, "OUTLIER", float("inf"))
    pairs = random_pairs()
    maps = fit_maps(model, pairs)
    seen = {number: ([], []) for number in range(4)}

    def keep(number, layer, inputs, output):
        seen[number][0].append(inputs[0][0])  # (T, d)
        seen[number][1].append(output[0])  # (T, d)

    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(partial(keep, number))
    for prompt, completion in pairs:
        model(torch.tensor([prompt + completion]))
    for number in range(4):
        x, y = torch.cat(seen[number][0]), torch.cat(seen[number][1])  # (tokens, d) each
        u = torch.cat([maps.norm(x), torch.ones(len(x), 1)], 1)
        size = u.shape[1]
        ridge = (model_file.RIDGE * (u**2).sum() / size) ** 0.5 * torch.eye(size)
        # least squares with the ridge as rows of its own
        rows, targets = torch.cat([u, ridge]), torch.cat([y - x, torch.zeros(size, y.shape[1])])
        fit = torch.linalg.lstsq(rows, targets).solution
        torch.testing.assert_close(maps.weight[number], fit[:-1].T)
        torch.testing.assert_close(maps.bias[number], fit[-1])


def test_a_layer_that_is_linear_is_missed_by_nobody(monkeypatch):
    monkeypatch.setattr(model_file, "RIDGE", 1e-12)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "num_hidden_layers": 4}
    config = OPTConfig(vocab_size=50, word_embed_proj_dim=16, **sizes)
    decoder = Decoder(config).double()
    for layer in decoder.layers:
        layer.mlp.activation = nn.Identity()
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, std=0.3)
        nn.init.zeros_(layer.attention.out.weight)
    pairs = random_pairs()
    assert nested_kl(decoder, pairs[:4], EACH_ALONE).min() > 1e-3
    decoder.linear_maps = fit_maps(decoder, pairs)
    assert nested_kl(decoder, pairs[:4], EACH_ALONE).max() < 1e-12


def test_maps_come_nearer_to_pi_and_the_cost_of_each_layer_is_measured_with_them(
    model,
):
    pairs = random_pairs()
    identity = nested_kl(model, pairs[:16], EACH_ALONE)
    measure_layers(model, pairs, "linear")
    costs = torch.tensor(model.hf_config.layer_kl)
    torch.testing.assert_close(costs.double(), nested_kl(model, pairs[:16], EACH_ALONE))
    assert costs.mean() < 0.9 * identity.mean()


@torch.no_grad()
def test_rows_that_a_layer_moves_far_are_left_out_of_the_fit(model, monkeypatch):
    def push_first_token(layer, inputs, output):
        push = torch.zeros_like(output)
        push[:, 0] = 1e3 * (output - inputs[0]).abs().max()
        return output + push

    undisturbed = fit_maps(model, random_pairs())
    hook = model.layers[1].register_forward_hook(push_first_token)
    maps = fit_maps(model, random_pairs())
    hook.remove()
    monkeypatch.setattr(model_file, "OUTLIER", float("inf"))
    model.layers[1].register_forward_hook(push_first_token)
    pushed = fit_maps(model, random_pairs())
    length = [m.bias[1].norm() for m in (undisturbed, maps, pushed)]
    assert length[1] < 3 * length[0] and length[2] > 30 * length[0]


@torch.no_grad()
def test_log_mu_of_a_completion_equals_one_masked_pass_with_the_maps(mapped):
    skip = torch.tensor([False, True, False, False])
    prompts = [prompt for prompt, _ in random_pairs(12)]
    work = {"max_new_tokens": 12, "eos_id": list(range(5)), "pad_id": 0, "skip": skip}
    rollout = sample(mapped, prompts, **work, max_rows=5)
    hidden = mapped(rollout.tokens, skip)[:, :-1]
    logp = mapped.logits(hidden).log_softmax(-1).gather(-1, rollout.tokens[:, 1:, None])[..., 0]
    difference = (logp - rollout.logp_behav)[rollout.action_mask]
    assert difference.abs().max() < 1e-12
    mapped.linear_maps = None
    without = sample(mapped, prompts, **work)
    assert not torch.equal(rollout.tokens, without.tokens)


def test_nobody_s_gradient_reaches_the_maps_and_every_kept_layer_s_passes_through_them(mapped):
    skip = torch.tensor([False, False, True, False])
    mapped(torch.arange(12)[None], skip).square().sum().backward()
    assert all(not name.startswith("linear_maps") for name, _ in mapped.named_parameters())
    assert mapped.layers[1].mlp.down.weight.grad.abs().sum() > 0
    assert mapped.layers[2].mlp.down.weight.grad is None


def test_a_checkpoint_carries_its_maps_and_opens_elsewhere_without_them(mapped, tmp_path):
    mapped.float().save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert torch.equal(again.linear_maps.weight, mapped.linear_maps.weight)
    assert torch.equal(again.linear_maps.bias, mapped.linear_maps.bias)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    (tmp_path / "linear_maps.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"linear_maps\.pt: cannot be read"):
        Decoder.from_pretrained(tmp_path)


def test_in_bf16_the_maps_are_bf16_in_memory(small_run, tmp_path):
    model = load(small_run, None, "bfloat16")
    model.linear_maps = fit_maps(model, random_pairs())
    assert model.linear_maps.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert load(tmp_path, None, "bfloat16").linear_maps.weight.dtype == torch.bfloat16


def test_skipping_with_the_identity_drops_the_maps_and_their_measurements(small_run, tmp_path):
    model = load(small_run, None, None)
    measure_layers(model, random_pairs(), "linear")
    with_maps = model.hf_config.layer_kl
    model.save_pretrained(tmp_path)
    again = load(tmp_path, None, None)
    measure_layers(again, random_pairs(), "linear")  # once: the checkpoint has them
    assert again.hf_config.layer_kl == with_maps
    measure_layers(again, random_pairs(), "identity")
    assert again.linear_maps is None and again.hf_config.layer_kl != with_maps


# ---- runs ----------------------------------------------------------------------------------------


def test_pretrained_models_leave_maps_and_toy_models_nothing_and_a_run_s_kind_is_inherited(toy_run):
    kinds = {task: Config(model=str(toy_run), task=task).skip_with for task in ("toy", "svamp")}
    assert kinds == {"toy": "identity", "svamp": "linear"}


def test_rl_goes_on_with_the_maps_that_layer_dropout_was_trained_with(small_run, tmp_path):
    warm(tmp_path / "warm", model=str(small_run), layer_dropout=0.9, **LINEAR)
    maps = torch.load(tmp_path / "warm" / "linear_maps.pt")
    reinforce(tmp_path / "warm", tmp_path / "rl", skip_ratio=0.25)
    assert read_json(tmp_path / "rl" / "run.json")["skip_with"] == "linear"
    for name, tensor in torch.load(tmp_path / "rl" / "linear_maps.pt").items():
        assert torch.equal(tensor, maps[name])
    warm(tmp_path / "plain", model=str(tmp_path / "warm"))
    assert not (tmp_path / "plain" / "linear_maps.pt").exists()  # of other weights
    assert not is_measured(load(tmp_path / "plain", None, None), "identity")


@pytest.mark.parametrize("stage", ["warmup", "rl"])
def test_a_resumed_run_has_the_same_maps_and_pool_to_the_bit(
    small_run, tmp_path, stage, monkeypatch
):
    flags = {**LINEAR, "skip_layers": "cheap"}
    if stage == "warmup":
        flags["layer_dropout"] = 0.9
    train(stage, small_run, tmp_path / "one", **flags)
    stop_in_step(2, stage, small_run, tmp_path / "two", **flags)
    # nothing is measured again; and another machine rounds otherwise: the checkpoint's pool counts
    monkeypatch.delattr(model_file, "fit_maps")
    monkeypatch.delattr(model_file, "nested_kl")
    monkeypatch.setattr(warmup, "skip_pool", lambda *args: [2, 1])
    train(stage, small_run, tmp_path / "two", resume=True, **flags)
    assert state(tmp_path / "two") == state(tmp_path / "one")
    maps = [torch.load(tmp_path / name / "linear_maps.pt") for name in ("one", "two")]
    torch.testing.assert_close(*maps, rtol=0, atol=0)


def test_a_run_without_maps_resumes_though_its_model_has_some(small_run, tmp_path, monkeypatch):
    warm(tmp_path / "warm", model=str(small_run), layer_dropout=0.9, **LINEAR)
    flags = {"skip_with": "identity", "skip_layers": "cheap", "skip_ratio": 0.25}
    stop_in_step(2, "rl", tmp_path / "warm", tmp_path / "rl", **flags)
    costs = read_json(tmp_path / "rl" / "config.json")["layer_kl"]
    monkeypatch.delattr(model_file, "nested_kl")
    train("rl", tmp_path / "warm", tmp_path / "rl", resume=True, **flags)
    assert not (tmp_path / "rl" / "linear_maps.pt").exists()
    assert read_json(tmp_path / "rl" / "config.json")["layer_kl"] == costs


@pytest.mark.parametrize("count", [2, 4])
def test_so_many_processes_fit_and_sample_what_one_does(small_run, tmp_path, count):
    short_rl(small_run, tmp_path / "one", **LINEAR)
    assert launch(count, lambda: short_rl(small_run, tmp_path / "all", **LINEAR)) == [0] * count
    assert_equal(tmp_path / "all", tmp_path / "one")
    assert read_metrics(tmp_path / "one")[0]["kl_behav"] > 0


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_ratios_correct_for_a_mu_with_maps(mapped):
    skip = sample_skip(4, 0.25, pool=[1, 2])
    prompts = [prompt for prompt, _ in random_pairs(12)]
    rollout = sample(
        mapped, prompts, num_samples=400, max_new_tokens=3, eos_id=[], pad_id=0, skip=skip
    )
    logp_old, _ = batch_stats(mapped, rollout, 1000)
    rho = (logp_old - rollout.logp_behav)[rollout.action_mask].exp()
    assert rho.mean().item() == pytest.approx(1, abs=0.02) and rho.std() > 0.02
