"""Checks of the installed software: Python, Octavo and the packages that it requires."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from octavo.version import __version__

from .finding import Finding, ok, stop

EXTRA = "server"
_NAMED = ("numpy", "tokenizers", "uvicorn")  # whose versions are printed


def check_installation() -> Iterator[Finding]:
    """Yield the findings about the installed software."""
    yield _python()
    yield _packages()


def _python() -> Finding:
    return ok("Python", f"{platform.python_implementation()} {platform.python_version()}, octavo {__version__}")


def _packages() -> Finding:
    """Compare the installed packages with the requirements of octavo[server]."""
    needed = [Requirement(line) for line in requires("octavo") or ()]
    extras = _with_nested(needed, EXTRA)
    applicable = [each for each in needed if each.name != "octavo" and _applies(each, extras)]
    wrong = [f"{each} ({found or 'missing'})" for each in applicable if not _satisfies(each, found := _installed(each))]
    if wrong:
        return stop("packages", f"wanted {', '.join(wrong)}: pip install 'octavo[{EXTRA}]=={__version__}'")
    named = ", ".join(f"{name} {version(name)}" for name in _NAMED)
    return ok("packages", f"all {len(applicable)} that octavo[{EXTRA}] requires, such as {named}")


def _with_nested(needed: list[Requirement], extra: str) -> set[str]:
    """Return an extra and those that it contains: octavo[server] requires octavo[cli]."""
    nested = {name for each in needed if each.name == "octavo" and _applies(each, {extra}) for name in each.extras}
    return {extra, *nested}


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def _installed(requirement: Requirement) -> str | None:
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return None


def _satisfies(requirement: Requirement, found: str | None) -> bool:
    return found is not None and requirement.specifier.contains(found, prereleases=True)
