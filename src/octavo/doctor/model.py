"""Checks of a model: whether it would load, and how much memory, how many KV pages and contexts there would be."""

from collections.abc import Iterator

from octavo.config import EngineConfig
from octavo.engine.engine_plan import EnginePlan, size
from octavo.engine.loading import plan_engine
from octavo.errors import OctavoError
from octavo.fleet.memory import ENGINE, SERVER
from octavo.machine import available_memory
from octavo.text import Tokenizer
from octavo.weights import model_files

from .finding import Finding, change, ok, stop


def check_model(config: EngineConfig) -> Iterator[Finding]:
    """Yield the findings about the model that the settings name. Reads no weights and downloads nothing."""
    try:
        path = model_files(config, download=False)
        tokenizer = Tokenizer.load(path)
        plan = plan_engine(config, path)
    except OctavoError as error:
        yield stop("model", str(error))
        return
    template = "with a chat template" if tokenizer.has_chat_template else "without a chat template, so it cannot chat"
    engines = f"; the following is for each of {count} engines" if (count := config.data_parallel_size) > 1 else ""
    yield ok("model", f"{config.model} can be loaded from {path}, {template}{engines}")
    lines = plan.lines()
    yield ok("weights", lines["weights"])
    yield _kv(config, plan, lines["KV cache"])
    yield _contexts(plan, lines["contexts"])


def _kv(config: EngineConfig, plan: EnginePlan, found: str) -> Finding:
    """Return whether the memory suffices for the weights, the KV cache and the processes of all engines."""
    if config.backend_name == "cuda":  # planned from what the GPU has free
        return ok("KV cache", found)
    engines = config.data_parallel_size
    kv = plan.num_pages * plan.page_bytes
    all_needed = SERVER + engines * (plan.weight_bytes + kv + plan.ranks * ENGINE[config.backend_name])
    free = available_memory()
    if all_needed > free:
        spare = (free - all_needed) // engines + kv
        advice = (
            f"set --kv-cache-memory to {max(spare, plan.page_bytes) // 2**20}MiB or less"
            if spare > 0
            else ("use --quantization 8bit or 4bit, a smaller model or fewer engines")
        )
        text = f"{found}; with the weights and processes {size(all_needed)}, but {size(free)} are free: {advice}"
        return change("KV cache", text)
    return ok("KV cache", found)


def _contexts(plan: EnginePlan, found: str) -> Finding:
    if plan.contexts:
        return ok("contexts", found)
    return change(
        "contexts",
        f"{found}; for more, set --kv-cache-memory, --kv-cache-dtype int8 or --quantization 8bit, "
        f"or a smaller --max-model-len",
    )
