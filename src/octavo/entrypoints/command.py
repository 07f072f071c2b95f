"""The installed command `octavo`: run octavo.cli, or print which extra must be installed."""

import re
import sys
from importlib.metadata import requires
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. Exit with code 2 and one line if the packages of an extra are not installed."""
    try:
        from octavo.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = _extra_with(package)
        if extra is None:
            raise
        print(f"octavo: this command needs {package}: pip install 'octavo[{extra}]'", file=sys.stderr)
        sys.exit(2)


def _extra_with(package: str) -> str | None:
    """Return the name of Octavo's extra that installs this package, or None."""
    for requirement in requires("octavo") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name and extra and name[0].lower() == package.lower():
            return extra[1]
    return None
