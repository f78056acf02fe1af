"""transformers 4.57 opens a saved directory with equal ids and logits.

Where the source is one that it opens: the tokenizer's files are copied. It wants an environment:
TRANSFORMERS4_PYTHON=/path/to/environment/bin/python python -m pytest tests/test_transformers4.py
"""

import json
import os
import subprocess

import pytest
import torch
from test_pipelines import make_checkpoint

from model import load

PYTHON = os.environ.get("TRANSFORMERS4_PYTHON")
TEXTS = ["Question:\n12 + 30 = 42?", " spaces  and\n\nlines ", "a<|im_end|>b<|eot_id|>c<eos>"]
READER = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.57")
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
ids = tokenizer(json.loads(sys.argv[2])).input_ids
with torch.no_grad():
    logits = model(torch.tensor([ids[0]])).logits[0, -1].tolist()
eos = model.generation_config.eos_token_id
print(json.dumps([ids, logits, eos if isinstance(eos, list) else [eos]]))
"""
NAMES = ["toy", "llama3.1-instruct", "qwen2.5-math-instruct", "qwen3", "galactica"]


@pytest.mark.skipif(PYTHON is None, reason="TRANSFORMERS4_PYTHON names no Python")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_4_reads_equal_ids_and_logits(name, toy_run, tmp_path):
    source = toy_run
    if name != "toy":
        source = make_checkpoint(name, tmp_path / "source")
        file = source / "tokenizer_config.json"
        config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.pop("extra_special_tokens", None)
        file.write_text(json.dumps(config))
    model = load(source, None, "float32")
    model.save_pretrained(tmp_path / "run")
    command = [PYTHON, "-c", READER, str(tmp_path / "run"), json.dumps(TEXTS)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    output = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    ids, logits, eos = json.loads(output.splitlines()[-1])
    assert ids == model.tokenizer(TEXTS).input_ids and set(eos) <= set(model.eos_ids)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([ids[0]])))[0, -1]
    assert (torch.tensor(logits) - expected).abs().max() < 1e-4
