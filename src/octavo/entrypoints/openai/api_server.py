"""vLLM's way to start: `python -m octavo.entrypoints.openai.api_server --model NAME` is `octavo serve NAME`."""

import sys
from typing import NoReturn

from octavo.entrypoints.command import main as octavo


def main() -> NoReturn:
    sys.argv = ["octavo", "serve", *sys.argv[1:]]
    octavo()


if __name__ == "__main__":
    main()
