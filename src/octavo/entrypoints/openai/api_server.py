"""`octavo serve` under vLLM's module name: `python -m octavo.entrypoints.openai.api_server --model NAME`."""

import sys
from typing import NoReturn

from octavo.entrypoints.command import main as octavo


def main() -> NoReturn:
    """Run `octavo serve` with this process's arguments."""
    sys.argv = ["octavo", "serve", *sys.argv[1:]]
    octavo()


if __name__ == "__main__":
    main()
