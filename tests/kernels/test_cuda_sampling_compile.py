"""The kernels of sampling, compiled for A100 and H100 without either."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from triton_interpreter import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from compiled_kernel import compile_kernel
from octavo.backends.cuda.kernels import adjustment, draw, logprobs, selection

FLOATS = ("logits", "maxima", "values", "temperatures", "top_ps", "min_ps", "logprobs", "top_logprobs", "repetitions")
TYPES = dict.fromkeys((*FLOATS, "presences", "frequencies"), "*fp32") | {"sums": "*i64"}
TYPES |= dict.fromkeys(("vocab", "rows", "columns"), "i32")
CHUNKED: dict[str, Any] = {"VOCAB": 128256, "BLOCK": 4096, "CHUNKS": 32, "WIDTH": 32}
BINNED = {"BINS": 512}
KERNELS = {
    "survey": (selection._survey, {}),
    "weigh": (selection._weigh, BINNED),
    "bound": (selection._bound, BINNED | {"ALL": False}),
    "gather": (selection._gather, BINNED),
    "draw": (draw.draw_kernel, {}),
    "logprobs": (logprobs._logprobs, {}),
    "count_likelier": (logprobs._count_likelier, {}),
    "add_biases": (adjustment._add_biases, {"BLOCK": 128}),
    "count_history": (adjustment._count_history, {"BLOCK": 1024}),
    "penalize": (adjustment._penalize, {"BLOCK": 1024}),
    "mask": (adjustment._mask, {"BLOCK": 1024}),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel(name: str, capability: int) -> None:
    kernel, more = KERNELS[name]
    constants = {key: value for key, value in (CHUNKED | more).items() if key in kernel.arg_names}
    types = {key: TYPES.get(key, "*i32") for key in kernel.arg_names}
    if name == "add_biases":
        types["values"] = "*fp32"
    warps = 8 if name in ("draw", "logprobs") else 4
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = compile_kernel(kernel, types, constants, options, capability, ("vocab",))
    assert made.registers * 32 * warps <= 65536
