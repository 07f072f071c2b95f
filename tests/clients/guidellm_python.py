"""guidellm: a short benchmark of the server, all of whose requests must succeed.

python guidellm_python.py URL TOKENIZER
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, tokenizer = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    command = [
        str(Path(sys.executable).with_name("guidellm")),
        "run",
        "--disable-console",
        *("--backend", f"kind=openai_http,target={url},model=tiny"),
        *("--profile", "kind=synchronous"),
        *("--constraint", "kind=max_requests,count=4"),
        *("--tokenizer", f"kind=hf_auto,model={tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--output", f"kind=json,path={folder}/report.json"),
    ]
    environment = os.environ | {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    log = done.stdout + done.stderr
    assert "completed" in log and "successful=4 errored=0" in log, log
