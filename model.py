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
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import cached_file, logging

from reward import InputError, refuse_pointer

logging.disable_progress_bar()  # of every load and save
logging.set_verbosity_error()  # `from_pretrained` raises what matters
CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"  # in a chat template: the same prompts tomorrow
MEASURED = 16  # completions that tell what each layer is worth
OPT_OFFSET = 2  # OPT keeps two unused rows at the start of its position table


class ModelConfig:
    """What the decoder needs to know of a Hugging Face config; InputError for any feature that it would leave out."""

    def __init__(self, hf: PreTrainedConfig):
        opt, rope = hf.model_type == "opt", getattr(hf, "rope_parameters", None) or {}
        rope_type = rope.get("rope_type", "default")
        plain = rope_type == "default" or (rope_type == "linear" and rope["factor"] == 1)
        self.activation = hf.activation_function if opt else hf.hidden_act
        unsupported = {
            "quantization_config": getattr(hf, "quantization_config", None),
            f"activation {self.activation!r}": self.activation not in ACT2FN,
            "do_layer_norm_before=False": opt and not hf.do_layer_norm_before,
            "word_embed_proj_dim unlike hidden_size": opt and hf.word_embed_proj_dim != hf.hidden_size,
            "_remove_final_layer_norm=True": opt and hf._remove_final_layer_norm,
            f"rope_type={rope_type!r}": not plain and rope_type != "llama3",
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
            "sliding-window attention": {*(getattr(hf, "layer_types", None) or ())} - {"full_attention"},
        }
        for feature in (feature for feature, present in unsupported.items() if present):
            raise InputError(f"{hf.model_type} config: {feature} is not supported; use a checkpoint without it")
        self.vocab_size, self.max_positions = hf.vocab_size, hf.max_position_embeddings
        self.hidden_size, self.num_layers = hf.hidden_size, hf.num_hidden_layers
        self.num_heads = hf.num_attention_heads
        self.num_kv_heads = self.num_heads if opt else hf.num_key_value_heads  # fewer: grouped-query attention
        self.head_dim = getattr(hf, "head_dim", None) or self.hidden_size // self.num_heads
        self.mlp_size = hf.ffn_dim if opt else hf.intermediate_size
        self.gated_mlp = not opt  # SwiGLU: activation(gate) * up
        self.norm, self.norm_eps = ("layer", 1e-5) if opt else ("rms", hf.rms_norm_eps)
        self.norm_affine = hf.layer_norm_elementwise_affine if opt else True
        self.rope = None if opt else {"rope_type": "default"} | rope  # None: learned positions
        self.qkv_bias = hf.enable_bias if opt else hf.model_type == "qwen2" or hf.attention_bias
        self.out_bias = self.qkv_bias and hf.model_type != "qwen2"
        self.mlp_bias = hf.enable_bias if opt else getattr(hf, "mlp_bias", False)
        self.qk_norm = hf.model_type == "qwen3"
        self.tied_head = hf.tie_word_embeddings
        self.init_std = hf.init_std if opt else hf.initializer_range


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
    if rope["rope_type"] != "llama3":
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


class Attention(nn.Module):
    """Causal grouped-query attention with one fused projection for q, k and v."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, rope=None, cache=None, positions=None, visible=None) -> Tensor:
        """x: (N, T, d) -> (N, T, d). cache: (2, N, kv_heads, columns, head_dim).

        visible: added to the scores of one new token a row, (N * kv_heads, 1, columns), 0 or -inf; None: causal over T.
        """
        (N, T, _), (H, G, _) = x.shape, self.heads
        qkv = self.qkv(x).view(N, T, sum(self.heads), self.head_dim)
        qk, v = qkv.split((H + G, G), dim=2)  # (N, T, heads, head_dim)
        if self.q_norm is not None:  # in the precision of its weights, under autocast too
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
            # the queries that share a kv head in one product; on a CPU half the time of the call above
            q, (k, v) = q.reshape(N * G, H // G, self.head_dim).to(cache.dtype), cache.flatten(1, 2)
            scores = torch.baddbmm(visible, q, k.mT, alpha=self.head_dim**-0.5)  # (N * kv_heads, queries, columns)
            y = torch.bmm(scores.softmax(-1), v).view(N, H, 1, self.head_dim)
        return self.out(y.transpose(1, 2).reshape(N, T, H * self.head_dim))


class MLP(nn.Module):
    """SwiGLU with one fused projection for gate and up, or the plain two-layer kind."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.gated_mlp
        self.activation = ACT2FN[config.activation]
        self.up = nn.Linear(config.hidden_size, config.mlp_size * (2 if self.gated else 1), bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)

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
        out = F.linear(hidden.to(weight.dtype), weight, bias)
    return out if out.dtype == torch.float64 else out.float()


class Decoder(nn.Module):
    """pi_theta with its value head. `Decoder(hf_config)` draws new weights; `Decoder.from_pretrained` reads them."""

    def __init__(self, hf_config: PreTrainedConfig):
        super().__init__()
        self.hf_config = hf_config
        self.autocast = False  # True: layers compute in bf16 while the weights stay fp32
        self.gradient_checkpointing = False  # True: layers run again in backward, which then keeps one input a layer
        self.files = {}  # name -> content of the files that `save_pretrained` copies: tokenizer, generation_config.json
        self.tokenizer, self.eos_ids = None, []  # filled in by `load`
        self.config = config = ModelConfig(hf_config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.rope is None:
            self.embed_positions = nn.Embedding(config.max_positions + OPT_OFFSET, config.hidden_size)
        else:
            self.inv_freq = rope_frequencies(config)  # no buffer: `.to(bfloat16)` would round it
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.head = self.embed if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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

    def forward(self, tokens: Tensor, skip: Tensor | None = None, cache=None, positions=None) -> Tensor:
        """Hidden states after the final norm, (N, T, d), of tokens (N, T) int64.

        skip: (num_layers,) bool, True = this layer is left out: the nested model mu of eq. (2). None: the full model.
        Without positions: column t is position t, each token sees itself and what stands before it. Padding on the right
        needs no mask, since nothing to its left can see it. Keys and values go into the cache (see `new_cache`), if any.
        With positions, (N, 1) int64: one new token a row, at that column of the cache; it sees columns 0..positions. The
        caller owns the position; no layer decides it. Slice the cache to the live columns to pay for no others.
        """
        N, visible = len(tokens), None
        if N == 0:  # a process whose share is empty takes part in the pass all the same, with a row that counts nowhere
            tokens = tokens.new_zeros(1, tokens.shape[1])
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        else:
            unseen = torch.arange(cache.shape[4], device=tokens.device) > positions[:, None]  # (N, 1, columns)
            visible = torch.zeros_like(unseen, dtype=cache.dtype).masked_fill_(unseen, -torch.inf)
            visible = visible.repeat_interleave(cache.shape[3], 0)  # (N * kv_heads, 1, columns)
        x, rope = self.embed(tokens), None  # (N, T, d)
        if self.config.rope is None:
            x = x + self.embed_positions(positions + OPT_OFFSET)
        else:
            self.inv_freq = self.inv_freq.to(tokens.device)  # copied once, which a CUDA graph may not do
            angle = positions[:, :, None, None] * self.inv_freq  # (N or 1, T, 1, head_dim / 2)
            cos, sin = angle.cos(), angle.sin()
            rope = torch.cat([cos, cos], -1).to(x.dtype), torch.cat([-sin, sin], -1).to(x.dtype)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            for i, layer in enumerate(self.kept_layers(skip)):
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(layer, x, rope, use_reentrant=False)
                else:
                    x = layer(x, rope, None if cache is None else cache[i], positions, visible)
        x = self.norm(x)
        return x if N else x[:0].clone()  # FSDP warns of a view

    def kept_layers(self, skip: Tensor | None) -> list[Layer]:
        """The layers that run. `skip` is read once: a test per layer on a tensor is one GPU synchronisation per layer."""
        if skip is None:
            return list(self.layers)
        return [layer for layer, skipped in zip(self.layers, skip.tolist(), strict=True) if not skipped]

    def new_cache(self, rows: int, columns: int, skip: Tensor | None = None) -> Tensor:
        """An empty KV cache, (kept layers, 2, rows, kv_heads, columns, head_dim): a skipped layer owns none of it."""
        shape = len(self.kept_layers(skip)), 2, rows, self.config.num_kv_heads, columns, self.config.head_dim
        return self.embed.weight.new_zeros(shape, dtype=torch.bfloat16 if self.autocast else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., vocab), in at least fp32."""
        return project(hidden, self.head.weight)

    def values(self, hidden: Tensor) -> Tensor:
        """V_phi(s_t), (..., d) -> (...): one linear layer on the last hidden state, in at least fp32."""
        return project(hidden, self.value_head.weight, self.value_head.bias).squeeze(-1)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, no special ones around them; a control token that is spelled in a text stays text."""
        with named_in_errors("a problem, as text for the tokenizer,"):
            return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids

    def encode_chats(self, chats: list[list[tuple[str, str]]], prompt: bool = True) -> list[list[int]]:
        """Token ids of chats, (role, text) a turn, in the words of the chat template; texts as in `encode`."""
        with named_in_errors("the chat template (--prompt-style reft goes without)"):
            turns = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
            how = {"chat_template": CLOCK + self.tokenizer.get_chat_template(), "add_generation_prompt": prompt}
            # transformers before 5.20 does not know the sanitizing, and reads a control token in a text as one
            return self.tokenizer.apply_chat_template(turns, **how, sanitize_control_tokens=True, return_dict=False)

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> "Decoder":
        """Read a Hugging Face directory or hub id; `value_head.pt` too where there is one, else V_phi = 0."""
        check_checkpoint(source)
        where = source if Path(source).exists() else f"{source} (no local folder of that name)"
        with named_in_errors(f"{where}, config.json"):
            raw, _ = PreTrainedConfig.get_config_dict(source)
            if (kind := raw.get("model_type")) not in ("llama", "qwen2", "qwen3", "opt"):
                raise InputError(f"{source}: unknown architecture {kind!r}; supported: llama, qwen2, qwen3, opt")
            hf_config = AutoConfig.from_pretrained(source, trust_remote_code=False)  # nor asks on the terminal
            config = ModelConfig(hf_config)  # refused before the weights are read
            hf_config.eos_token_id = raw.get("eos_token_id")  # transformers fills in a default
        with named_in_errors(f"{where}, model.safetensors or what stands for it"):
            how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below
            hf, report = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **how)
            names = (*COPIED, "value_head.pt")
            found = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names}
        trl = any(name.startswith("v_head.") for name in report["unexpected_keys"])  # a critic among the weights
        report["unexpected_keys"] = {name for name in report["unexpected_keys"] if not name.endswith(IGNORED)}
        if wrong := {f"{len(names)} {kind}": sorted(map(str, names))[:2] for kind, names in report.items() if names}:
            raise InputError(f"{source}: the weights do not belong to config.json: {str(wrong)[:400]}")
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be read
            decoder = cls(hf_config).to(dtype)
        decoder.to_empty(device=device)
        head, theirs = found.pop("value_head.pt"), hf.state_dict()
        decoder.files = {name: Path(file).read_bytes() for name, file in found.items() if file}
        for name, view in hf_views(config, decoder.state_dict()).items():
            view.copy_(theirs[name])
        if config.tied_head and not torch.equal(theirs["lm_head.weight"], hf.get_input_embeddings().weight):
            raise InputError(f"{source}: lm_head.weight is its own; set tie_word_embeddings to false in config.json")
        folder = Path(cached_file(source, "config.json")).parent
        among_weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if trl else []
        read_value_head(decoder.value_head, [Path(head)] if head else among_weights)
        if not all(p.isfinite().all() for p in decoder.parameters()):
            raise InputError(f"{source}: a weight is nan or infinite; take an earlier checkpoint")
        return decoder

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None):
        """A folder that AutoModelForCausalLM opens, and value_head.pt. weights: ours, where they are not in this process."""
        weights = self.state_dict() if weights is None else weights
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(self.hf_config, dtype=self.embed.weight.dtype)
        views = hf_views(self.config, weights)
        hf.save_pretrained(folder, state_dict={name: view.detach().cpu().contiguous() for name, view in views.items()})
        if rope := self.config.rope:  # transformers 5 writes rope_parameters only; older readers look for these
            old = {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else rope}
            write_json(Path(folder) / "config.json", read_json(Path(folder) / "config.json") | old)
        for file in Path(folder).glob("*.safetensors"):  # which safetensors lets only their owner read
            file.chmod((Path(folder) / "config.json").stat().st_mode)
        for name, content in self.files.items():  # the source's own: older readers fail on a new version
            (Path(folder) / name).write_bytes(content)
        head = {name: weights[f"value_head.{name}"].clone() for name in ("weight", "bias")}
        torch.save(head, Path(folder) / "value_head.pt")  # inference servers load every .safetensors of a folder


COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
IGNORED = ("v_head.summary.weight", "v_head.summary.bias", ".q_scale", ".k_scale", ".v_scale", ".kv_scale")
LOCAL = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local", "local_files_only")
NAMES = {  # ours: theirs in Llama, Qwen2 and Qwen3; theirs in OPT. Several: the parts of a fused weight, in this order
    "embed": ("model.embed_tokens", "model.decoder.embed_tokens"),
    "embed_positions": ("", "model.decoder.embed_positions"),
    "layers": ("model.layers", "model.decoder.layers"),
    "attention_norm": ("input_layernorm", "self_attn_layer_norm"),
    "attention.qkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj",) * 2,
    "attention.q_norm": ("self_attn.q_norm", ""),
    "attention.k_norm": ("self_attn.k_norm", ""),
    "attention.out": ("self_attn.o_proj", "self_attn.out_proj"),
    "mlp_norm": ("post_attention_layernorm", "final_layer_norm"),
    "mlp.up": ("mlp.gate_proj mlp.up_proj", "fc1"),
    "mlp.down": ("mlp.down_proj", "fc2"),
    "norm": ("model.norm", "model.decoder.final_layer_norm"),
    "head": ("lm_head", "lm_head"),
}


def hf_views(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their Hugging Face names, as views: reading writes into them, saving reads from them."""
    opt, views = config.rope is None, {}
    heads = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    rows = {"attention.qkv": heads, "mlp.up": [config.mlp_size] * (2 if config.gated_mlp else 1)}  # of fused weights
    for name, weight in weights.items():
        module, kind = name.rsplit(".", 1)  # "layers.3.mlp.up", "weight"
        prefix = ""
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            prefix = f"{NAMES['layers'][opt]}.{number}."
        if module != "value_head" and not (module == "head" and config.tied_head):
            for part, view in zip(NAMES[module][opt].split(), weight.split(rows.get(module, len(weight))), strict=True):
                views[f"{prefix}{part}.{kind}"] = view
    return views


def read_value_head(value_head: nn.Linear, files: list[Path]):
    """V_phi of the file that has one, value_head.pt or what TRL writes; else 0 everywhere."""
    for parameter in value_head.parameters():
        nn.init.zeros_(parameter)
    for file in files:
        with named_in_errors(file):
            weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
            head = {name.removeprefix("v_head.summary."): weight for name, weight in weights.items()}
            if "weight" in head:
                value_head.load_state_dict({name: head[name] for name in ("weight", "bias")})


def portable(content: bytes) -> bytes:
    """A tokenizer_config.json in words that transformers 4 knows and without local paths; the same bytes if it is so."""
    old = json.loads(content)
    new = {name: value for name, value in old.items() if name not in LOCAL}
    if new.get("tokenizer_class") == "TokenizersBackend":
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(new.get("extra_special_tokens"), list):
        new["additional_special_tokens"] = new.pop("extra_special_tokens")
    return content if new == old else json.dumps(new, indent=2).encode()


def check_checkpoint(source: str | Path):
    """InputError for a file or folder that is no checkpoint; hub ids pass."""
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").exists():
        lora = (folder / "adapter_config.json").exists()
        what = "a LoRA adapter; merge it into its base model first" if lora else "a folder with config.json"
        raise InputError(f"{source}: not a checkpoint ({what})")
    for file in folder.glob("*"):
        refuse_pointer(file)


@contextlib.contextmanager
def named_in_errors(file: str | Path):
    """Whatever a library says of a broken file becomes one line that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: cannot be read ({type(error).__name__}: {reason})") from error


def load(source: str | Path, device: str | None, dtype: str | None) -> Decoder:
    """A decoder with tokenizer and EOS ids. dtype "bfloat16": fp32 weights, passes in bf16 (the default on CUDA)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    decoder = Decoder.from_pretrained(source, torch.float64 if dtype == "float64" else torch.float32, device)
    decoder.autocast = dtype == "bfloat16"
    pieces = "tokenizer.model" in decoder.files and "tokenizer.json" not in decoder.files
    with named_in_errors(f"{source}, tokenizer.{'model, for which sentencepiece is needed' if pieces else 'json'}"):
        decoder.tokenizer = tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if "tokenizer_config.json" in decoder.files:
            decoder.files["tokenizer_config.json"] = portable(decoder.files["tokenizer_config.json"])
    rows = decoder.config.vocab_size
    if not 1 < tokenizer.vocab_size <= rows:  # added tokens may lie beyond (CodeLlama's <FILL_ME>): few texts hold one
        raise InputError(f"{source}: tokenizer of {tokenizer.vocab_size} tokens, embedding of {rows} rows")
    with named_in_errors(f"{source}, generation_config.json"):
        generation = json.loads(decoder.files.get("generation_config.json", b"{}"))
    stated = (generation.get("eos_token_id"), decoder.hf_config.eos_token_id)
    ids = [i for one in stated if one is not None for i in (one if isinstance(one, list) else [one])]
    if (not ids or tokenizer.chat_template) and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids or not all(type(i) is int and 0 <= i < rows for i in ids):
        raise InputError(f"{source}: end-of-sequence ids {ids} in its configs; it needs one, and all below {rows}")
    decoder.eos_ids = list(dict.fromkeys(ids))
    return decoder


def sample_skip(num_layers: int, skip_ratio: float, generator=None, pool: list[int] | None = None) -> Tensor:
    """eq. (2): the layers that mu leaves out, (num_layers,) bool, `round(skip_ratio * num_layers)` of `pool`, uniformly.

    pool None: all inner layers, as in the paper; `rollout.skip_pool` is ours. One inner layer stays at least.
    """
    count, inner = round(skip_ratio * num_layers), range(1, num_layers - 1)
    most = max(min(len(inner) - 1, num_layers if pool is None else len(pool)), 0)
    if not 0 <= count <= most or (skip_ratio > 0 and not count):
        asked = f"--skip-ratio {skip_ratio:g} would leave out {count} of {num_layers} layers"
        raise InputError(f"{asked}: take 0, or {1 / num_layers:.3g} (one layer) to {most / num_layers:.3g}")
    pool = torch.tensor([*(inner if pool is None else pool)], dtype=torch.int64)
    skip = torch.zeros(num_layers, dtype=torch.bool)
    skip[pool[torch.randperm(len(pool), generator=generator)[:count]]] = True
    return skip


@torch.no_grad()
def nested_kl(model: Decoder, pairs: list[tuple[list[int], list[int]]], skips: Tensor) -> Tensor:
    """KL(mu || pi) per token under each mask, (masks,): exact over the vocabulary, at the tokens of the completions.

    pairs: (prompt, completion) ids. skips: (masks, num_layers) bool; `torch.eye(num_layers) > 0`: each layer by itself.
    """
    kl = torch.zeros(len(skips), dtype=torch.float64)
    for prompt, completion in pairs:  # one by one: (actions, vocab) can be large
        tokens = torch.tensor([prompt + completion], device=model.embed.weight.device)
        log_pi = model.logits(model(tokens)[0, len(prompt) - 1 : -1]).log_softmax(-1)  # (actions, vocab)
        for i, skip in enumerate(skips):
            log_mu = model.logits(model(tokens, skip)[0, len(prompt) - 1 : -1]).log_softmax(-1)
            kl[i] += (log_mu.exp() * (log_mu - log_pi)).sum().item()
    return kl / sum(len(completion) for _, completion in pairs)


def measure_layers(model: Decoder, pairs: list[tuple[list[int], list[int]]]):
    """What each layer is worth: KL(mu||pi) per token without it. Once: `config.json` carries it to every later run."""
    if not getattr(model.hf_config, "layer_kl", None):
        model.hf_config.layer_kl = nested_kl(model, pairs, torch.eye(len(model.layers)) > 0).tolist()


def read_json(path: Path) -> dict:
    """A JSON file; InputError names the file where it is broken."""
    with named_in_errors(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict):
    """Write a JSON file that people can read, in place of an older one only when it is whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- several processes, started by torchrun: weights sharded with FSDP2, rows shared out; else all of it does nothing ---


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; the first one alone prints."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # torchrun ends all processes when one fails; the timeout must outlast a checkpoint, which one process writes
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if rank() == 0 else nowhere):
        yield
    dist.destroy_process_group()  # not after an error: it would wait for the others, and they for this process


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x := x.clone())
    return x


def gather(x) -> list:
    """x of every process, by rank; tensors must be on the CPU."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def shard(model: Decoder):
    """FSDP2: every process keeps its part of the weights, gradients and moments; a layer is gathered while it runs."""
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(model.embed.weight.device.type, (world_size(),))
    for module in (*model.layers, model):  # the outermost one's weights stay gathered: the head runs outside of it
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # a sum: the loss has been divided by the tokens of all processes
        module.set_force_sum_reduction_for_comms(True)  # gloo knows neither averages nor factors


@contextlib.contextmanager
def gathered(model: Decoder) -> Iterator[None]:
    """All weights on every process: passes in here wait for nobody, so that each process may make as many as it needs."""
    blocks = (*model.layers, model) if isinstance(model, FSDPModule) else ()
    for block in blocks:
        block.unshard()
        block.set_reshard_after_forward(False, recurse=False)
    yield
    for block in blocks:
        block.reshard()
        block.set_reshard_after_forward(block is not model, recurse=False)


def add(parameter: nn.Parameter, change: Tensor):
    """parameter += change, outside of autograd; of a sharded one each process takes its part."""
    change = change.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        change = distribute_tensor(change, parameter.device_mesh, parameter.placements)
    parameter.data += change


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in one piece; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
