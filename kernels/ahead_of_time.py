"""Every kernel compiled for GPUs that are not here, and what the compilers say of it.

`python -m alpenglow.kernels.ahead_of_time` prints the table of docs/kernels.md; `--json` the same as JSON.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alpenglow.kernels import cg_update, group_norm_silu, pixel_step, sense, spectral_step
from alpenglow.kernels.triton_support import Variant

VARIANTS: list[Variant] = [
    *pixel_step.VARIANTS,
    *spectral_step.VARIANTS,
    *group_norm_silu.VARIANTS,
    *cg_update.VARIANTS,
    *sense.VARIANTS,
]
"""A kernel is one file and one line here."""

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One variant for one target.

    registers: a thread's; spills: bytes of registers (AMD: registers) that did not fit; stack: bytes of local
    memory a thread; shared: bytes a block; widest: bits of the widest access to global memory;
    bytes_per_element: global memory that a program moves for each element of its block, counted in the PTX
    (None for AMD and where it loops), against the fewest possible.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    stack: int
    shared: int
    widest_load: int
    widest_store: int
    bytes_per_element: float | None
    minimum: float


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile for a target of TARGETS; needs triton, no GPU, and TRITON_INTERPRET unset.

    Raises RuntimeError when the interpreter is on, and what triton raises for a kernel it cannot compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python; unset it to compile them")
    names = variant.kernel.arg_names
    signature = {name: variant.type_of(name) for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if signature[name].startswith("*") or name in variant.aligned
    }
    source = ASTSource(variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=aligned)
    result = triton.compile(
        source,
        target=GPUTarget(*TARGETS[target]),
        options={"num_warps": variant.warps, "enable_fp_fusion": True},
    )
    if "cubin" in result.asm:
        usage = _cubin_usage(result.asm["cubin"])
        accesses = list(_ptx_accesses(result.asm["ptx"]))
        usage["spills"] = usage["stack"]
    else:
        text = result.asm["amdgcn"]
        usage = {key: _number(rf"\.{name}:\s+(\d+)", text) for key, name in _AMD.items()}
        accesses = list(_amd_accesses(text))
    return Compiled(
        kernel=variant.name,
        variant=variant.label,
        target=target,
        registers=usage["registers"],
        spills=usage["spills"],
        stack=usage["stack"],
        shared=result.metadata.shared,
        widest_load=max((8 * size for kind, size in accesses if kind == "load"), default=0),
        widest_store=max((8 * size for kind, size in accesses if kind == "store"), default=0),
        bytes_per_element=_moved(variant, result.asm["ptx"])
        if "ptx" in result.asm and not variant.loops
        else None,
        minimum=variant.minimum_bytes,
    )


_AMD = {"registers": "vgpr_count", "spills": "vgpr_spill_count", "stack": "private_segment_fixed_size"}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which triton carries, reads from the compiled code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {"registers": _number(r"REG:(\d+)", text), "stack": _number(r"STACK:(\d+)", text)}


_PTX_ACCESS = re.compile(r"(@%p\d+ )?\b(ld|st)\.global(?:\.[a-z_:0-9]+?)*?(?:\.v(\d))?\.[bfus](\d+)")


def _ptx_accesses(ptx: str) -> Iterator[tuple[str, int]]:
    """(load or store, bytes) of each access to global memory that a thread makes."""
    for _, kind, vector, bits in _PTX_ACCESS.findall(ptx):
        yield {"ld": "load", "st": "store"}[kind], int(vector or 1) * int(bits) // 8


def _moved(variant: Variant, ptx: str) -> float:
    """Bytes a program moves, over its elements; whole blocks are read and written under a mask."""
    masked = [int(v or 1) * int(bits) // 8 for mask, _, v, bits in _PTX_ACCESS.findall(ptx) if mask]
    return (sum(masked) - 4 * variant.scalar_stores) * variant.warps * 32 / variant.elements


_AMD_SIZES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8,
              "dwordx3": 12, "dwordx4": 16}  # fmt: skip


def _amd_accesses(text: str) -> Iterator[tuple[str, int]]:
    for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text):
        base = re.sub(r"_d16(_hi)?$", "", size)
        yield kind, _AMD_SIZES.get(base, 4)


def table(rows: list[Compiled]) -> str:
    """The rows as Markdown."""
    head = (
        "| kernel | variant | target | registers | spills | shared | load / store, bits | bytes / element "
        "(minimum) |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "".join(
        f"| `{r.kernel}` | {r.variant} | {r.target} | {r.registers} | {r.spills} | {r.shared} | "
        f"{r.widest_load} / {r.widest_store} | {_shown(r)} ({r.minimum:.3g}) |\n"
        for r in rows
    )


def _shown(row: Compiled) -> str:
    return "–" if row.bytes_per_element is None else f"{row.bytes_per_element:.3g}"


def main(arguments: list[str] | None = None) -> None:
    """Compile every variant for every target, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a Markdown table")
    parser.add_argument("-o", "--output", type=Path, help="write to this file instead")
    options = parser.parse_args(arguments)
    rows = [compile_variant(variant, target) for variant in VARIANTS for target in TARGETS]
    shown: Any = json.dumps([asdict(row) for row in rows], indent=1) if options.json else table(rows)
    if options.output:
        options.output.write_text(shown, encoding="utf-8")
    else:
        print(shown)


if __name__ == "__main__":
    main()
