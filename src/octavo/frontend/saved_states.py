"""A KV state's file, as its user hands it in."""

from pathlib import Path

from octavo.engine.messages import EngineInfo
from octavo.errors import InvalidKVState
from octavo.kv import root_key
from octavo.kv.state_file import StateFile


def read_saved_state(path: Path, info: EngineInfo, tenant: str, salt: str) -> list[int]:
    """The tokens of a state that was saved for this engine by this tenant with this salt. Raises InvalidKVState."""
    file = StateFile(path)
    file.close()
    if file.fingerprint != info.fingerprint:
        raise InvalidKVState(f"{path} is of another model, quantization or layout of the KV cache, or machine")
    if file.metadata.get("root") != root_key(info.fingerprint, tenant, salt).hex():
        raise InvalidKVState(f"{path} is of another tenant or cache_salt: name those that it was saved with")
    if not file.tokens or not all(0 <= token < info.vocab_size for token in file.tokens):
        raise InvalidKVState(f"{path} is no usable KV state: it has tokens that this model has not")
    return file.tokens
