"""lm-evaluation-harness opens a saved directory and sees our log-probabilities.

It wants an environment of its own, and runs from another folder, where evaluate.py does not stand
in front of the package of that name:
LM_EVAL_PYTHON=/path/to/environment/bin/python python -m pytest tests/test_lm_eval.py
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from model import load
from reward import load_problems, make_prompt
from rollout import token_logp

PYTHON = os.environ.get("LM_EVAL_PYTHON")
if importlib.util.find_spec("lm_eval"):
    PYTHON = PYTHON or sys.executable
CHOICES = ["1", "4."]  # behind a digit all tokenizers split: both sides count the same tokens
TASK = """
task: small
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["1", "4."]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.skipif(PYTHON is None, reason="no lm_eval here, and no LM_EVAL_PYTHON that has it")
def test_the_harness_scores_a_saved_directory_as_our_decoder_does(toy_run, tmp_path):
    problems = load_problems("toy", "test", limit=6)
    prompts = [make_prompt(problem) + "That makes 1" for problem in problems]
    rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "small.yaml").write_text(TASK)
    flags = f"--model_args pretrained={toy_run},dtype=float32 --device cpu --log_samples"
    paths = "--include_path . --tasks small --output_path results"
    done = subprocess.run(
        [PYTHON, "-m", "lm_eval", "run", "--model", "hf", *flags.split(), *paths.split()],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    (file,) = (tmp_path / "results").rglob("samples_small_*.jsonl")
    seen = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        seen[row["doc_id"]] = [float(answer[0][0]) for answer in row["resps"]]
    model = load(toy_run, None, "float32")
    for number, prompt in enumerate(prompts):
        (start,) = model.encode([prompt])
        for choice, score in zip(CHOICES, seen[number], strict=True):
            tokens = torch.tensor(model.encode([prompt + choice]))
            with torch.no_grad():
                logits = model.logits(model(tokens))[:, :-1]
            logp = token_logp(logits, tokens[:, 1:])[0, len(start) - 1 :].sum().item()
            assert score == pytest.approx(logp, abs=1e-3)
