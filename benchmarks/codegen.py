"""What the Triton kernels become, without a GPU: `python -m benchmarks.codegen` writes CODEGEN.md.

The operations are called on CPU tensors with a driver that compiles every launch for a chosen
architecture and then does not launch it: what is reported is what a launch would run, its specialisations
included.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from ncfast.ops.affine_argmax import triton as affine_argmax
from ncfast.ops.class_scatter import PRECISIONS
from ncfast.ops.class_scatter import triton as class_scatter
from ncfast.ops.pair_geometry import triton as pair_geometry
from ncfast.ops.target import SHARED_LIMIT

TARGETS = {
    name: GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
}
MATRIX = ("_scatter_pairs", "_top_two")  # must use the matrix units in a loop, and load 128 bits at a time
NO_MATRIX = {  # every other kernel, and why neither is asked of it; none may spill
    "_reduce_splits": "adds float64 splits in order",
    "_place_rows": "moves indices",
    "_class_sums": "adds rows of p elements, for small batches or out of group sums",
    "_row_norms": "adds one number per row",
    "_list_rows": "moves indices",
    "_recheck": "float64, for the few rows that remain, with any strides",
    "_settle": "moves indices",
    "_pairs": "squared differences in float64, which a product would cancel",
    "_radii": "squared differences in float64, which a product would cancel",
    "_gram": "float64; Triton has no float64 matrix product on these targets",
}
PEAKS = {  # dense bfloat16 TFLOP/s with float32 sums, TB/s: the vendors' data sheets
    "A100 80GB": (312, 2.0),
    "H100 SXM": (989, 3.35),
    "B200": (2250, 8.0),
    "RTX 5090": (210, 1.79),
    "MI300X": (1307, 5.3),
    "MI355X": (2500, 8.0),
}


class _Utils:
    def __init__(self, name: str) -> None:
        self.name = name

    def get_device_properties(self, _device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.name], "warpSize": TARGETS[self.name].warp_size}

    def load_binary(self, name: str, *_: Any) -> tuple[str, str, int, int, int]:
        return name, name, 0, 0, 1024

    def unload_module(self, module: str) -> None:
        pass


class CompileOnly:
    """A Triton driver whose device is the CPU: it compiles for `name` and launches nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.utils = name, _Utils(name)
        self.launcher_cls = lambda _source, _metadata: lambda *_: None

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> str:
        return f"compile-only {self.name}"  # kernels are cached per device

    def get_current_stream(self, _device: str) -> int:
        return 0


class Row(NamedTuple):
    """One compiled kernel."""

    target: str
    kernel: str
    case: str
    warps: int
    registers: int
    spills: int
    local: int
    shared: int
    matrix: int
    wide_loads: int
    resident: int
    """programs per multiprocessor that registers and shared memory allow"""
    aligned: bool = True
    """whether the case's rows are: elements that may begin anywhere cannot be loaded 128 bits at a time"""

    def faults(self) -> list[str]:
        """What the gate forbids."""
        found = []
        if self.kernel not in MATRIX and self.kernel not in NO_MATRIX:
            found.append("neither listed as MATRIX nor as NO_MATRIX")
        if self.spills or self.local:
            found.append(f"{self.spills} spills, {self.local} bytes of local memory")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.kernel in MATRIX and not self.matrix:
            found.append("no matrix instruction in a loop")
        if self.kernel in MATRIX and self.aligned and not self.wide_loads:
            found.append("no 128-bit load in a loop")
        return [f"{self.target} {self.kernel} ({self.case}): {fault}" for fault in found]


def cases(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, bool, Callable[[], Any]]]:
    """Calls that together launch every kernel with every tile that the choosers can pick.

    What they are, whether the rows are aligned, and the call. To keep the gate short float16, which differs
    from bfloat16 in one instruction, is multiplied at "high" only, and rows that are not aligned are float32,
    which takes the most registers.
    """
    for dtype in dtypes:
        word = str(dtype).removeprefix("torch.")
        h = torch.zeros(4224, 512, dtype=dtype)
        for precision in ("high",) if dtype == torch.float16 else PRECISIONS:
            yield from ((f"{word}, {case}", True, call) for case, call in _scatters(h, precision))
        for C in (10, 32, 64, 128, 1024):
            yield f"{word}, C = {C}", True, _argmax(h, C)
    odd, transposed = torch.zeros(4224, 509), torch.zeros(512, 4224).T
    for precision in PRECISIONS:
        yield from ((f"float32, p = 509, {case}", False, call) for case, call in _scatters(odd, precision))
    for C in (10, 1024):
        yield f"float32, p = 509, C = {C}", False, _argmax(odd, C)
    yield "float32, transposed, high, large, direct", False, _scatter(transposed, 1000, "high")
    yield "float32, transposed, C = 1024", False, _argmax(transposed, 1024)
    rows = torch.randn(64, 64, dtype=torch.float64)
    yield "float64", True, lambda: pair_geometry.pair_geometry(rows, rows[0])
    yield "float64", True, lambda: pair_geometry.etf_error(rows, None)
    yield "float64", True, lambda: pair_geometry.decision_radius(rows, rows[0], rows, torch.arange(64))


def _scatters(h: torch.Tensor, precision: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for N, size in ((4096, "small"), (4224, "large")):
        for C, mode in ((2, "grouped"), (1000, "direct")):
            yield f"{precision}, {size}, {mode}", _scatter(h[:N], C, precision)


def _scatter(h: torch.Tensor, C: int, precision: str) -> Callable[[], Any]:
    labels, shift = torch.zeros(len(h), dtype=torch.int64), torch.zeros(C, h.shape[1])
    return lambda: class_scatter.class_scatter(h, labels, shift, radii=True, precision=precision)


def _argmax(h: torch.Tensor, C: int) -> Callable[[], Any]:
    rules = [(torch.zeros(C // 2, h.shape[1]), torch.zeros(C // 2))] * 2
    return lambda: affine_argmax.affine_argmax(h[:128], rules)


def compiled(target: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Row]:
    """Compile every case for `target`."""
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(CompileOnly(target))
    device = f"compile-only {target}"
    kernels = [
        kernel
        for room in (class_scatter, affine_argmax, pair_geometry)
        for kernel in vars(room).values()
        if isinstance(kernel, triton.runtime.JITFunction)
    ]
    seen: set[int] = set()
    rows = []
    try:
        for case, aligned, call in cases(dtypes):
            call()
            for kernel in kernels:
                if device not in kernel.device_caches:
                    continue
                for binary in kernel.device_caches[device][0].values():
                    if id(binary) not in seen:
                        seen.add(id(binary))
                        rows.append(_row(target, kernel.fn.__name__, case, aligned, binary))
    finally:
        for kernel in kernels:
            kernel.device_caches.pop(device, None)
        if previous is not None:
            triton.runtime.driver.set_active(previous)
    return rows


def _row(target: str, kernel: str, case: str, aligned: bool, binary: Any) -> Row:
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    read = _amd if "amdgcn" in binary.asm else _nvidia
    registers, spills, local, matrix, wide = read(binary.asm)
    if read is _amd:  # 4 SIMDs of 512 registers per lane; LDS as much as one program may use
        by_registers = 4 * (512 // (-(-registers // 8) * 8)) // warps
        by_shared = SHARED_LIMIT[target] // max(shared, 1)
    else:  # 65,536 registers, allotted 256 at a time to a warp; one KiB of shared memory is the system's
        by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
        by_shared = (SHARED_LIMIT[target] + 1024) // (shared + 1024)
    resident = min(by_registers, by_shared, 16)
    return Row(target, kernel, case, warps, registers, spills, local, shared, matrix, wide, resident, aligned)


def _nvidia(asm: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Registers, spilled stores, local bytes; matrix instructions and 128-bit loads in loops, of a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "nvdisasm", "-c", file.name)
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", usage))
    stack = max(int(number) for number in re.findall(r"STACK:(\d+)", usage))
    loops = _loops(sass, r"^(\.L_x_\d+):", r"\bBRA\b.*\((\.L_x_\d+)\)")
    return (
        registers,
        len(re.findall(r"\bSTL\b", sass)),
        stack,
        len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", loops)),
        len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128\b", loops)),
    )


def _amd(asm: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Registers, spilled ones, scratch bytes; matrix instructions and 128-bit loads in loops, of AMD's."""
    text = asm["amdgcn"]
    loops = _loops(text, r"^(\.LBB\d+_\d+):", r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)")

    def field(name: str) -> int:
        (number,) = re.findall(rf"\.{name}:\s+(\d+)", text)
        return int(number)

    return (
        field("vgpr_count"),
        field("vgpr_spill_count"),
        field("private_segment_fixed_size"),
        len(re.findall(r"\bv_s?mfma_", loops)),
        len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", loops)),
    )


def _loops(text: str, label: str, branch: str) -> str:
    """The lines between a label and a later branch back to it."""
    lines = text.splitlines()
    places: dict[str, int] = {}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        if found := re.search(label, line):
            places[found[1]] = i
        elif (found := re.search(branch, line)) and found[1] in places:
            inside.update(range(places[found[1]], i))
    return "\n".join(lines[i] for i in sorted(inside))


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def roofline(N: int, p: int, C: int) -> Iterator[str]:
    """Estimates of the least time of class_scatter, per precision, and of affine_argmax."""
    read = 4 * N * p
    for name, (tera_flops, tera_bytes) in PEAKS.items():
        memory = read / tera_bytes / 1e9
        products = [n * N * p * (p + 128) / tera_flops / 1e9 for n in (6, 3, 1)]
        scores = 3 * 2 * N * p * max(16, triton.next_power_of_2(2 * C)) / tera_flops / 1e9
        times = " | ".join(f"{max(memory, time):.2f}" for time in (*products, scores))
        yield f"| {name} | {tera_flops} | {tera_bytes} | {memory:.2f} | {times} |"


def main() -> None:
    """Write CODEGEN.md and fail if the gate finds anything."""
    rows = []
    for target in TARGETS:
        rows += compiled(target, (torch.float32, torch.bfloat16))
        print(f"{target}: {len(rows)} kernels so far", file=sys.stderr, flush=True)
    N, p, C = 1_000_000, 512, 10
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Written by `python -m benchmarks.codegen` with Triton {triton.__version__}. Every kernel, with",
        "every tile that its chooser can pick, compiled ahead of time. Nothing here was timed.",
        "",
        "`spills` counts spill stores (AMD: spilled registers), `local` bytes of local memory, `shared`",
        "bytes of shared memory or LDS, `matrix` matrix instructions in loops (HMMA, HGMMA, UTCMMA, MFMA),",
        "`wide_loads` 128-bit global loads there, `resident` how many programs fit a multiprocessor by",
        "registers and shared memory. float64 kernels, and those that only move or add, have no matrix",
        "instruction. Rows that are not `aligned` to 16 elements cannot be loaded 128 bits at a time.",
        "",
        "## Estimate",
        "",
        f"Lower bounds of the time in ms for N = {N:,}, p = {p}, C = {C}, float32 features, from the data",
        "sheets alone: the larger of reading the features once at full bandwidth and the products at the",
        "full dense bfloat16 rate (6, 3 or 1 products per pair of columns of the lower triangle of 128×128",
        "tiles; affine_argmax: two rules, 3 products). L2 traffic, shared memory and launches are left out.",
        "These are estimates; nothing was measured.",
        "",
        '| GPU | TFLOP/s | TB/s | read once | "highest" | "high" | "medium" | affine_argmax |',
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *roofline(N, p, C),
    ]
    for target in TARGETS:
        fields = Row._fields[1:]
        lines += ["", f"## {target}", "", "| " + " | ".join(fields) + " |", "| --- " * len(fields) + "|"]
        lines += ["| " + " | ".join(map(str, row[1:])) + " |" for row in rows if row.target == target]
    Path(__file__).with_name("CODEGEN.md").write_text("\n".join(lines) + "\n")
    faults = [fault for row in rows for fault in row.faults()]
    print("\n".join(faults) or f"{len(rows)} kernels, no fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
