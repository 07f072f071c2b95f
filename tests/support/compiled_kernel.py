"""Compile Triton kernels for a GPU on a machine without one, and look at the machine code."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread: what did not fit in registers.
        shared_bytes: of a program.
        sass: the instructions.
        layouts: Triton's intermediate code, which says how threads share each block.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    sass: str
    layouts: str

    def count(self, instruction: str) -> int:
        """Return how often an instruction occurs, such as HGMMA or LDGSTS.E.BYPASS.128."""
        return len(re.findall(rf"\b{re.escape(instruction)}(?![A-Z])", self.sass))

    def spills_in_loops(self) -> int:
        """Return how many instructions of the innermost loops with matrix products move spilled registers."""
        code = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;", self.sass)
        at = [int(address, 16) for address, _ in code]
        loops = []
        for address, (_, text) in zip(at, code, strict=True):
            jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
            if jump and int(jump[1], 16) <= address:
                loops.append((int(jump[1], 16), address))
        bodies = [[text for a, (_, text) in zip(at, code, strict=True) if first <= a <= last] for first, last in loops]
        products = [body for body in bodies if any("MMA" in text for text in body)]
        if not products:  # the loop is unrolled
            products = [[text for _, text in code]]
        inner = [
            body
            for body in products
            if not any(len(other) < len(body) and set(other) < set(body) for other in products)
        ]
        return sum("LDL" in text or "STL" in text for body in inner for text in body)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    capability: int,
    aligned: tuple[str, ...] = (),
) -> Compiled:
    """Compile a kernel.

    Args:
        kernel: A function that triton.jit has decorated.
        types: Triton's type of each parameter that is not constant, such as "*bf16" or "i32". Pointers are aligned.
        constants: The other parameters. None stands for an argument that is None.
        options: num_warps, num_stages and so on.
        capability: 80 for an A100, 90 for an H100.
        aligned: integers that are multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    divisible = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in aligned]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    usage, sass = (_dump(made.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack_bytes=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared_bytes=made.metadata.shared,
        sass=sass,
        layouts=made.asm["ttgir"],
    )


def _dump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
