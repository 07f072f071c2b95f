"""ModelFiles: the small files of a model, without its weights, which an engine sends to its frontends."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from octavo.errors import OctavoError
from octavo.formats.files import ModelPath, read_file
from octavo.text import Tokenizer
from octavo.text.tokenizer import MAX_TOKENIZER_BYTES
from octavo.version import __version__
from octavo.weights import generation_defaults

_NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"),
    "additional_chat_templates/tool_use.jinja",
)
_IN_JSON = {"max_tokens": "max_new_tokens"}  # names of sampling parameters that differ in generation_config.json


@dataclass(frozen=True)
class ModelFiles:
    """The files that Tokenizer.load and generation_defaults read from a directory: content by name."""

    content: Mapping[str, bytes]

    @classmethod
    def read(cls, path: ModelPath) -> "ModelFiles":
        """Read the files of a directory, or make those of a .gguf file. Raises the errors of Tokenizer.load."""
        if not path.is_dir():
            return cls(_of_gguf(path))
        files = {name: path / name for name in _NAMES}
        return cls({name: read_file(file, MAX_TOKENIZER_BYTES) for name, file in files.items() if file.exists()})

    @property
    def digest(self) -> str:
        """Return what identifies the content, and this version of Octavo."""
        hashed = blake2b(__version__.encode(), digest_size=16)
        for name in sorted(self.content):
            hashed.update(f"\n{name} {len(self.content[name])}\n".encode() + self.content[name])
        return hashed.hexdigest()

    @contextmanager
    def in_folder(self) -> Iterator[Path]:
        """Keep the files in a folder for a `with` block."""
        with tempfile.TemporaryDirectory(prefix="octavo-model-") as name:
            folder = Path(name)
            for file in _NAMES:  # no other names: the content may come from another machine
                if file in self.content:
                    (folder / file).parent.mkdir(exist_ok=True)
                    (folder / file).write_bytes(self.content[file])
            yield folder


def _of_gguf(path: ModelPath) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="octavo-model-") as name:
        folder = Path(name)
        Tokenizer.load(path).save(folder)
        generation = folder / "generation_config.json"
        try:
            defaults = generation_defaults(path)
        except OctavoError:  # a frontend that does not want them must not fail; one that does gets Octavo's own
            defaults = {}
        known = {_IN_JSON.get(field, field): value for field, value in defaults.items()}
        generation.write_text(json.dumps({**json.loads(generation.read_text()), **known}))
        return {file: (folder / file).read_bytes() for file in _NAMES if (folder / file).exists()}
