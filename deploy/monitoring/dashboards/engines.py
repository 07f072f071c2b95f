"""The dashboard of engines."""

from ..grafana import Dashboard, Panel
from .queries import BY_ENGINE, ENGINE, VARIABLES, machine, q

ENGINES = Dashboard(
    "engines",
    "Octavo: engines",
    "Each engine's load and health, and the machine below.",
    VARIABLES,
    {
        "Health": [
            Panel(
                "Engines that serve",
                "short",
                "Engines with a process that answers.",
                {"": q.sum("vllm:engine_sleep_state", sleep_state="awake")},
                "stat",
            ),
            Panel(
                "Restarts",
                "short",
                "Engines that ended unexpectedly within the time range at the top.",
                {"": q.increase("octavo_engine_restarts_total")},
                "stat",
            ),
            Panel(
                "Damaged sequences",
                "short",
                "Sequences that ended since the model computed NaN or infinity, within the time range at the top.",
                {"": q.increase("vllm:corrupted_requests_total")},
                "stat",
            ),
        ],
        "Load": [
            Panel(
                "Running",
                "short",
                "Sequences that are computed, by engine.",
                {BY_ENGINE: q.series("vllm:num_requests_running")},
                stacked=True,
            ),
            Panel(
                "Waiting",
                "short",
                "Sequences that wait, by engine.",
                {BY_ENGINE: q.series("vllm:num_requests_waiting")},
                stacked=True,
            ),
            Panel(
                "Output",
                "suffix:tokens/s",
                "Generated tokens per second, by engine.",
                {BY_ENGINE: q.rate("vllm:generation_tokens_total", *ENGINE)},
                stacked=True,
            ),
        ],
        "Steps": [
            Panel(
                "Steps",
                "suffix:steps/s",
                "Steps per second. A step computes some tokens of many sequences.",
                {BY_ENGINE: q.rate("vllm:iteration_tokens_total_count", *ENGINE)},
            ),
            Panel(
                "Tokens in a step",
                "short",
                "Mean number of tokens that a step computes. More means better use of the weights read.",
                {BY_ENGINE: q.mean("vllm:iteration_tokens_total", *ENGINE)},
            ),
            Panel(
                "Draft tokens accepted",
                "percentunit",
                "Share of speculative tokens that were right. Empty without speculation.",
                {
                    BY_ENGINE: q.ratio(
                        "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total", *ENGINE
                    ),
                },
                max=1.0,
            ),
            Panel(
                "Accepted, by position",
                "suffix:tokens/s",
                "Accepted draft tokens per second, by their position in the draft.",
                {
                    "{{position}}": q.rate("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position"),
                },
            ),
        ],
        "Machine": [
            Panel(
                "Devices",
                "percent",
                "Utilization of each GPU, or of each core where there is none, by all processes.",
                {
                    "{{instance}} {{device}}": machine.series("vllm_gpu_utilization_percent"),
                },
                max=100.0,
            ),
            Panel(
                "Processor time of the server",
                "short",
                "Cores that the server's process uses. Engines are processes of their own.",
                {
                    "{{instance}}": q.rate("process_cpu_seconds_total", "instance"),
                },
            ),
            Panel(
                "Memory of the server",
                "bytes",
                "Resident memory of the server's process, without its engines.",
                {"{{instance}}": q.series("process_resident_memory_bytes")},
            ),
            Panel(
                "Open files",
                "percentunit",
                "Share of the file descriptors that the server's process may open.",
                {
                    "{{instance}}": f"{q.series('process_open_fds')} / {q.series('process_max_fds')}",
                },
                max=1.0,
            ),
        ],
    },
)
