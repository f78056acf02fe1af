"""lm-evaluation-harness opens a saved directory and sees our log-probabilities.

It wants an environment of its own and runs from another folder, where evaluate.py does not stand in front of the package of
that name: LM_EVAL_PYTHON=/path/to/environment/bin/python python -m pytest tests/test_lm_eval.py
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

PYTHON = os.environ.get("LM_EVAL_PYTHON", sys.executable if importlib.util.find_spec("lm_eval") else None)
CHOICES = ["1", "4."]  # after a digit: there every tokenizer of ours parts, so that both sides count the same tokens
TASK = """
task: small
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: {choices}
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(PYTHON is None, reason="lm_eval is not installed here, and LM_EVAL_PYTHON names no other Python")
def test_the_harness_scores_a_saved_directory_as_our_decoder_does(toy_run, tmp_path):
    prompts = [make_prompt(problem) + "That makes 1" for problem in load_problems("toy", "test", limit=6)]
    rows = [json.dumps({"prompt": prompt, "label": i % 2}) for i, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "small.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl", choices=json.dumps(CHOICES)))
    model_args = f"pretrained={toy_run},dtype=float32"
    command = [PYTHON, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--tasks", "small", "--output_path", "results", "--log_samples"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

    model = load(toy_run, None, "float32")
    expected, right = [], 0
    for i, prompt in enumerate(prompts):
        start, logps = len(model.tokenizer(prompt).input_ids), []
        for choice in CHOICES:
            tokens = torch.tensor([model.tokenizer(prompt + choice).input_ids])
            with torch.no_grad():
                logp = token_logp(model.logits(model(tokens))[:, :-1], tokens[:, 1:])  # (1, T-1)
            logps.append(logp[0, start - 1 :].sum().item())
        expected.append(logps)
        right += logps[i % 2] > logps[1 - i % 2]
    (samples,) = (tmp_path / "results").rglob("samples_small_*.jsonl")
    seen = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    for row, logps in zip(seen, expected, strict=True):
        assert [float(answer[0][0]) for answer in row["resps"]] == pytest.approx(logps, abs=1e-3)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["small"]["acc,none"] == pytest.approx(right / 6)
