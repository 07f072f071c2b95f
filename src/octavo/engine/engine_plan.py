"""EnginePlan: what an engine decides when it loads, from settings, model and free memory, and why."""

import msgspec

from octavo.backends.base import Footprint
from octavo.config import DTYPES, EngineConfig
from octavo.errors import OutOfMemory
from octavo.kv import pages_for

_WEIGHTS = {"none": "bfloat16", "auto": "as the files store them", "8bit": "8 bits", "4bit": "4 bits"}


class EnginePlan(msgspec.Struct, frozen=True):
    """The decisions of one engine.

    Attributes:
        kernels, weight_bytes, page_bytes: see Footprint.
        threads: compute threads, of each rank, and whether a setting says so; 0 on a GPU.
        ranks: processes over which the model is divided.
            On GPUs, sizes are those of one of them.
        nodes: machines over which these are divided. Sizes, pages and threads are then those of this one.
        whole_attention: whether each of them has all heads.
        weights: format of the weights, in words.
        num_pages, page_size: pages of the KV pool, and tokens in a page.
        bound: what limits `num_pages`, in words.
        max_model_len: tokens of the longest sequence that the settings and the model allow.
        max_batch_size: sequences that may run at the same time.
    """

    kernels: str
    threads: int
    threads_are_set: bool
    weights: str
    weight_bytes: int
    page_bytes: int
    page_size: int
    num_pages: int
    bound: str
    max_model_len: int
    max_batch_size: int
    ranks: int = 1
    nodes: int = 1
    whole_attention: bool = False

    @property
    def contexts(self) -> int:
        """Return how many sequences of max_model_len tokens the KV pool holds."""
        return self.num_pages // pages_for(self.max_model_len, self.page_size)

    def lines(self) -> dict[str, str]:
        """Return each decision and its reason, for people, by its subject."""
        tokens = self.num_pages * self.page_size
        why = "as set" if self.threads_are_set else "one for each available processor"
        kv = f"{self.num_pages:,} pages of {self.page_size} tokens, {size(self.num_pages * self.page_bytes)}"
        contexts = (
            f"{self.contexts:,} of {self.max_model_len:,} tokens fit"
            if self.contexts
            else f"none of {self.max_model_len:,} tokens fits: a request may have {tokens:,} tokens"
        )
        threads = f"{self.threads} {'thread' if self.threads == 1 else 'threads'}"
        on = f" on {self.nodes} machines" if self.nodes > 1 else ""
        ranks = f"{self.ranks} processes{on}, each with its part of the weights"
        if not self.threads:
            ranks = f"{self.ranks} GPUs, each with its part of the weights; all sizes are those of one GPU"
        if self.whole_attention:
            ranks += "; the heads cannot be divided, so each has the KV cache of all of them"
        by = f", {threads}{' in each rank' if self.ranks > 1 else ''} ({why})" if self.threads else ""
        return {
            "kernels": f"{self.kernels}{by}",
            **({"ranks": ranks} if self.ranks > 1 else {}),
            "weights": f"{size(self.weight_bytes)}, {self.weights}",
            "KV cache": f"{kv} ({self.bound})",
            "contexts": f"{contexts}; {self.max_batch_size:,} sequences run at the same time at most (max_batch_size)",
        }


def make_plan(
    config: EngineConfig,
    footprint: Footprint,
    max_model_len: int,
    threads: int,
    most: int,
    share: str,
    whole_attention: bool = False,
) -> EnginePlan:
    """Return the decisions for an engine whose weights have their memory already.

    The KV pool is as large as kv_cache_memory says, or else large enough for a full batch of long sequences, but at
    most `most` bytes, which are the part `share` of the memory.

    Raises OutOfMemory if the pool is too small for one page, or for an explicit max_model_len.
    """
    page_size, page_bytes = config.kv_cache_page_size, footprint.page_bytes
    pages_per_sequence = pages_for(max_model_len, page_size)
    full_batch = config.max_batch_size * pages_per_sequence
    if config.kv_cache_memory is not None:
        num_pages, bound = config.kv_cache_memory // page_bytes, "kv_cache_memory"
    elif full_batch <= most // page_bytes:
        num_pages, bound = full_batch, "all that max_batch_size sequences can use"
    else:
        num_pages, bound = most // page_bytes, share
    needed = pages_per_sequence if config.max_model_len else 1
    if num_pages < needed:
        raise OutOfMemory(
            f"the KV cache holds {num_pages * page_size} tokens, less than {needed * page_size}: "
            f"set kv_cache_memory to at least {needed * page_bytes / 2**20:.0f}MiB, or a smaller max_model_len"
        )
    return EnginePlan(
        kernels=footprint.kernels,
        threads=0 if config.backend_name == "cuda" else threads,
        threads_are_set=config.threads is not None,
        weights=_weights(config),
        weight_bytes=footprint.weight_bytes,
        page_bytes=page_bytes,
        page_size=page_size,
        num_pages=num_pages,
        bound=bound,
        max_model_len=max_model_len,
        max_batch_size=config.max_batch_size,
        ranks=config.tensor_parallel_size,
        nodes=config.nnodes,
        whole_attention=whole_attention,
    )


def _weights(config: EngineConfig) -> str:
    """Return the format of the weights, in words. Only the cpu backend keeps that of the files."""
    if config.backend_name != "cpu" and config.quantization in ("auto", "none"):
        return "float32" if DTYPES[config.dtype] == "float32" else "bfloat16"
    return _WEIGHTS[config.quantization]


def size(bytes: int) -> str:
    """Return a number of bytes in MiB or GiB, such as 1.25 GiB."""
    return f"{bytes / 2**30:,.2f} GiB" if bytes >= 2**30 else f"{bytes / 2**20:,.0f} MiB"
