"""`octavo serve` under vLLM's module name: `python -m octavo.entrypoints.openai.api_server --model NAME`.

It may also be started by `torchrun --nproc_per_node=N -m octavo.entrypoints.openai.api_server`. As an engine starts its
ranks itself, the first of torchrun's processes on each machine does that, and the others have nothing to do.
"""

import os
import sys
from typing import NoReturn

from octavo.entrypoints.command import main as octavo


def main() -> NoReturn:
    """Run `octavo serve` with this process's arguments."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        sys.exit()
    sys.argv = ["octavo", "serve", *sys.argv[1:]]
    octavo()


if __name__ == "__main__":
    main()
