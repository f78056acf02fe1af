"""The decoder pi_theta and the nested model mu, eq. (2): the same weights, some layers left out.

    layer     0   1   2   3   4   5   6   7
    pi        #   #   #   #   #   #   #   #
    mu        #   .   #   #   .   #   #   #      skip = (F, T, F, F, T, F, F, F)

A skipped layer (.) is the identity: its input is the input of the next layer. It does no work and
owns no part of the KV cache. (Ours, for pretrained models: a linear map takes its place, see
`LinearMaps`.) The mask is an argument of every pass, the same while a prompt is read (prefill) and
while tokens are drawn (decode), so that log mu of a finished completion equals one masked pass over
it.

    hidden = decoder(tokens, skip)      (N, T) -> (N, T, d)    right-padded; column = position
    logits = decoder.logits(hidden)     (..., d) -> (..., vocab)
    values = decoder.values(hidden)     (..., d) -> (...)      V_phi: one linear layer on top

There is no dropout anywhere: with it, pi_theta / pi_old would not be 1 at the first update.
The papers end at the first "# ----"; below: linear maps, Hugging Face, several processes, files.
"""

import contextlib
import json
import os
import sys
from datetime import timedelta
from functools import partial
from math import inf, isfinite
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN
from transformers.utils import cached_file, logging

from reward import InputError

Pairs = list[tuple[list[int], list[int]]]  # (prompt, completion), as token ids
OPT_OFFSET = 2  # OPT keeps two unused rows at the start of its position table


def sample_skip(
    num_layers: int,
    skip_ratio: float,
    generator: torch.Generator | None = None,
    pool: list[int] | None = None,
) -> Tensor:
    """The mask of mu, eq. (2): (num_layers,) bool, True = this layer is left out.

    `round(skip_ratio * num_layers)` layers of `pool` are left out, drawn uniformly; at least one
    inner layer stays. pool None: all but the first and the last; `skip_pool` knows others.
    InputError for a ratio that leaves out too many layers, or none where some were asked for.
    """
    inner = range(1, num_layers - 1)
    pool = inner if pool is None else pool
    count = round(skip_ratio * num_layers)
    largest = max(0, min(len(inner) - 1, len(pool)))
    if not 0 <= count <= largest or (skip_ratio > 0 and count == 0):
        possible = f"0, or {1 / num_layers:.3g} (one layer) to {largest / num_layers:.3g}"
        if largest == 0:
            possible = "0, since an inner layer stays"
        asked = f"--skip-ratio {skip_ratio:g} would leave out {count} of {num_layers} layers"
        raise InputError(f"{asked}: take {possible}")
    skip = torch.zeros(num_layers, dtype=torch.bool)
    for place in torch.randperm(len(pool), generator=generator)[:count]:
        skip[pool[place]] = True
    return skip


class Decoder(nn.Module):
    """pi_theta with its value head: new weights, drawn at random. `load` reads a checkpoint."""

    def __init__(self, hf_config):
        super().__init__()
        self.hf_config = hf_config
        self.config = config = ModelConfig(hf_config)
        self.autocast = False  # True: layers compute in bf16 while the weights stay fp32
        self.gradient_checkpointing = False  # True: layers run again in backward, to save memory
        # what else a checkpoint holds
        self.tokenizer = None
        self.eos_ids = []
        self.files = {}  # name -> content: the tokenizer's files, generation_config.json

        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.rope is None:
            rows = config.max_positions + OPT_OFFSET
            self.embed_positions = nn.Embedding(rows, config.hidden_size)
        else:
            self.inv_freq = rope_frequencies(config)  # no buffer: `.to(bfloat16)` would round it
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.head = self.embed
        if not config.tied_head:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.value_head = nn.Linear(config.hidden_size, 1)
        self.linear_maps = None  # LinearMaps, or None: a skipped layer is the identity
        self.init_weights()

    def init_weights(self):
        """Normal weights, residual outputs shrunk by sqrt(2 num_layers) as in GPT-2; V_phi = 0."""
        for name, parameter in self.named_parameters():
            if name.startswith("value_head") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                std = self.config.init_std
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    std /= (2 * len(self.layers)) ** 0.5
                nn.init.normal_(parameter, 0, std)

    def forward(self, tokens: Tensor, skip: Tensor | None = None, cache=None, positions=None):
        """Hidden states after the final norm, (N, T, d), of tokens (N, T) int64.

        skip: (num_layers,) bool, the mask of mu. None: the full model.
        Without positions: column t is position t; a token sees itself and what stands before it.
        Padding on the right needs no mask, since nothing to its left can see it. Keys and values go
        into the cache (see `new_cache`), if there is one.
        With positions, (N, 1) int64: one new token a row, at this column of the cache; it sees the
        columns up to its own. Slice the cache to the live columns to pay for no others.
        Positions come from the caller, so that a skipped layer cannot shift them.
        """
        if len(tokens) == 0:  # of several processes, one that got no rows
            return self.empty_pass(tokens, skip)
        visible = None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        else:
            visible = visible_columns(positions, cache)  # (N * kv_heads, 1, columns)

        x = self.embed(tokens)  # (N, T, d)
        rope = None
        if self.config.rope is None:
            x = x + self.embed_positions(positions + OPT_OFFSET)
        else:
            rope = self.rotary(positions, x.dtype)

        kept = self.kept_layers(skip)
        with self.mixed_precision():
            for number, layer in enumerate(self.layers):
                if number not in kept:
                    # eq. (2): the identity; beyond the paper: a linear map
                    if self.linear_maps is not None:
                        x = self.linear_maps(number, x)
                    continue
                layer_cache = None if cache is None else cache[kept.index(number)]
                context = rope, layer_cache, positions, visible
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(layer, x, *context, use_reentrant=False)
                else:
                    x = layer(x, *context)
        return self.norm(x)

    @property
    def device(self):
        """Where the weights are."""
        return self.embed.weight.device

    def mixed_precision(self):
        """A block in which layers compute in bf16, where `autocast` says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def kept_layers(self, skip: Tensor | None) -> list[int]:
        """The numbers of the layers that run.

        The mask is read once: a test per layer on a tensor is one GPU synchronisation per layer.
        """
        if skip is None:
            return list(range(len(self.layers)))
        return [number for number, is_skipped in enumerate(skip.tolist()) if not is_skipped]

    def empty_pass(self, tokens, skip):
        """The pass of a process that got no rows, (0, T, d).

        All processes gather the layers together, so this one runs a row that counts nowhere.
        """
        row = tokens.new_zeros(1, tokens.shape[1])
        return self.forward(row, skip)[:0].clone()  # a clone, since FSDP warns of a view

    def rotary(self, positions, dtype):
        """Cosine and signed sine that turn queries and keys, (N or 1, T, 1, head_dim) each."""
        self.inv_freq = self.inv_freq.to(positions.device)  # once; a CUDA graph may not copy it
        angle = positions[:, :, None, None] * self.inv_freq  # (N or 1, T, 1, head_dim / 2), fp32
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def new_cache(self, rows: int, columns: int, skip: Tensor | None = None) -> Tensor:
        """An empty KV cache, (kept layers, 2, rows, kv_heads, columns, head_dim)."""
        kept = len(self.kept_layers(skip))
        shape = kept, 2, rows, self.config.num_kv_heads, columns, self.config.head_dim
        dtype = torch.bfloat16 if self.autocast else None
        return self.embed.weight.new_zeros(shape, dtype=dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., vocab), in at least fp32."""
        return linear_in_fp32(hidden, self.head.weight)

    def values(self, hidden: Tensor) -> Tensor:
        """V_phi(s_t), (..., d) -> (...), in at least fp32."""
        return linear_in_fp32(hidden, self.value_head.weight, self.value_head.bias).squeeze(-1)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, no special ones around them; a control token in a text stays text."""
        with named_in_errors("a problem, as text for the tokenizer"):
            encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return encoded.input_ids

    @classmethod
    def from_pretrained(cls, source, dtype=torch.float32, device="cpu") -> "Decoder":
        """The weights of a Hugging Face folder or hub id; see `read_checkpoint`."""
        return read_checkpoint(source, dtype, device)

    def save_pretrained(self, folder, weights=None):
        """Write a Hugging Face folder. weights: ours, where they are not in this process."""
        write_checkpoint(self, Path(folder), weights or self.state_dict())


class Layer(nn.Module):
    """One residual layer."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        """x: (N, T, d) -> (N, T, d); context as in Attention.forward."""
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G heads of keys and values."""

    def __init__(self, config):
        super().__init__()
        H, G, D = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = H, G, D
        self.qkv = nn.Linear(config.hidden_size, (H + 2 * G) * D, bias=config.qkv_bias)
        self.out = nn.Linear(H * D, config.hidden_size, bias=config.out_bias)
        self.q_norm = make_norm(config, D) if config.qk_norm else None
        self.k_norm = make_norm(config, D) if config.qk_norm else None

    def forward(self, x, rope, cache, positions, visible):
        """x: (N, T, d) -> (N, T, d). cache: (2, N, G, columns, D) or None.

        visible None: a sequence, each token sees what stands before it. Else one new token a row,
        at column `positions` of the cache.
        """
        N, T, _ = x.shape
        H, G, D = self.sizes
        qk, v = self.qkv(x).view(N, T, H + 2 * G, D).split((H + G, G), dim=2)  # (N, T, heads, D)
        if self.q_norm is not None:
            q, k = qk.to(self.q_norm.weight.dtype).split((H, G), dim=2)  # not bf16 under autocast
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split((H, G), dim=2)
        if visible is None:
            y = self.attend_to_sequence(q, k, v, cache)
        else:
            y = self.attend_to_cache(q, k, v, cache, positions, visible)
        return self.out(y.reshape(N, T, H * D))

    def attend_to_sequence(self, q, k, v, cache):
        """Causal over T; k and v become the first T columns of the cache. -> (N, T, H, D)."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (N, heads, T, D)
        if cache is not None:
            cache[:, :, :, : k.shape[2]] = torch.stack([k, v])
        is_grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        return y.transpose(1, 2)

    def attend_to_cache(self, q, k, v, cache, positions, visible):
        """One new token a row against the cache, into which it goes first. -> (N, 1, H, D).

        The queries that share a head of keys stand in one product: on a CPU that takes half the
        time of scaled_dot_product_attention.
        """
        N, (H, G, D) = len(q), self.sizes
        rows = torch.arange(N, device=q.device)[:, None]  # (N, 1)
        cache[0][rows, :, positions] = k.to(cache.dtype)
        cache[1][rows, :, positions] = v.to(cache.dtype)
        q = q.reshape(N * G, H // G, D).to(cache.dtype)
        keys, values = cache.flatten(1, 2)  # (N * G, columns, D) each
        scores = torch.baddbmm(visible, q, keys.mT, alpha=D**-0.5)  # (N * G, H / G, columns)
        return torch.bmm(scores.softmax(-1), values).view(N, 1, H, D)


def visible_columns(positions, cache):
    """Added to the scores of one new token a row: 0 for columns up to its own, -inf behind.

    positions: (N, 1); the result: (N * kv_heads, 1, columns), in the order of `attend_to_cache`.
    """
    is_behind = torch.arange(cache.shape[4], device=positions.device) > positions[:, None]
    visible = torch.zeros_like(is_behind, dtype=cache.dtype).masked_fill_(is_behind, -inf)
    return visible.repeat_interleave(cache.shape[3], 0)


class MLP(nn.Module):
    """SwiGLU with one fused projection for gate and up, or the plain two-layer kind."""

    def __init__(self, config):
        super().__init__()
        self.is_gated = config.gated_mlp
        self.activation = ACT2FN[config.activation]
        up_size = config.mlp_size * (2 if self.is_gated else 1)
        self.up = nn.Linear(config.hidden_size, up_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        """x: (N, T, d) -> (N, T, d)."""
        if not self.is_gated:
            return self.down(self.activation(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)  # (N, T, mlp_size) each
        return self.down(self.activation(gate) * up)


def make_norm(config, size, has_scale=True):
    """RMSNorm or LayerNorm over the last `size` features."""
    if config.norm == "rms":
        return nn.RMSNorm(size, config.norm_eps, has_scale)
    return nn.LayerNorm(size, config.norm_eps, has_scale and config.norm_affine)


def rope_frequencies(config):
    """Rotary angle per position, theta^(-2i / head_dim), (head_dim / 2,) fp32.

    Llama 3 divides those of long waves by `factor`; between short and long ones it interpolates.
    """
    rope = config.rope
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequency = 1.0 / rope["rope_theta"] ** (even / config.head_dim)  # (head_dim / 2,)
    if rope["rope_type"] != "llama3":
        return frequency
    context = rope.get("original_max_position_embeddings") or config.max_positions
    turns = context * frequency / (2 * torch.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a short wave, 0: a long one
    return keep * frequency + (1 - keep) * frequency / rope["factor"]


def rotate(x, rope):
    """Turn each pair (x1, x2) = (x_i, x_{i + head_dim/2}) by its angle.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). x: (N, T, heads, head_dim); rope: of `rotary`.
    """
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def linear_in_fp32(hidden, weight, bias=None):
    """A linear layer in the precision of its weights, autocast or not; out in at least fp32."""
    with torch.autocast(hidden.device.type, enabled=False):
        out = F.linear(hidden.to(weight.dtype), weight, bias)
    return out if out.dtype == torch.float64 else out.float()


# ---- beyond the papers: what a skipped layer costs, and what can stand in its place --------------

MEASURED = 16  # completions that tell what leaving out a layer costs
FITTED = 256  # completions to which linear maps are fitted
RIDGE = 0.005  # penalty of that fit, relative to the mean square of a feature
OUTLIER = 30  # tokens that a layer moves so many times the median distance are left out of the fit


@torch.no_grad()
def nested_kl(model: Decoder, pairs: Pairs, skips: Tensor) -> Tensor:
    """KL(mu || pi) per token under each mask, (masks,) float64: exact over the vocabulary.

    pairs: ids of (prompt, completion); the mean is over their completions' tokens (`kl_behav` of
    rl.py: over those that mu has sampled).
    skips: (masks, num_layers) bool.
    """
    kl = torch.zeros(len(skips), dtype=torch.float64)
    with model.mixed_precision():  # as in `sample`
        for prompt, completion in pairs:  # one by one, since (actions, vocab) can be large
            tokens = torch.tensor([prompt + completion], device=model.device)
            actions = slice(len(prompt) - 1, -1)  # column t predicts token t + 1
            log_pi = model.logits(model(tokens)[0, actions]).log_softmax(-1)  # (actions, vocab)
            for i, skip in enumerate(skips):
                log_mu = model.logits(model(tokens, skip)[0, actions]).log_softmax(-1)
                kl[i] += (log_mu.exp() * (log_mu - log_pi)).sum().item()
    return kl / sum(len(completion) for _, completion in pairs)


def is_measured(model, skip_with):
    """Whether `hf_config.layer_kl` is one finite number a layer, of this kind of skipping."""
    layer_kl = getattr(model.hf_config, "layer_kl", None)
    if not isinstance(layer_kl, list) or len(layer_kl) != len(model.layers):
        return False
    has_maps = model.linear_maps is not None
    is_finite = all(isinstance(kl, float) and isfinite(kl) for kl in layer_kl)
    return is_finite and has_maps == (skip_with == "linear")


def measure_layers(model: Decoder, pairs: Pairs, skip_with: str):
    """Set `hf_config.layer_kl`: for each layer, KL(mu || pi) per token where only it is skipped.

    With skip_with "linear" the maps are fitted to all pairs first, and measured with. The KL is the
    mean over the first MEASURED pairs: in-sample, it serves to order the layers. A checkpoint
    carries both, and what it carries is kept.
    """
    if is_measured(model, skip_with):
        return
    model.linear_maps = fit_maps(model, pairs) if skip_with == "linear" else None
    each_alone = torch.eye(len(model.layers)) > 0
    model.hf_config.layer_kl = nested_kl(model, pairs[:MEASURED], each_alone).tolist()


def skip_pool(model: "Decoder", count: int, skip_layers: str) -> list[int]:
    """The layers among which eq. (2) draws the `count` that mu leaves out.

    skip_layers "inner": all but the first and the last. "cheap", ours: twice as many layers as
    are left out, those without which KL is least (see `measure_layers`). "3,5,7": these layers;
    InputError where one is no inner layer.
    """
    inner = list(range(1, len(model.layers) - 1))
    if skip_layers == "inner" or (skip_layers == "cheap" and count == 0):
        return inner
    if skip_layers == "cheap":
        return sorted(inner, key=lambda layer: model.hf_config.layer_kl[layer])[: 2 * count]
    pool = [int(layer) for layer in skip_layers.split(",")]
    if not set(pool) <= set(inner) or len(set(pool)) < len(pool):
        allowed = f"different numbers from 1 to {len(inner)}"
        raise InputError(f"--skip-layers {skip_layers}: must be {allowed}")
    return pool


class LinearMaps(nn.Module):
    """Linear stand-ins for skipped layers: x + W_i norm(x) + b_i in place of layer i.

    Fitted once by `fit_maps`, then constant while pi moves (`kl_behav` shows what that costs). A
    map has d^2 weights, a layer 10 d^2 or more; it owns no cache. norm needs no scale: W has it.
    After ReplaceMe (arXiv 2505.02819): there one map replaces a block of layers for good. The
    log-probabilities of mu stay known, so every correction holds as it is.
    """

    def __init__(self, config):
        super().__init__()
        L, d = config.num_layers, config.hidden_size
        self.norm = make_norm(config, d, has_scale=False)
        self.register_buffer("weight", torch.zeros(L, d, d))
        self.register_buffer("bias", torch.zeros(L, d))

    def forward(self, number, x):
        """x: (N, T, d) -> (N, T, d), in place of layer `number`."""
        return x + F.linear(self.norm(x), self.weight[number], self.bias[number])


def empty_maps(model):
    """LinearMaps of zeros, in the precision of the layers: autocast would cast them every time."""
    dtype = torch.bfloat16 if model.autocast else model.embed.weight.dtype
    return LinearMaps(model.config).to(model.device, dtype)


@torch.no_grad()
def fit_maps(model: Decoder, pairs: Pairs) -> LinearMaps:
    """The ridge regression of what each layer f adds, over the tokens of prompts and completions:

        W, b = argmin  sum |W norm(x) + b - (f(x) - x)|^2 + ridge |(W, b)|^2

    Tokens that a layer moves over OUTLIER times as far as the median token of their sequence are
    left out, or they alone would be fitted: often the first token of a Llama.
    Memory: about 4 d^2 float64 a layer, before gradients and moments are there.
    """
    L, d = len(model.layers), model.config.hidden_size
    device = model.device
    maps = empty_maps(model)
    # sums over tokens of u u^T and u y^T, where u = (norm(x), 1) and y = f(x) - x
    uu = torch.zeros(L, d + 1, d + 1, dtype=torch.float64, device=device)
    uy = torch.zeros(L, d + 1, d, dtype=torch.float64, device=device)

    def accumulate(number, layer, inputs, output):
        x = inputs[0][0].double()  # (T, d)
        y = output[0].double() - x  # (T, d)
        distance = y.norm(dim=-1)  # (T,)
        is_usual = distance <= OUTLIER * distance.median()  # (T,)
        u = F.pad(maps.norm(x), (0, 1), value=1.0)[is_usual]  # (tokens, d + 1)
        uu[number] += u.T @ u
        uy[number] += u.T @ y[is_usual]

    hooks = [
        layer.register_forward_hook(partial(accumulate, number))
        for number, layer in enumerate(model.layers)
    ]
    for prompt, completion in pairs:
        model(torch.tensor([prompt + completion], device=device))
    for hook in hooks:
        hook.remove()
    diagonal = uu.diagonal(dim1=1, dim2=2)  # (L, d + 1), a view of uu
    diagonal += RIDGE * diagonal.mean(1, keepdim=True)
    fit = torch.linalg.solve(uu, uy)  # (L, d + 1, d): W and b, transposed
    maps.weight.copy_(fit[:, :d].mT)
    maps.bias.copy_(fit[:, d])
    return maps


# ---- Hugging Face: configs -----------------------------------------------------------------------


class ModelConfig:
    """What the decoder needs to know of the config of a Llama, Qwen2, Qwen3 or OPT model.

    InputError for a feature that the decoder would leave out.
    """

    def __init__(self, hf):
        self.vocab_size = hf.vocab_size
        self.max_positions = hf.max_position_embeddings
        self.hidden_size = hf.hidden_size
        self.num_layers = hf.num_hidden_layers
        self.num_heads = hf.num_attention_heads
        self.tied_head = hf.tie_word_embeddings
        unsupported = self.read_opt(hf) if hf.model_type == "opt" else self.read_llama(hf)
        unsupported["quantization_config"] = getattr(hf, "quantization_config", None)
        unsupported[f"activation {self.activation!r}"] = self.activation not in ACT2FN
        for feature, is_present in unsupported.items():
            if is_present:
                without = f"{feature} is not supported; use a checkpoint without it"
                raise InputError(f"{hf.model_type} config: {without}")

    def read_opt(self, hf):
        """OPT and Galactica; returns features that may be present and are not supported."""
        self.rope = None  # positions are learned
        self.num_kv_heads = hf.num_attention_heads
        self.head_dim = hf.hidden_size // hf.num_attention_heads
        self.qkv_bias = self.out_bias = self.mlp_bias = hf.enable_bias
        self.qk_norm = self.gated_mlp = False
        self.mlp_size = hf.ffn_dim
        self.activation = hf.activation_function
        self.norm = "layer"
        self.norm_eps = 1e-5
        self.norm_affine = hf.layer_norm_elementwise_affine
        self.init_std = hf.init_std
        return {
            "do_layer_norm_before=False": not hf.do_layer_norm_before,
            "word_embed_proj_dim unlike hidden_size": hf.word_embed_proj_dim != hf.hidden_size,
        }

    def read_llama(self, hf):
        """Llama, CodeLlama, Qwen2, Qwen2.5 and Qwen3; returns the same as `read_opt`."""
        self.rope = hf.rope_parameters
        self.num_kv_heads = hf.num_key_value_heads  # fewer than heads: grouped-query attention
        self.head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        self.qkv_bias = hf.model_type == "qwen2" or hf.attention_bias
        self.out_bias = hf.model_type != "qwen2" and hf.attention_bias
        self.mlp_bias = getattr(hf, "mlp_bias", False)
        self.qk_norm = hf.model_type == "qwen3"
        self.gated_mlp = True  # SwiGLU: activation(gate) * up
        self.mlp_size = hf.intermediate_size
        self.activation = hf.hidden_act
        self.norm = "rms"
        self.norm_eps = hf.rms_norm_eps
        self.init_std = hf.initializer_range
        rope_type = self.rope["rope_type"]
        layer_types = set(getattr(hf, "layer_types", None) or [])
        return {
            f"rope_type={rope_type!r}": rope_type not in ("default", "llama3"),
            "sliding-window attention": layer_types - {"full_attention"},
        }


# ---- Hugging Face: weights -----------------------------------------------------------------------

logging.disable_progress_bar()  # of every load and save
logging.set_verbosity_error()  # what matters is raised
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
LLAMA_NAMES = {  # ours: theirs
    "embed": "model.embed_tokens",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
OPT_NAMES = {
    "embed": "model.decoder.embed_tokens",
    "embed_positions": "model.decoder.embed_positions",
    "layers": "model.decoder.layers",
    "attention_norm": "self_attn_layer_norm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}


def load(source: str | Path, device: str | None, dtype: str | None) -> Decoder:
    """A decoder with its tokenizer and EOS ids, from a Hugging Face folder or hub id.

    device None: CUDA where there is one. dtype: "float32", "float64", or "bfloat16" (fp32 weights,
    layers compute in bf16); None: bfloat16 on CUDA, else float32. InputError for what cannot be
    used.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    weight_dtype = torch.float64 if dtype == "float64" else torch.float32
    decoder = read_checkpoint(source, weight_dtype, device, autocast=dtype == "bfloat16")
    decoder.tokenizer = read_tokenizer(source, decoder.files)
    count, rows = decoder.tokenizer.vocab_size, decoder.config.vocab_size
    if not 1 < count <= rows:  # without added tokens: few texts hold one of those
        raise InputError(f"{source}: tokenizer of {count} tokens, embedding of {rows} rows")
    decoder.eos_ids = find_eos_ids(source, decoder)
    return decoder


def read_checkpoint(source, dtype, device, autocast=False):
    """The weights of a Hugging Face folder or hub id, without a tokenizer.

    InputError for weights that are not those of the config, or not finite.
    """
    check_checkpoint(source)
    hf_config = read_config(source)
    # on "meta": no memory and no random numbers for weights that are about to be read
    with named_in_errors(f"{source}, config.json"), torch.device("meta"):
        decoder = Decoder(hf_config).to(dtype)
    decoder.autocast = autocast
    decoder.files = read_files(source)
    with named_in_errors(f"{source}, model.safetensors or what stands for it"):
        hf, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=hf_config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    wrong = {fault: sorted(map(str, names))[:2] for fault, names in report.items() if names}
    if wrong:
        raise InputError(f"{source}: the weights do not belong to config.json: {wrong}")
    decoder.to_empty(device=device)
    theirs = hf.state_dict()
    for name, view in hf_views(decoder.config, decoder.state_dict()).items():
        view.copy_(theirs[name])
    embedding = hf.get_input_embeddings().weight
    if decoder.config.tied_head and not torch.equal(theirs["lm_head.weight"], embedding):
        own_head = "lm_head.weight is its own; set tie_word_embeddings to false in config.json"
        raise InputError(f"{source}: {own_head}")
    nn.init.zeros_(decoder.value_head.weight)
    nn.init.zeros_(decoder.value_head.bias)
    if file := find_file(source, "value_head.pt"):
        read_module(file, decoder.value_head)
    read_maps(decoder, source)
    if not all(weight.isfinite().all() for weight in decoder.state_dict().values()):
        raise InputError(f"{source}: a weight is nan or infinite; take an earlier checkpoint")
    return decoder


def read_maps(decoder, source):
    """The linear maps of a checkpoint, where it has some."""
    if file := find_file(source, "linear_maps.pt"):
        decoder.linear_maps = empty_maps(decoder)
        read_module(file, decoder.linear_maps)


def check_checkpoint(source):
    """InputError for a file or folder that is no checkpoint; hub ids pass."""
    if Path(source).exists() and not Path(source, "config.json").exists():
        raise InputError(f"{source}: not a checkpoint (a folder with config.json)")


def read_config(source):
    """The Hugging Face config; InputError for an architecture that the decoder does not know."""
    with named_in_errors(f"{source}, config.json"):
        raw, _ = PreTrainedConfig.get_config_dict(source)
        model_type = raw.get("model_type")
        if model_type not in ("llama", "qwen2", "qwen3", "opt"):
            supported = "supported: llama, qwen2, qwen3, opt"
            raise InputError(f"{source}: unknown architecture {model_type!r}; {supported}")
        hf_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    hf_config.eos_token_id = raw.get("eos_token_id")  # transformers fills in a default
    hf_config._attn_implementation = "eager"  # it may name a package that is not installed
    return hf_config


def read_files(source):
    """Name -> content of the files beside the weights; InputError for broken JSON."""
    files = {}
    for name in COPIED:
        with named_in_errors(f"{source}, {name}"):
            path = find_file(source, name)
            if path:
                files[name] = Path(path).read_bytes()
            if path and name.endswith(".json"):
                json.loads(files[name]).keys()  # broken, or no JSON object: said here, by name
    return files


def find_file(source, name):
    """The path of a file of a folder or hub id; None where there is none."""
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def read_module(file, module):
    """Fill in a module that other programs do not know, from its own file."""
    with named_in_errors(file):
        module.load_state_dict(torch.load(file, "cpu", weights_only=True))


def write_checkpoint(decoder, folder, weights):
    """A folder that AutoModelForCausalLM opens with the same logits, and value_head.pt."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(decoder.hf_config, dtype=decoder.embed.weight.dtype)
    views = hf_views(decoder.config, weights)
    views = {name: view.detach().cpu().contiguous() for name, view in views.items()}
    hf.save_pretrained(folder, state_dict=views)
    config_file = folder / "config.json"
    rope = decoder.config.rope
    if rope is not None:  # older readers do not know rope_parameters
        scaling = None if rope["rope_type"] == "default" else rope
        older = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        write_json(config_file, read_json(config_file) | older)
    for file in folder.glob("*.safetensors"):  # which are written for their owner alone
        file.chmod(config_file.stat().st_mode)
    for name, content in decoder.files.items():
        (folder / name).write_bytes(content)
    for module in ("value_head", "linear_maps"):  # .pt: inference servers load every .safetensors
        if f"{module}.weight" in weights:
            own = {name: weights[f"{module}.{name}"].clone() for name in ("weight", "bias")}
            torch.save(own, folder / f"{module}.pt")


def hf_views(config, weights):
    """Our weights under their Hugging Face names, as views, so that reading can write into them."""
    names = OPT_NAMES if config.rope is None else LLAMA_NAMES
    kv_size = config.num_kv_heads * config.head_dim
    query_size = config.num_heads * config.head_dim
    fused = {
        "attention.qkv": {"attention.q": query_size, "attention.k": kv_size, "attention.v": kv_size}
    }
    if config.gated_mlp:
        fused["mlp.up"] = {"mlp.gate": config.mlp_size, "mlp.up": config.mlp_size}
    views = {}
    for name, weight in weights.items():
        module, parameter = name.rsplit(".", 1)  # "layers.3.mlp.up", "weight"
        if module in ("value_head", "linear_maps") or (module == "head" and config.tied_head):
            continue
        prefix = ""
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            prefix = f"{names['layers']}.{number}."
        sizes = fused.get(module, {module: len(weight)})  # part -> rows
        for part, view in zip(sizes, weight.split(list(sizes.values())), strict=True):
            views[f"{prefix}{names[part]}.{parameter}"] = view
    return views


# ---- Hugging Face: tokens ------------------------------------------------------------------------

# For chat templates that print today's date: the same prompts tomorrow.
CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def read_tokenizer(source, files):
    """The tokenizer of a checkpoint; its ids are those of tokenizer.json, where there is one.

    AutoTokenizer rebuilds some tokenizers by the name of their class or by the model's type, and
    ignores how the file splits a text. So the configs only tell special tokens and chat template.
    """
    with named_in_errors(f"{source}, tokenizer.json or what stands for it"):
        if "tokenizer.json" not in files:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        configured = PreTrainedTokenizerFast.from_pretrained(source)
        template = configured.chat_template
        if template is None and "chat_template.json" in files:
            template = json.loads(files["chat_template.json"])["chat_template"]
        backend = Tokenizer.from_buffer(files["tokenizer.json"])
        special_tokens = configured.special_tokens_map
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, **special_tokens
        )


def find_eos_ids(source, decoder):
    """The ids that end a completion; training targets end with the first.

    Those of generation_config.json and of config.json; the tokenizer's where neither has one, and
    in a chat model too. InputError where there is none, or one without a row in the embedding.
    """
    generation_config = json.loads(decoder.files.get("generation_config.json", b"{}"))
    ids = []
    for stated in (generation_config.get("eos_token_id"), decoder.hf_config.eos_token_id):
        if stated is not None:
            ids += stated if isinstance(stated, list) else [stated]
    tokenizer = decoder.tokenizer
    if (not ids or tokenizer.chat_template) and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    rows = decoder.config.vocab_size
    if not ids or not all(type(token) is int and 0 <= token < rows for token in ids):
        found = f"end-of-sequence ids {ids} in its configs"
        raise InputError(f"{source}: {found}; it needs one, and all below {rows}")
    return list(dict.fromkeys(ids))


def encode_chats(tokenizer, chats, prompt=True):
    """Token ids of chats, (role, text) a turn, in the words of the chat template.

    prompt: an answer is to follow. A control token in a text stays text. InputError for a template
    that fails, or that leaves out a text.
    """
    with named_in_errors("the chat template (--prompt-style reft goes without)"):
        template = CLOCK + tokenizer.get_chat_template()
        options = {
            "chat_template": template,
            "add_generation_prompt": prompt,
            "enable_thinking": False,  # where a template has this switch
        }
        for content_of in (str, in_parts):
            turns = [
                [{"role": role, "content": content_of(text)} for role, text in chat]
                for chat in chats
            ]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, **options)
            pairs = zip(chats, rendered, strict=True)
            if all(text.strip() in words for chat, words in pairs for _, text in chat):
                options |= {"sanitize_control_tokens": True, "return_dict": False}
                return tokenizer.apply_chat_template(turns, **options)
    raise InputError(
        "the chat template leaves out the question or the system text; take --prompt-style reft"
    )


def in_parts(text):
    """A text as the templates of models that also see images want it."""
    return [{"type": "text", "text": text}]


# ---- several processes ---------------------------------------------------------------------------
# Started by torchrun: weights are sharded with FSDP2, rows are shared out. In a single process all
# of this does nothing.


@contextlib.contextmanager
def process_group():
    """Join the processes that torchrun started; the first one alone prints."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the timeout must outlast a checkpoint, which one process writes
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    with open(os.devnull, "w") as nowhere:
        target = sys.stdout if rank() == 0 else nowhere
        with contextlib.redirect_stdout(target):
            yield
    dist.destroy_process_group()  # not after an error: all processes would wait for each other


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x):
    """The sum of x over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_gather(x):
    """x of every process, by rank; tensors must be on the CPU."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def barrier():
    """Wait until every process is here."""
    all_gather(None)


def shard(model):
    """FSDP2: each process keeps its part of weights, gradients and moments.

    A layer is gathered while it runs. The outer module (embedding, norm, heads) stays gathered
    after forward, since logits() and values() are called when forward has returned.
    """
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(model.device.type, (world_size(),))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # a sum: losses are divided by the tokens of all
        module.set_force_sum_reduction_for_comms(True)  # gloo knows neither averages nor factors


@contextlib.contextmanager
def unsharded(model):
    """All weights on every process: passes in here wait for nobody, so each may make its own."""
    modules = (*model.layers, model) if isinstance(model, FSDPModule) else ()
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)


def full_tensor(x):
    """A sharded tensor in one piece; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- files and errors ----------------------------------------------------------------------------


@contextlib.contextmanager
def named_in_errors(file):
    """Whatever a library says of a broken file becomes one line that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        fault = f"{file}: cannot be read ({type(error).__name__}: {reason})"
        raise InputError(fault) from error


def read_json(path):
    """The object in a JSON file; InputError names a file that is broken or holds no object."""
    with named_in_errors(path):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


def write_json(path, value):
    """Write a JSON file that people can read, in place of an older one only when it is whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)
