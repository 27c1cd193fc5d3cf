"""The kernels as compiled for NVIDIA's GPUs, without one: the width of their loads and stores, and their registers."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from wan_model import WAN_1_3B, WAN_14B  # noqa: E402
from wan_model.kernels import gate, layer_norm, reduction, rms_norm, split_rms_norm  # noqa: E402
from wan_model.kernels.launch import Kernel, block_of, warps_of  # noqa: E402

BF16, FP32, INT = "*bf16", "*fp32", "*i32"
BY_SAMPLE = {"stride": "i32", "chunks": INT}
LAYER_NORM = {"factors": FP32, "eps": "fp32", **BY_SAMPLE}
SPLIT = {"x": BF16, "weights": BF16, "sums": FP32, "chunks": INT, "eps": "fp32", "full_width": "i32"}
RMS_NORM = {"x": BF16, "weights": BF16, "chunks": INT, "eps": "fp32"}
RMS_NORM_FORWARD = {"out": BF16, "sums": BF16, "full_width": "i32", **RMS_NORM}
# Kernel, types of its arguments, constants besides the width, and the most registers of a thread: with 64, half of a
# multiprocessor's threads are resident; the sums over rows of the backward pass are worth a quarter. There are
# none with frozen weights.
KERNELS: dict[str, tuple[Kernel, dict[str, str], dict[str, Any], int]] = {
    "layer norm": (
        layer_norm.FORWARD, {"x": BF16, "out": BF16, "offsets": FP32, **LAYER_NORM}, {"PLUS_ONE": 1.0}, 64
    ),
    "layer norm, backward": (
        layer_norm.BACKWARD, {"grad": BF16, "x": BF16, "grad_x": BF16, "partial": FP32, **LAYER_NORM},
        {"PLUS_ONE": 1.0, "SUMS": True}, 128,
    ),
    "layer norm, backward, frozen": (
        layer_norm.BACKWARD, {"grad": BF16, "x": BF16, "grad_x": BF16, "partial": FP32, **LAYER_NORM},
        {"PLUS_ONE": 1.0, "SUMS": False}, 96,
    ),
    "gate": (gate.FORWARD, {"x": BF16, "update": BF16, "out": BF16, "gates": FP32, **BY_SAMPLE}, {}, 64),
    "gate, backward": (
        gate.BACKWARD,
        {"grad": BF16, "update": BF16, "gates": FP32, "grad_update": BF16, "partial": FP32, **BY_SAMPLE},
        {"GATES": True}, 64,
    ),
    "gate, backward, frozen": (
        gate.BACKWARD,
        {"grad": BF16, "update": FP32, "gates": FP32, "grad_update": BF16, "partial": FP32, **BY_SAMPLE},
        {"GATES": False}, 64,
    ),
    "rms norm": (
        rms_norm.FORWARD, {"table": BF16, **RMS_NORM_FORWARD}, {"HEAD": 1, "ROTATED": False, "SPLIT": False}, 64
    ),
    "rms norm, backward": (
        rms_norm.BACKWARD, {"grad": BF16, "table": BF16, "grad_x": BF16, "partial": FP32, **RMS_NORM},
        {"HEAD": 1, "ROTATED": False, "SUMS": True}, 128,
    ),
    "rms norm, rotated": (
        rms_norm.FORWARD, {"table": FP32, **RMS_NORM_FORWARD}, {"HEAD": 128, "ROTATED": True, "SPLIT": False}, 64
    ),
    "rms norm, rotated, backward": (
        rms_norm.BACKWARD, {"grad": BF16, "table": FP32, "grad_x": BF16, "partial": FP32, **RMS_NORM},
        {"HEAD": 128, "ROTATED": True, "SUMS": True}, 128,
    ),
    "rms norm, rotated, backward, frozen": (
        rms_norm.BACKWARD, {"grad": BF16, "table": FP32, "grad_x": BF16, "partial": BF16, **RMS_NORM},
        {"HEAD": 128, "ROTATED": True, "SUMS": False}, 96,
    ),
    "split rms norm, squares": (split_rms_norm.SQUARES, {"x": BF16, "sums": FP32, "chunks": INT}, {}, 64),
    "split rms norm": (
        rms_norm.FORWARD, {"out": BF16, "table": FP32, **SPLIT}, {"HEAD": 128, "ROTATED": True, "SPLIT": True}, 64
    ),
    "split rms norm, products": (
        split_rms_norm.BACKWARD_PRODUCTS, {"grad": BF16, "table": FP32, "products": FP32, "partial": FP32, **SPLIT},
        {"HEAD": 128, "ROTATED": True, "SUMS": True}, 128,
    ),
    "split rms norm, products, frozen": (
        split_rms_norm.BACKWARD_PRODUCTS, {"grad": BF16, "table": FP32, "products": FP32, "partial": BF16, **SPLIT},
        {"HEAD": 128, "ROTATED": True, "SUMS": False}, 96,
    ),
    "split rms norm, backward": (
        split_rms_norm.BACKWARD, {"grad": BF16, "table": FP32, "products": FP32, "grad_x": BF16, **SPLIT},
        {"HEAD": 128, "ROTATED": True}, 128,
    ),
}  # fmt: skip
# Numbers that a program reads or writes one at a time: of its chunk, and of each row.
NUMBERS = {
    "split rms norm, squares": 3,
    "split rms norm": 3,
    "split rms norm, products": 4,
    "split rms norm, products, frozen": 4,
}


def compile_kernel(
    kernel: Kernel, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int
) -> Any:
    """Compiled as at a launch with tensors of torch, which begin at multiples of 16 bytes, and rows that do so too."""
    names = kernel.function.__code__.co_varnames[: kernel.function.__code__.co_argcount]
    assert set(names) == {*types, *constants}
    aligned = [name for name in names if types.get(name, "").startswith("*") or name == "stride"]
    source = ASTSource(
        fn=kernel.compiled,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def resources(compiled: Any, folder: Path) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread."""
    (folder / "cubin").write_bytes(compiled.asm["cubin"])
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([program, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


# A norm that is split over tensor-parallel ranks has the rows of a rank: of two for 1.3B, of two and four for 14B.
SPLIT_KERNELS = [name for name in KERNELS if name.startswith("split")]
WIDTHS = {
    "1.3B": (WAN_1_3B.hidden_size, list(KERNELS)),
    "14B": (WAN_14B.hidden_size, list(KERNELS)),
    "1.3B, one of two ranks": (WAN_1_3B.hidden_size // 2, SPLIT_KERNELS),
    "14B, one of two ranks": (WAN_14B.hidden_size // 2, SPLIT_KERNELS),
    "14B, one of four ranks": (WAN_14B.hidden_size // 4, SPLIT_KERNELS),
}


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("of", WIDTHS)
def test_rows_move_in_128_bits_and_nothing_spills(
    of: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    width, names = WIDTHS[of]
    for name in names:
        kernel, types, constants, most = KERNELS[name]
        sizes = {"WIDTH": width, "BLOCK": block_of(width)}
        compiled = compile_kernel(kernel, types, {**constants, **sizes}, capability, warps_of(width))
        moves = re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"])
        # Narrower are single numbers only: the three of a chunk, and those of a row.
        narrow = [move for move in moves if not move.endswith(".v4.b32")]
        assert len(narrow) <= NUMBERS.get(name, 4 if name.startswith("split") else 3), (name, narrow)
        assert len(moves) > len(narrow)
        registers, local = resources(compiled, tmp_path)
        assert local == 0, f"{name} spills {local} bytes a thread"
        assert registers <= most, name


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_the_sum_over_chunks_spills_nothing(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    types = {"partial": FP32, "out": FP32, "of_sample": INT, "width": "i32"}
    constants = {"CHUNKS": reduction.CHUNKS, "COLUMNS": reduction.COLUMNS}
    registers, local = resources(compile_kernel(reduction.SUM_CHUNKS, types, constants, capability, 4), tmp_path)
    assert local == 0
    assert registers <= 64
