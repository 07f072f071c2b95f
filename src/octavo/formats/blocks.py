"""The tensor formats that Octavo reads, parsed from block_formats.def, which the native kernels include too."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BlockFormat:
    """A format of a tensor's rows: blocks of `values` values in `nbytes` bytes each.

    `number` is the GGML type in GGUF files; 1000 and above are Octavo's own, which do not occur in files.
    """

    name: str
    number: int
    values: int
    nbytes: int


def _read_table() -> dict[str, BlockFormat]:
    text = Path(__file__).with_name("block_formats.def").read_text(encoding="ascii")
    rows = re.findall(r"^OCTAVO_FORMAT\((\w+), (\d+), (\d+), (\d+)\)", text, re.MULTILINE)
    return {name: BlockFormat(name, *map(int, numbers)) for name, *numbers in rows}


BLOCK_FORMATS = _read_table()  # by name
GGML_TYPES = {format.number: format for format in BLOCK_FORMATS.values() if format.number < 1000}
