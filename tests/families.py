"""Small random checkpoints of every family, with the config features that the real ones have."""

from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
GATED = SMALL | {"intermediate_size": 48}
CODELLAMA = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OPT = SMALL | {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
GALACTICA = OPT | {
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "activation_function": "gelu",
}
BIASED = GATED | {"attention_bias": True, "mlp_bias": True, "head_dim": 10}
GROUPED = GATED | {"num_key_value_heads": 2}
CONFIGS = {
    "codellama": partial(LlamaConfig, **GATED, rope_parameters=CODELLAMA),
    "llama3": partial(LlamaConfig, **GATED, num_key_value_heads=1, rope_parameters=LLAMA3),
    "llama-biased": partial(LlamaConfig, **BIASED),
    "qwen2": partial(Qwen2Config, **GROUPED, tie_word_embeddings=True),
    "qwen3": partial(Qwen3Config, **GROUPED, head_dim=16),
    "opt": partial(OPTConfig, **OPT),
    "galactica": partial(OPTConfig, **GALACTICA),
}


def random_hf_model(family: str, seed: int = 0):
    """A transformers model with every weight random: norms and biases start at 1 and 0 else."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
