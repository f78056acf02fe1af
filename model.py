"""The decoder pi_theta: hand-written, with a layer-skip mask, a KV cache and a value head V_phi.

One class reads and writes Llama (CodeLlama), Qwen2 (Qwen2.5), Qwen3 and OPT (Galactica) checkpoints. What differs between
them stands in `ModelConfig`. There is no dropout anywhere: with it, pi_theta / pi_old would not be 1 at the first update.

    hidden = decoder(tokens, skip)          (N, T) -> (N, T, d)      one row a sequence, right-padded, column = position
    logits = decoder.logits(hidden)         (..., d) -> (..., vocab)
    values = decoder.values(hidden)         (..., d) -> (...)
"""

import contextlib
import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from reward import InputError

ARCHITECTURES = {  # model_type -> the transformers class that opens what we save
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
}
OPT_OFFSET = 2  # OPT keeps two unused rows at the start of its position table
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know; `read_config` makes one from a Hugging Face config."""

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # fewer than num_heads: grouped-query attention
    head_dim: int
    mlp_size: int
    activation: str
    gated_mlp: bool  # SwiGLU: activation(gate) * up
    norm: str  # "rms" or "layer"
    norm_eps: float
    norm_affine: bool
    rope: dict | None  # None: learned positions
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    init_std: float


def read_config(hf: PreTrainedConfig) -> ModelConfig:
    """Translate a Hugging Face config; raises InputError for any feature that this decoder would silently leave out."""

    def refuse(feature: str):
        raise InputError(f"{hf.model_type} config: {feature} is not supported by model.py; use a checkpoint without it")

    check_architecture(hf.model_type)
    if getattr(hf, "quantization_config", None):
        refuse("quantization_config")
    shared = {
        "vocab_size": hf.vocab_size,
        "max_positions": hf.max_position_embeddings,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "tied_head": hf.tie_word_embeddings,
    }
    if hf.model_type == "opt":
        if not hf.do_layer_norm_before:
            refuse("do_layer_norm_before=False")
        if hf.word_embed_proj_dim != hf.hidden_size:
            refuse(f"word_embed_proj_dim={hf.word_embed_proj_dim} unlike hidden_size={hf.hidden_size}")
        if hf._remove_final_layer_norm:
            refuse("_remove_final_layer_norm=True")
        config = ModelConfig(
            **shared,
            num_kv_heads=hf.num_attention_heads,
            head_dim=hf.hidden_size // hf.num_attention_heads,
            mlp_size=hf.ffn_dim,
            activation=hf.activation_function,
            gated_mlp=False,
            norm="layer",
            norm_eps=1e-5,
            norm_affine=hf.layer_norm_elementwise_affine,
            rope=None,
            qkv_bias=hf.enable_bias,
            out_bias=hf.enable_bias,
            mlp_bias=hf.enable_bias,
            qk_norm=False,
            init_std=hf.init_std,
        )
    else:
        rope = dict(hf.rope_parameters)
        if rope.setdefault("rope_type", "default") not in ("default", "llama3"):
            refuse(f"rope_type={rope['rope_type']!r}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(f"partial_rotary_factor={rope['partial_rotary_factor']}")
        if any(kind != "full_attention" for kind in getattr(hf, "layer_types", None) or ()):
            refuse("sliding-window attention (use_sliding_window=True)")
        biased = hf.model_type == "qwen2" or hf.attention_bias
        config = ModelConfig(
            **shared,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            mlp_size=hf.intermediate_size,
            activation=hf.hidden_act,
            gated_mlp=True,
            norm="rms",
            norm_eps=hf.rms_norm_eps,
            norm_affine=True,
            rope=rope,
            qkv_bias=biased,
            out_bias=biased and hf.model_type != "qwen2",
            mlp_bias=getattr(hf, "mlp_bias", False),
            qk_norm=hf.model_type == "qwen3",
            init_std=hf.initializer_range,
        )
    if config.activation not in ACTIVATIONS:
        refuse(f"activation {config.activation!r}")
    return config


def check_architecture(model_type: str | None):
    """InputError for a model type that this decoder does not know."""
    if model_type not in ARCHITECTURES:
        raise InputError(f"unknown architecture {model_type!r}; supported model types: {', '.join(ARCHITECTURES)}")


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """RMSNorm or LayerNorm over the last `size` features."""
    if config.norm == "rms":
        return nn.RMSNorm(size, config.norm_eps, config.norm_affine)
    return nn.LayerNorm(size, config.norm_eps, config.norm_affine)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Rotary angles per position, (head_dim / 2,) fp32: theta^(-2i / head_dim), long waves stretched as in Llama 3."""
    rope = config.rope
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequency = 1.0 / rope["rope_theta"] ** exponent  # (head_dim / 2,)
    if rope["rope_type"] == "default":
        return frequency
    context = rope.get("original_max_position_embeddings") or config.max_positions
    waves = context * frequency / (2 * torch.pi)  # full turns within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((waves - low) / (high - low)).clamp(0, 1)  # 1: short waves stay; 0: long waves are stretched by `factor`
    return keep * frequency + (1 - keep) * frequency / rope["factor"]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim/2}) by its angle. x: (N, T, heads, head_dim); rope: cos and signed sin."""
    cos, sin = rope  # (N or 1, T, 1, head_dim)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


ONE_DNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
AVX512 = ONE_DNN and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. On a CPU with AVX-512 large fp32 products go to oneDNN: F.linear calls MKL, half as fast on AMD's."""
    small = x.numel() * len(weight) < 2**19
    if not AVX512 or small or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return OneDnnLinear.apply(x, weight, bias) if torch.is_grad_enabled() else one_dnn_linear(x, weight, bias)


def one_dnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., in) -> (..., out); the operator that torch.compile uses, which has no gradient of its own."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnnLinear(torch.autograd.Function):
    """one_dnn_linear with its gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return one_dnn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, needs = grad.flatten(0, -2), ctx.needs_input_grad  # (rows, out)
        return (
            one_dnn_linear(grad, weight.t()) if needs[0] else None,
            one_dnn_linear(rows.t(), x.flatten(0, -2).t()) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def spread(x: Tensor, real: Tensor, N: int, T: int) -> Tensor:
    """(tokens, d) without padding -> (N, T, d) with zeros as padding; real: (tokens,) places in N * T."""
    return x.new_zeros(N * T, x.shape[-1]).index_copy(0, real, x).view(N, T, -1)


class Attention(nn.Module):
    """Causal grouped-query attention with one fused projection for q, k and v."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)
        self.qk_norm = config.qk_norm
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope=None, cache=None, positions=None, visible=None, places=None) -> Tensor:
        """x: (N, T, d) -> (N, T, d). cache: (2, N, kv_heads, columns, head_dim).

        visible: (N, 1, T, columns) bool; for T = 1 what is added to the scores, (N * kv_heads, 1, columns); None: causal,
        over these T tokens only. places: x and the result are (tokens, d), without padding; see `Decoder.forward`.
        """
        qkv, (H, G, _) = self.qkv(x), self.heads
        if places is not None:
            qkv = spread(qkv, *places)  # attention is the one place where tokens meet: it wants rows
        N, T, _ = qkv.shape
        qkv = qkv.view(N, T, sum(self.heads), self.head_dim)
        qk, v = qkv.split((H + G, G), dim=2)  # (N, T, heads, head_dim)
        if self.qk_norm:  # in the precision of its weights, under autocast too
            pairs = zip((self.q_norm, self.k_norm), qk.split((H, G), dim=2), strict=True)
            qk = torch.cat([norm(part.to(norm.weight.dtype)) for norm, part in pairs], dim=2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split((H, G), dim=2)
        if visible is None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (N, heads, T, head_dim)
            if cache is not None:
                cache[0][:, :, :T], cache[1][:, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        else:
            rows = torch.arange(N, device=x.device)[:, None]
            cache[0][rows, :, positions] = k.to(cache.dtype)
            cache[1][rows, :, positions] = v.to(cache.dtype)
            k, v = cache
            if T > 1:
                y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible, enable_gqa=H != G)
            else:  # the queries that share a kv head in one product; on a CPU half the time of the call above
                q, k, v = q.reshape(N * G, H // G, self.head_dim).to(k.dtype), k.flatten(0, 1), v.flatten(0, 1)
                scores = torch.baddbmm(visible, q, k.mT, alpha=self.head_dim**-0.5)  # (N * kv_heads, queries, columns)
                y = torch.bmm(scores.softmax(-1), v).view(N, H, 1, self.head_dim)
        y = y.transpose(1, 2).reshape(N, T, H * self.head_dim)
        return self.out(y if places is None else y.flatten(0, 1).index_select(0, places[0]))


class MLP(nn.Module):
    """SwiGLU with one fused projection for gate and up, or the plain two-layer kind."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.gated_mlp
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.hidden_size, config.mlp_size * (2 if self.gated else 1), bias=config.mlp_bias)
        self.down = Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, d) -> (N, T, d)."""
        if not self.gated:
            return self.down(self.activation(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)  # (N, T, mlp_size) each
        return self.down(self.activation(gate) * up)


class Layer(nn.Module):
    """One residual layer; skipping it is the identity."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        """x: (N, T, d) -> (N, T, d); context as in Attention.forward."""
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.mlp(self.mlp_norm(x))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in the precision of its weights, autocast or not, its result in at least fp32."""
    with torch.autocast(hidden.device.type, enabled=False):
        out = linear(hidden.to(weight.dtype), weight, bias)
    return out if out.dtype == torch.float64 else out.float()


class Decoder(nn.Module):
    """pi_theta with its value head. `Decoder(hf_config)` draws new weights; `Decoder.from_pretrained` reads them."""

    def __init__(self, hf_config: PreTrainedConfig):
        super().__init__()
        self.hf_config = hf_config
        self.autocast = False  # True: layers compute in bf16 while the weights stay fp32
        self.gradient_checkpointing = False  # True: layers run again in backward, which then keeps one input a layer
        self.generation_config: dict | None = None  # what generation_config.json says, carried along when saving
        self.config = config = read_config(hf_config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.rope is None:
            self.embed_positions = nn.Embedding(config.max_positions + OPT_OFFSET, config.hidden_size)
        else:
            self.inv_freq = rope_frequencies(config)  # no buffer: `.to(bfloat16)` would round it
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        tied = config.tied_head
        self.head = self.embed if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.value_head = nn.Linear(config.hidden_size, 1)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self):
        """Normal weights, residual outputs shrunk by sqrt(2 num_layers) as in GPT-2; V_phi = 0 everywhere at the start."""
        for name, parameter in self.named_parameters():
            if name.startswith("value_head") or name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(0, self.config.init_std / (2 * len(self.layers)) ** (0.5 if residual else 0))

    def forward(
        self, tokens: Tensor, skip: Tensor | None = None, cache=None, positions=None, lengths: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (N, T, d), of tokens (N, T) int64.

        skip: (num_layers,) bool, True = this layer is left out: the nested model mu of eq. (2). None: the full model.
        Without cache: column t is position t, each token sees itself and what stands before it. Padding on the right
        needs no mask, since nothing to its left can see it.
        With cache (see `new_cache`): token (i, t) sits at column positions[i, t] of row i; its key and value are written
        there and it sees columns 0..positions[i, t]. positions: (N, T) int64; None: columns 0..T-1, a new prompt. The
        caller owns the position; no layer decides it. Slice the cache to the live columns to pay for no others.
        lengths: (N,), without cache: no work but that of attention goes into padding, whose hidden states are 0.
        """
        visible = places = None
        N = len(tokens)
        if N == 0:  # a process whose share is empty takes part in the pass all the same, with a row that counts nowhere
            tokens, lengths = tokens.new_zeros(1, tokens.shape[1]), None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        else:
            columns = torch.arange(cache.shape[4], device=tokens.device)
            visible = columns <= positions[:, None, :, None]  # (N, 1, T, columns)
            if tokens.shape[1] == 1:  # added to the scores of every kv head: 0 or -inf
                visible = torch.zeros_like(visible, dtype=cache.dtype).masked_fill_(~visible, -torch.inf)
                visible = visible.expand(-1, cache.shape[3], -1, -1).flatten(0, 1)  # (N * kv_heads, 1, columns)
        x, rope = self.embed(tokens), None  # (N, T, d)
        if self.config.rope is None:
            x = x + self.embed_positions(positions + OPT_OFFSET)
        else:
            self.inv_freq = self.inv_freq.to(tokens.device)  # copied once, which a CUDA graph may not do
            angle = positions[:, :, None, None] * self.inv_freq  # (N or 1, T, 1, head_dim / 2)
            cos, sin = angle.cos(), angle.sin()
            rope = torch.cat([cos, cos], -1).to(x.dtype), torch.cat([-sin, sin], -1).to(x.dtype)
        if lengths is not None:
            real = (positions < lengths[:, None]).flatten().nonzero()[:, 0]  # (tokens,) places in N * T
            x, places = x.flatten(0, 1).index_select(0, real), (real, *tokens.shape)  # (tokens, d)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            for i, layer in enumerate(self.kept_layers(skip)):
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(layer, x, rope, None, None, None, places, use_reentrant=False)
                else:
                    x = layer(x, rope, None if cache is None else cache[i], positions, visible, places)
        hidden = self.norm(x)
        return (hidden if places is None else spread(hidden, *places))[:N]

    def kept_layers(self, skip: Tensor | None) -> list[Layer]:
        """The layers that run. `skip` is read once: a test per layer on a tensor is one GPU synchronisation per layer."""
        if skip is None:
            return list(self.layers)
        return [layer for layer, skipped in zip(self.layers, skip.tolist(), strict=True) if not skipped]

    def new_cache(self, rows: int, columns: int, skip: Tensor | None = None) -> Tensor:
        """An empty KV cache, (kept layers, 2, rows, kv_heads, columns, head_dim): a skipped layer owns none of it."""
        config = self.config
        shape = (len(self.kept_layers(skip)), 2, rows, config.num_kv_heads, columns, config.head_dim)
        return self.embed.weight.new_zeros(shape, dtype=torch.bfloat16 if self.autocast else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., vocab), in at least fp32."""
        return project(hidden, self.head.weight)

    def values(self, hidden: Tensor) -> Tensor:
        """V_phi(s_t), (..., d) -> (...): one linear layer on the last hidden state, in at least fp32."""
        return project(hidden, self.value_head.weight, self.value_head.bias).squeeze(-1)

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> "Decoder":
        """Read a Hugging Face directory or hub id; `value_head.pt` too where there is one, else V_phi = 0."""
        folder = find_checkpoint(source)
        raw = read_json(folder / "config.json")
        check_architecture(raw.get("model_type"))
        with named_in_errors(folder / "config.json"):
            hf_config = AutoConfig.from_pretrained(folder)
        hf_config.eos_token_id = raw.get("eos_token_id")  # transformers fills in a default
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be read
            decoder = cls(hf_config).to(dtype)
        decoder.to_empty(device=device)
        if (folder / "generation_config.json").exists():
            decoder.generation_config = read_json(folder / "generation_config.json")
        read_weights(folder, hf_views(decoder))
        value_head = {name: torch.zeros(p.shape) for name, p in decoder.value_head.named_parameters()}
        with named_in_errors(folder / "value_head.pt"):
            if (folder / "value_head.pt").exists():
                value_head = torch.load(folder / "value_head.pt", map_location="cpu", weights_only=True)
            decoder.value_head.load_state_dict(value_head)
        return decoder

    def save_pretrained(self, folder: str | Path):
        """Write config.json, generation_config.json, model.safetensors and value_head.pt: AutoModelForCausalLM opens it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_weights(folder)
        config = self.hf_config.to_dict()
        config["architectures"] = [ARCHITECTURES[self.hf_config.model_type]]
        config["dtype"] = config["torch_dtype"] = str(self.embed.weight.dtype).removeprefix("torch.")
        if self.config.rope is not None:  # transformers 5 writes rope_parameters only; older readers look for these
            config["rope_theta"] = self.config.rope["rope_theta"]
            config["rope_scaling"] = None if self.config.rope["rope_type"] == "default" else self.config.rope
        write_json(folder / "config.json", config)
        if self.generation_config is not None:
            write_json(folder / "generation_config.json", self.generation_config)
        weights = {name: view.detach().cpu() for name, view in hf_views(self).items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "model.safetensors").chmod(
            (folder / "config.json").stat().st_mode
        )  # safetensors lets only its owner read
        # not .safetensors: inference servers load every such file of a folder
        torch.save(self.value_head.state_dict(), folder / "value_head.pt")


def remove_weights(folder: Path):
    """Delete an older checkpoint's weights: a shard or an index that stayed would be read in place of the new ones."""
    for pattern in ("generation_config.json", "*.index.json", "model*.safetensors", "pytorch_model*.bin"):
        for stale in folder.glob(pattern):
            stale.unlink()


def hf_views(decoder: Decoder) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name, as a view into ours: reading writes into them, saving reads from them."""
    config, opt = decoder.config, decoder.config.rope is None
    root = "model.decoder." if opt else "model."
    views = {}

    def add(name: str, module: nn.Module):
        for kind, parameter in module.named_parameters():  # weight, bias
            views[f"{name}.{kind}"] = parameter.data

    def add_fused(prefix: str, names: tuple[str, ...], heights: tuple[int, ...], module: nn.Module):
        for kind, parameter in module.named_parameters():
            for name, rows in zip(names, parameter.data.split(heights), strict=True):
                views[f"{prefix}{name}.{kind}"] = rows

    add(f"{root}embed_tokens", decoder.embed)
    if opt:
        add(f"{root}embed_positions", decoder.embed_positions)
    heights = tuple(heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    for i, layer in enumerate(decoder.layers):
        prefix = f"{root}layers.{i}."
        add_fused(f"{prefix}self_attn.", ("q_proj", "k_proj", "v_proj"), heights, layer.attention.qkv)
        add(f"{prefix}self_attn.{'out_proj' if opt else 'o_proj'}", layer.attention.out)
        add(f"{prefix}self_attn.q_norm", layer.attention.q_norm)
        add(f"{prefix}self_attn.k_norm", layer.attention.k_norm)
        add(f"{prefix}{'self_attn_layer_norm' if opt else 'input_layernorm'}", layer.attention_norm)
        add(f"{prefix}{'final_layer_norm' if opt else 'post_attention_layernorm'}", layer.mlp_norm)
        if opt:
            add(f"{prefix}fc1", layer.mlp.up)
            add(f"{prefix}fc2", layer.mlp.down)
        else:
            add_fused(f"{prefix}mlp.", ("gate_proj", "up_proj"), (config.mlp_size, config.mlp_size), layer.mlp.up)
            add(f"{prefix}mlp.down_proj", layer.mlp.down)
    add(f"{root}{'final_layer_norm' if opt else 'norm'}", decoder.norm)
    if not config.tied_head:
        add("lm_head", decoder.head)
    return views


def read_weights(folder: Path, views: dict[str, Tensor]):
    """Copy a checkpoint (one file or sharded, safetensors or .bin) into `views`; InputError names what does not fit."""
    missing, tied_head = set(views), None
    for file in weight_files(folder):
        with named_in_errors(file):
            tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        for name, tensor in tensors.items():
            name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"  # a headless checkpoint
            if name not in views:
                if name == "lm_head.weight":
                    tied_head = tensor
                elif not name.endswith("rotary_emb.inv_freq"):  # made from config.json
                    raise InputError(
                        f"{file}: tensor {name} has no place in this model; does config.json belong to it?"
                    )
                continue
            if tensor.shape != views[name].shape:
                raise InputError(f"{file}: {name} is {list(tensor.shape)}, config.json wants {list(views[name].shape)}")
            if not tensor.isfinite().all():
                raise InputError(f"{file}: {name} holds nan or infinity; take an earlier checkpoint")
            views[name].copy_(tensor)
            missing.discard(name)
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are missing, among them {min(missing)}")
    if tied_head is not None:
        embedding = next(view for name, view in views.items() if name.endswith("embed_tokens.weight"))
        if not torch.equal(embedding, tied_head.to(embedding)):
            raise InputError(f"{folder}: tie_word_embeddings is true in config.json, but lm_head.weight differs")


@contextlib.contextmanager
def named_in_errors(file: Path):
    """Whatever a library says of a broken file becomes one line that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: cannot be read ({type(error).__name__}: {reason})") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            return [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
        if (folder / single).exists():
            return [folder / single]
    raise InputError(f"{folder}: no model.safetensors and no pytorch_model.bin, whole or sharded")


def find_checkpoint(source: str | Path) -> Path:
    """The local folder of a directory or hub id (downloaded once, then read from the cache)."""
    folder = Path(source)
    if folder.is_dir() or folder.is_file():
        if not (folder / "config.json").exists():
            raise InputError(f"{folder}: not a checkpoint (a folder with config.json)")
        return folder
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "value_head.pt"]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=patterns))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(source), allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source}: no such folder, and the hub did not answer ({reason}); name a local folder"
        ) from error
    return found


def load_tokenizer(source: str | Path, decoder: Decoder):
    """The checkpoint's tokenizer and the ids that end a completion, from generation_config, then config, then tokenizer."""
    folder = find_checkpoint(source)
    with named_in_errors(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer("0").input_ids:  # what transformers makes of a folder without tokenizer files
        raise InputError(f"{source}: no tokenizer files")
    # added tokens may lie beyond the embedding (CodeLlama's <FILL_ME>): few texts hold one
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise InputError(
            f"{source}: {tokenizer.vocab_size} tokens in the tokenizer, {decoder.config.vocab_size} in the embedding"
        )
    for ids in ((decoder.generation_config or {}).get("eos_token_id"), decoder.hf_config.eos_token_id):
        if ids is not None:
            return tokenizer, list(ids) if isinstance(ids, list) else [ids]
    if tokenizer.eos_token_id is None:
        raise InputError(f"{source}: no end-of-sequence token in generation_config.json, config.json or the tokenizer")
    return tokenizer, [tokenizer.eos_token_id]


def sample_skip(num_layers: int, skip_ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """eq. (2): the layers that mu leaves out, (num_layers,) bool, uniform among the inner ones.

    `round(skip_ratio * num_layers)` of them; the first and the last layer always stay, and one inner layer at least.
    """
    count = round(skip_ratio * num_layers)
    if not 0 <= count <= max(num_layers - 3, 0):
        raise InputError(
            f"--skip-ratio {skip_ratio:g} would skip {count} of {num_layers} layers: "
            f"the first, the last and one inner layer stay, so at most {max(num_layers - 3, 0) / num_layers:.3f}"
        )
    skip = torch.zeros(num_layers, dtype=torch.bool)
    skip[1 + torch.randperm(max(num_layers - 2, 0), generator=generator)[:count]] = True
    return skip


def read_json(path: Path) -> dict:
    """A JSON file; InputError names the file where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error


def write_json(path: Path, value: dict):
    """Write a JSON file that people can read, in place of an older one only when it is whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)


def pick_device(name: str | None) -> torch.device:
    """The device of --device; by default CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
    return torch.device(name)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def load(source: str | Path, device: str | None, dtype: str | None) -> tuple[Decoder, object, list[int]]:
    """A decoder with its tokenizer and EOS ids.

    dtype: "float32", "float64", or "bfloat16": fp32 weights whose passes run in bf16 (the default on CUDA).
    """
    device = pick_device(device)
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    decoder = Decoder.from_pretrained(source, torch.float64 if dtype == "float64" else torch.float32, device)
    decoder.autocast = dtype == "bfloat16"
    tokenizer, eos_ids = load_tokenizer(source, decoder)
    return decoder, tokenizer, eos_ids
