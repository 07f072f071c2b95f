"""The step times of a small engine that does not exist, for simulations."""

from octavo.simulation import CostModel

COSTS = CostModel(
    settings={},
    machine={},
    page_size=32,
    page_bytes=1000,
    num_pages=100,
    max_model_len=1024,
    rows_ms=[(1, 5.0), (16, 6.0), (64, 12.0), (512, 96.0)],
    sampled_ms=[(1, 1.0), (64, 4.0)],
    kv_token_us=0.5,
    pair_us=0.25,
    step_ms=0.2,
    sequence_us=3.0,
    row_us=0.5,
)
