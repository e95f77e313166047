"""Every Triton kernel as it is shipped, compiled for sm_80, sm_90 and sm_100 and read; no GPU is needed.

What the compiler made of each is kept in compiled.json; a kernel that takes more registers or shared memory than its
kept row fails. `python tests/fused/compile_suite.py` writes the table again and prints it (`--print` only prints it).

`test_triton.py` runs this file in a process of its own without TRITON_INTERPRET, which would turn the kernels into
plain Python.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import struct
import subprocess
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
import triton
from compiled_kernels import ARCHITECTURES, Compiled, compile_all, lce, shipped_kernels, tile_name

KEPT = Path(__file__).with_name("compiled.json")
REWRITE = "python tests/fused/compile_suite.py"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER = (90, 100)
# Of a program, and of a streaming multiprocessor, which keeps 1 KiB for each program.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_BYTES_OF_PROCESSOR = 228 * 1024
SHARED_BYTES_RESERVED = 1024
REGISTERS_OF_PROCESSOR = 65536
# What the architecture's disassembler takes raw code for, and its products by tensor cores.
PROCESSORS = {80: "SM80", 90: "SM90a", 100: "SM100a"}
TENSOR_CORE = {80: r"HMMA\b", 90: r"HGMMA\b", 100: r"UTC\w*MMA\b"}


@dataclass(frozen=True)
class Row:
    """What the compiler made of a kernel. Bytes are of a program, registers of a thread, the rest are instructions."""

    kernel: str
    architecture: int
    dtype: str
    variant: str
    tile: str
    warps: int
    registers: int
    shared: int
    stack: int
    spill_stores: int
    tensor_core: int
    tma_loads: int
    tma_stores: int
    async_copies: int

    @property
    def key(self) -> str:
        """What it is a row of."""
        return f"{self.kernel} sm_{self.architecture} {self.dtype} [{self.variant}] {self.tile}, {self.warps} warps"


# --- reading binaries


def code_of(cubin: bytes) -> bytes:
    """The machine code of an ELF file: its .text sections."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each: offset of the name, type, flags, address, offset, length.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    return b"".join(
        cubin[section[4] : section[4] + section[5]]
        for section in sections
        if cubin.startswith(b".text.", sections[names][4] + section[0])
    )


def instructions(codes: list[bytes], architecture: int) -> list[str]:
    """The disassembly of each. One run for all, because the disassembler takes most of its time to start."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [BINARIES / "nvdisasm", "--binary", PROCESSORS[architecture], file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*)", text)
    parts, line, stop = [], 0, 0
    for code in codes:
        first, stop = line, stop + len(code)
        while line < len(lines) and int(lines[line][0], 16) < stop:
            line += 1
        parts.append("\n".join(operation for _, operation in lines[first:line]))
    assert all(parts), f"nvdisasm gave no instructions for a kernel of sm_{architecture}"
    return parts


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and so on, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BINARIES / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}


def row_of(kernel: Compiled, assembly: str, architecture: int) -> Row:
    """What is kept of a kernel."""
    usage, metadata = resource_usage(kernel.binary.asm["cubin"]), kernel.binary.metadata
    count = {
        name: len(re.findall(rf"\b{pattern}", assembly))
        for name, pattern in {
            "spill_stores": r"STL\b",
            "tensor_core": TENSOR_CORE[architecture],
            "tma_loads": r"UTMALDG\b",
            "tma_stores": r"UTMASTG\b",
            "async_copies": r"LDGSTS\b",
        }.items()
    }
    return Row(
        kernel.kernel, architecture, kernel.dtype, kernel.variant, kernel.tile, metadata.num_warps,
        usage["REG"], metadata.shared, usage["STACK"], **count,
    )  # fmt: skip


@functools.cache
def measured(architecture: int) -> dict[str, Row]:
    """Everything shipped for an architecture, by key; compiled once in a process."""
    kernels = compile_all(architecture)
    assemblies = instructions([code_of(kernel.binary.asm["cubin"]) for kernel in kernels], architecture)
    rows = [row_of(kernel, text, architecture) for kernel, text in zip(kernels, assemblies, strict=True)]
    by_key = {row.key: row for row in rows}
    twice = {row.key for row in rows if by_key[row.key] is not row}
    assert not twice, f"two kernels with one name in compiled_kernels.py: {sorted(twice)}"
    return by_key


# --- the kept table


@functools.cache
def kept_table() -> tuple[str, dict[str, Row]]:
    """(version of Triton that compiled it, rows by key)."""
    table = json.loads(KEPT.read_text())
    rows = [Row(**row) for row in table["rows"]]
    return table["triton"], {row.key: row for row in rows}


def write(rows: list[Row]) -> None:
    """Keep the rows, one a line."""
    lines = ",\n".join(f"    {json.dumps(asdict(row))}" for row in rows)
    KEPT.write_text(f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "rows": [\n{lines}\n  ]\n}}\n')


def markdown(rows: list[Row]) -> str:
    """The table for people."""
    names = [field.name for field in fields(Row)]
    lines = [list((asdict(row) | {"architecture": f"sm_{row.architecture}"}).values()) for row in rows]
    return _table([name.replace("_", " ").replace("tma", "TMA") for name in names], lines)


def summary(rows: list[Row]) -> str:
    """The table without the variants: the registers of a thread from least to most, and the most shared memory."""
    groups: dict[tuple[str, str, str, int], dict[int, list[Row]]] = {}
    for row in rows:
        group = groups.setdefault((row.kernel, row.dtype, row.tile, row.warps), {})
        group.setdefault(row.architecture, []).append(row)
    lines = [[*key, *(_range(group.get(number)) for number in ARCHITECTURES)] for key, group in groups.items()]
    order = list(dict.fromkeys(row.kernel for row in rows))
    lines.sort(key=lambda line: order.index(line[0]))
    return _table(["kernel", "dtype", "tile", "warps", *(f"sm_{number}" for number in ARCHITECTURES)], lines)


def _range(rows: list[Row] | None) -> str:
    if rows is None:
        return ""
    least, most = (choose(row.registers for row in rows) for choose in (min, max))
    spills = max(row.spill_stores for row in rows)
    parts = [f"{least} to {most}" if least < most else f"{most}", f"{max(row.shared for row in rows) / 1024:.1f} KiB"]
    return ", ".join([*parts, f"{spills} spills"] if spills else parts)


def _table(head: list[str], lines: list[list[object]]) -> str:
    rule = ["---:" if isinstance(value, int) else "---" for value in lines[0]]
    return "\n".join(f"| {' | '.join(str(value) for value in line)} |" for line in [head, rule, *lines])


def growth(row: Row, kept: Row) -> list[str]:
    """What is more than it was."""
    return [
        f"{name} {getattr(kept, name)} -> {getattr(row, name)}"
        for name in ("registers", "shared")
        if getattr(row, name) > getattr(kept, name)
    ]


# --- tests


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def architecture(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def rows(architecture: int) -> list[Row]:
    return list(measured(architecture).values())


@pytest.fixture
def kept(architecture: int) -> dict[str, Row]:
    return {key: row for key, row in kept_table()[1].items() if row.architecture == architecture}


def none_of(faults: list[str], what: str) -> None:
    if faults:
        pytest.fail("\n".join([f"{what}:", *faults]), pytrace=False)


def test_kept_table_holds_what_is_shipped(rows, kept):
    missing, stale = {row.key for row in rows} - kept.keys(), kept.keys() - {row.key for row in rows}
    faults = [*(f"missing: {key}" for key in sorted(missing)), *(f"stale: {key}" for key in sorted(stale))]
    none_of(faults, f"compiled.json is not of these kernels; run `{REWRITE}`")


def test_nothing_is_on_the_stack(rows):
    """Neither a spill nor an indexed array."""
    used = [row for row in rows if row.stack or row.spill_stores]
    faults = [f"{row.key}: {row.stack} bytes, {row.spill_stores} spill stores" for row in used]
    none_of(faults, "kernels that use the stack")


def test_nothing_grew(rows, kept):
    pairs = [(row, kept[row.key]) for row in rows if row.key in kept]
    versions = f"Triton {kept_table()[0]} then, {triton.__version__} now"
    faults = [f"{row.key}: {', '.join(growth(row, old))}" for row, old in pairs if growth(row, old)]
    none_of(faults, f"grown since compiled.json ({versions}); if meant, run `{REWRITE}`")
    lower = [f"{row.key}: {', '.join(growth(old, row))} before" for row, old in pairs if growth(old, row)]
    if lower:
        warnings.warn("\n".join([f"lower: run `{REWRITE}` to lower the table", *lower]), stacklevel=1)


def losses(rows: list[Row]) -> list[Row]:
    found = [row for row in rows if row.kernel in shipped_kernels()["linear_cross_entropy_triton"]]
    assert found
    return found


def test_half_precision_multiplies_on_tensor_cores(rows):
    half = [row for row in losses(rows) if row.dtype != "fp32"]
    none_of([row.key for row in half if not row.tensor_core], "kernels without tensor-core instructions")


@pytest.mark.parametrize("architecture", [80])
def test_tiles_are_copied_ahead_where_there_is_no_tma(rows):
    swept = [row for row in losses(rows) if row.kernel == "odds_kernel" and row.dtype != "fp32"]
    assert swept
    none_of([row.key for row in swept if not row.async_copies], "kernels without asynchronous copies")


@pytest.mark.parametrize("architecture", HOPPER)
def test_tiles_travel_by_tma(rows):
    none_of([row.key for row in losses(rows) if not row.tma_loads], "kernels without TMA loads")
    stores = [row for row in losses(rows) if not row.variant.startswith("loss only")]
    assert stores
    none_of([row.key for row in stores if not row.tma_stores], "kernels without TMA stores")


def test_shared_memory_suffices(rows, architecture):
    none_of(
        [f"{row.key}: {row.shared}" for row in rows if row.shared > SHARED_BYTES[architecture]],
        f"kernels that want more than {SHARED_BYTES[architecture]} bytes of shared memory",
    )


@pytest.mark.parametrize("architecture", HOPPER)
def test_two_programs_of_the_small_tile_fit_on_a_processor(rows):
    small = [row for row in rows if (row.tile, row.warps) == (tile_name(lce.SMALL_TILE), lce.SMALL_TILE["num_warps"])]
    assert small
    assert lce.SMALL_TILE["num_warps"] * 32 == 128
    faults = [
        f"{row.key}: {row.registers} registers, {row.shared} bytes of shared memory"
        for row in small
        if 2 * row.registers * row.warps * 32 > REGISTERS_OF_PROCESSOR
        or 2 * (row.shared + SHARED_BYTES_RESERVED) > SHARED_BYTES_OF_PROCESSOR
    ]
    none_of(faults, "kernels of which a processor holds only one program")


def test_every_kernel_and_tile_is_compiled():
    everything = [row for architecture in ARCHITECTURES for row in measured(architecture).values()]
    kernels = {row.kernel for row in everything} ^ set().union(*shipped_kernels().values())
    none_of(sorted(kernels), "kernels without a launch in compiled_kernels.py, or launched but not shipped")
    used = {(row.tile, row.warps) for row in everything}
    tiles = {name: tile for name, tile in vars(lce).items() if name.endswith("_TILE")}
    unused = [name for name, tile in tiles.items() if (tile_name(tile), tile["num_warps"]) not in used]
    none_of(unused, "tiles that no launch in compiled_kernels.py uses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="do not write compiled.json again")
    parser.add_argument("--summary", action="store_true", help="print one line for all variants of a kernel's tile")
    arguments = parser.parse_args()
    rows = [row for architecture in ARCHITECTURES for row in measured(architecture).values()]
    if not arguments.print:
        write(rows)
    print(summary(rows) if arguments.summary else markdown(rows))


if __name__ == "__main__":
    main()
