"""guidellm: a short benchmark of the server, all of whose requests must succeed.

python guidellm_python.py URL TOKENIZER
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, tokenizer = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.json")
    command = [
        Path(sys.executable).with_name("guidellm"),
        "benchmark",
        "run",
        *("--target", url, "--model", "tiny", "--processor", tokenizer),
        *("--profile", "concurrent", "--rate", "2", "--max-requests", "6"),
        *("--data", "prompt_tokens=16,output_tokens=8"),
        *("--output-path", report),
    ]
    environment = os.environ | {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, env=environment, check=True)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
