"""lm-eval on three local tasks: likelihoods of choices, rolling likelihood of a text, and generation until a stop.

    python lm_eval_python.py URL TOKENIZER

Rolling likelihood must be the sum of the server's own prompt_logprobs.
"""

import json
import math
import os
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

folder = tempfile.TemporaryDirectory()
os.environ |= {"HF_HOME": folder.name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

url, path = sys.argv[1:]
text = "The module defines a class. " * 8 + "It is used by the import statement, é and 雪."
documents = [
    {"question": "An object is a", "choices": [" class", " name", " module"], "gold": number, "text": text}
    for number in range(3)
]
data = Path(folder.name, "documents.jsonl")
data.write_text("\n".join(map(json.dumps, documents)))
shared: dict[str, Any] = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
tasks: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}
for name, task in tasks.items():
    Path(folder.name, f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))  # JSON is YAML

results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": "tiny",
        "base_url": f"{url}/v1/completions",
        "tokenizer": path,
        "num_concurrent": 4,
        "max_length": 512,
    },
    tasks=list(tasks),
    task_manager=TaskManager(include_path=folder.name),
    bootstrap_iters=0,
)["results"]
assert 0 <= results["local_choice"]["acc,none"] <= 1
assert 0 <= results["local_generation"]["exact_match,none"] <= 1

tokenizer = AutoTokenizer.from_pretrained(path)
prompt = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
body = {"model": "tiny", "prompt": prompt, "max_tokens": 0, "prompt_logprobs": 0}
request = urllib.request.Request(
    f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
scored = json.load(urllib.request.urlopen(request))["choices"][0]["prompt_logprobs"]
total = sum(entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], scored[1:], strict=True))
expected = -total / math.log(2) / len(text.encode())
found = results["local_rolling"]["bits_per_byte,none"]
assert math.isclose(found, expected, rel_tol=1e-6), (found, expected)
