"""The primitives of csrc/device on the executor and on the device; runs first where there is a GPU.

Here the executor is compared with numpy, bit for bit where the result has no choice.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.simt.build import COMPILER, ROOT, build_program

SOURCE = Path(__file__).with_name("prims.cu")
NVCC = shutil.which("nvcc")
UNTOUCHED = 0xA5A5A5A5
# Terms of one element of m16n8k16 and m16n8k8, its own value among them.
NUM_TERMS = {"bf16": 17, "fp16": 17, "tf32": 9}
# What has no choice: roundings, movements, and sums that are exact.
SAME_BITS = ["to_tf32", "pack_bf16", "pack_fp16", "to_bf16", "to_fp16", "exchange", "load"]
SAME_BITS += ["copy_4", "copy_8", "copy_16", "bf16_out_exact", "fp16_out_exact", "tf32_out_exact"]

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
Results = dict[str, Words]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # infinities and NaNs are meant
]


def results_of(program: Path, file: Path) -> Results:
    subprocess.run([str(program), str(file)], check=True, timeout=300)
    lines = [line.split() for line in file.read_text().splitlines()]
    return {name: np.array([int(w, 16) for w in words], np.uint32) for name, *words in lines}


def compile_with_nvcc(architecture: str, program: Path) -> None:
    assert NVCC is not None
    command = [NVCC, "-std=c++20", "-O3", f"-arch={architecture}", f"-I{ROOT / 'csrc'}"]
    command += [str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Results:
    program = build_program("prims", [SOURCE], flavour="races")
    return results_of(program, tmp_path_factory.mktemp("prims") / "executor")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if NVCC is None:
        pytest.skip("no nvcc")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    major, minor = torch.cuda.get_device_capability()
    folder = tmp_path_factory.mktemp("prims")
    compile_with_nvcc(f"sm_{major}{minor}", folder / "prims")
    return results_of(folder / "prims", folder / "device")


# --- the device and its twin --------------------------------------------------------------------


def to_order(words: Words) -> npt.NDArray[np.int64]:
    """Neighbouring floats are neighbouring integers, across 0 too."""
    signed = words.astype(np.int64)
    return np.where(signed >> 31, -(signed & 0x7FFFFFFF), signed)


def assert_within_ulps(ours: Words, theirs: Words, num_ulps: int) -> None:
    is_nan = np.isnan(ours.view(np.float32))
    np.testing.assert_array_equal(is_nan, np.isnan(theirs.view(np.float32)))
    apart = np.abs(to_order(ours) - to_order(theirs))[~is_nan]
    assert apart.max() <= num_ulps


@pytest.mark.cuda
def test_the_device_was_given_the_same_inputs(executor: Results, device: Results) -> None:
    assert executor.keys() == device.keys()
    for name in executor:
        if name.endswith("_in") or name.split("_")[-2:-1] in (["a"], ["b"], ["d"]):
            np.testing.assert_array_equal(executor[name], device[name], err_msg=name)


@pytest.mark.cuda
@pytest.mark.parametrize("name", SAME_BITS)
def test_the_device_gives_the_same_bits(executor: Results, device: Results, name: str) -> None:
    np.testing.assert_array_equal(executor[name], device[name])


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "num_ulps"), [("exp2", 2), ("log2", 2), ("maximum", 0), ("fma", 0), ("quotient", 0)]
)
def test_the_device_gives_the_same_number(
    executor: Results, device: Results, name: str, num_ulps: int
) -> None:
    assert_within_ulps(executor[name], device[name], num_ulps)


@pytest.mark.cuda
@pytest.mark.parametrize("numbers", NUM_TERMS)
@pytest.mark.parametrize("case", ["rounded", "odd"])
def test_the_device_multiplies_as_the_executor(
    executor: Results, device: Results, numbers: str, case: str
) -> None:
    ours, theirs = (r[f"{numbers}_out_{case}"].view(np.float32) for r in (executor, device))
    finite = np.isfinite(ours)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    a, b, d = matrices(executor, numbers, case)
    sizes = to_lanes(np.abs(a) @ np.abs(b) + np.abs(d))
    # The device aligns the terms to the largest and cuts off: each loses less than one unit of it.
    bound = NUM_TERMS[numbers] * 2.0**-23 * sizes
    assert (np.abs(ours - theirs)[finite] <= bound[finite]).all()


# --- the executor and numpy ---------------------------------------------------------------------


def round_mantissa(x: Floats, num_bits: int, ties_to_even: bool) -> Words:
    """x without its `num_bits` lowest bits, rounded to nearest, in integers; NaN as it comes."""
    bits = x.view(np.uint32).astype(np.uint64)
    kept = bits >> num_bits
    half = np.uint64(1 << (num_bits - 1))
    odd = kept & 1 if ties_to_even else np.uint64(1)
    rest = bits - (kept << num_bits)
    up = (rest > half) | ((rest == half) & (odd == 1))
    return ((kept + up) << num_bits).astype(np.uint32)


@pytest.fixture(scope="module")
def converted(executor: Results) -> tuple[Floats, Results]:
    return executor["convert_in"].view(np.float32), executor


def test_inputs_hold_what_is_odd(converted: tuple[Floats, Results]) -> None:
    x, _ = converted
    assert np.isnan(x).any()
    assert np.isposinf(x).any()
    assert np.isneginf(x).any()
    assert ((x != 0) & (np.abs(x) < 2.0**-126)).any()
    for num_bits in (13, 16):  # ties of tf32 and of bf16
        assert (x.view(np.uint32) % 2**num_bits == 2 ** (num_bits - 1)).any()


def test_tf32_keeps_ten_bits_and_rounds_ties_away_from_zero(
    converted: tuple[Floats, Results],
) -> None:
    x, results = converted
    expected = np.where(np.isnan(x), 0x7FFFFFFF, round_mantissa(x, 13, ties_to_even=False))
    np.testing.assert_array_equal(results["to_tf32"], expected)


def to_bf16(x: Floats) -> Words:
    return np.where(np.isnan(x), 0x7FFF, round_mantissa(x, 16, ties_to_even=True) >> 16)


def to_fp16(x: Floats) -> Words:
    bits = x.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(x), 0x7FFF, bits)


@pytest.mark.parametrize(("name", "to_16_bits"), [("bf16", to_bf16), ("fp16", to_fp16)])
def test_16_bits_are_the_nearest_and_ties_even(
    converted: tuple[Floats, Results], name: str, to_16_bits: object
) -> None:
    x, results = converted
    assert callable(to_16_bits)
    expected = to_16_bits(x)
    np.testing.assert_array_equal(results[f"to_{name}"], expected)
    packed = expected | np.roll(expected, -1) << 16  # the first value in the lower half
    np.testing.assert_array_equal(results[f"pack_{name}"], packed)


def test_exp2_is_within_two_ulps_and_has_no_subnormals(converted: tuple[Floats, Results]) -> None:
    x, results = converted
    expected = np.exp2(x.astype(np.float64)).astype(np.float32)
    expected[expected < 2.0**-126] = 0
    # Beside the smallest normal number a result may fall to either side.
    is_normal = np.isnan(x) | (np.abs(x + 126) > 1e-4)
    assert_within_ulps(results["exp2"][is_normal], expected.view(np.uint32)[is_normal], 2)
    assert (results["exp2"][np.isneginf(x)] == 0).all()


def test_arithmetic_is_that_of_float32(converted: tuple[Floats, Results]) -> None:
    x, results = converted
    following, third = np.roll(x, -1), np.roll(x, -7)
    fma = x.astype(np.float64) * following + third  # rounded once more than the real one
    for name, expected, num_ulps in (
        ("quotient", x / following, 0),
        ("maximum", np.fmax(results["fma"].view(np.float32), x + third), 0),
        ("log2", np.log2(x), 2),
        ("fma", fma.astype(np.float32), 1),
    ):
        assert_within_ulps(results[name], expected.view(np.uint32), num_ulps)


def test_shuffles_exchange_lanes(executor: Results) -> None:
    lanes = np.arange(32)
    expected = [executor["exchange_in"][lanes ^ (1 << k)] for k in range(5)]
    np.testing.assert_array_equal(executor["exchange"], np.concatenate(expected))


@pytest.mark.parametrize("num_bytes", [4, 8, 16])
def test_copies_fill_up_with_zeros(executor: Results, num_bytes: int) -> None:
    copied = executor[f"copy_{num_bytes}"].view(np.uint8).reshape(num_bytes + 1, 16)
    source = executor["words_in"].view(np.uint8).reshape(32, 16)
    for num_valid, row in enumerate(copied):
        np.testing.assert_array_equal(row[:num_valid], source[num_valid, :num_valid])
        assert not row[num_valid:num_bytes].any()
        assert (row[num_bytes:] == UNTOUCHED % 256).all()


def test_loads_give_rows_or_columns_of_matrices(executor: Results) -> None:
    matrices = executor["words_in"].view(np.uint16).reshape(4, 8, 8)
    plain, transposed = executor["load"].view(np.uint16).reshape(2, 4, 8, 8)
    np.testing.assert_array_equal(plain, matrices)
    np.testing.assert_array_equal(transposed, matrices.transpose(0, 2, 1))


def matrices(results: Results, numbers: str, case: str) -> tuple[np.ndarray, ...]:
    """A (16, k), B (k, 8) and D (16, 8) in float64, from what the lanes hold (layouts: ptx.cuh)."""
    a, b, d = (results[f"{numbers}_{part}_{case}"].view(np.float32) for part in "abd")
    if numbers == "tf32":
        a, b = (round_mantissa(x, 13, ties_to_even=False).view(np.float32) for x in (a, b))
    elif numbers == "bf16":
        a, b = ((to_bf16(x).astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    else:
        a, b = (x.astype(np.float16).astype(np.float32) for x in (a, b))
    # Of A: g, t, k / half, row / 8, e. Of B: g, t, k / half, e. Of D: g, t, row / 8, e.
    left = a.reshape(8, 4, 2, 2, -1).transpose(3, 0, 2, 1, 4).reshape(16, -1)
    right = b.reshape(8, 4, 2, -1).transpose(2, 1, 3, 0).reshape(-1, 8)
    sums = d.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
    return tuple(matrix.astype(np.float64) for matrix in (left, right, sums))


def to_lanes(matrix: np.ndarray) -> np.ndarray:
    return matrix.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(-1)


@pytest.mark.parametrize("numbers", NUM_TERMS)
@pytest.mark.parametrize("case", ["exact", "rounded", "odd"])
def test_products_have_the_layouts_of_the_ptx_isa(
    executor: Results, numbers: str, case: str
) -> None:
    a, b, d = matrices(executor, numbers, case)
    expected = to_lanes((a[:, :, None] * b).sum(1) + d).astype(np.float32)
    ours = executor[f"{numbers}_out_{case}"].view(np.float32)
    if case == "exact":
        np.testing.assert_array_equal(ours, expected)
    tolerance = NUM_TERMS[numbers] * 2.0**-23 * to_lanes(np.abs(a) @ np.abs(b) + np.abs(d))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(ours[~finite], expected[~finite])
    assert (np.abs(ours - expected)[finite] <= tolerance[finite]).all()


# --- where there is nvcc ------------------------------------------------------------------------


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_compiles_and_links_the_same_source(tmp_path: Path) -> None:
    compile_with_nvcc("sm_80", tmp_path / "prims")
    assert (tmp_path / "prims").exists()
