"""The parts of the GPU check: what they call wrong, what they count, and what becomes of errors."""

import dataclasses
import itertools
import json
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpu import check, kernels, wheels
from gpu.attention import IMPLEMENTATIONS, Case, compare, run
from gpu.bandwidth import bytes_of
from gpu.context import AT_ONCE, Context
from gpu.exact_attention import RESULTS, exact_attention, excess
from gpu.fused_operations import OPERATIONS, draw
from gpu.model import precision, relative
from gpu.processes import StageResult, _after
from gpu.report import Report, to_markdown
from gpu.rows import DeviceLostError, Failed, Found, NotRun, Row, measured
from gpu.stages import STAGES, Stage
from gpu.timing import time_alternately
from gpu.training import _STEP_LINE
from gpu.wheel_install import install_wheels
from wan_model import PackLayout, TokenRows

PACK = TokenRows.whole(PackLayout(((2, 3, 4), (1, 1, 1), (1, 2, 5)), padding=3))
HEADS, HEAD = 3, 20


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations on a CPU round, where Triton's interpreter truncates."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def context(tmp_path: Path, seconds: float = 60.0, **options) -> Context:
    return Context("cpu", tmp_path, time.monotonic() + seconds, **options)


class GradientsOff(torch.autograd.Function):
    """The input; its gradient is off by a hundredth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_is_its_formula_and_an_error_of_a_hundredth_is_none(operation, dtype):
    inputs = draw(operation, PACK, HEADS * HEAD, dtype, "cpu")

    def call(*own: Tensor) -> Tensor:
        # As the kernels: in fp32, and rounded once.
        return operation.formula(PACK, HEAD)(*(x.float() for x in own)).to(dtype)

    def judged(function: Callable[..., Tensor]) -> Found:
        return kernels.compare(operation, function, inputs, PACK, HEAD)

    assert 0.01 < judged(call).numbers["value / bound"] <= 1
    with pytest.raises(Failed, match=r"^beyond rounding or not equal: value, gradient 0"):
        judged(lambda *own: call(*own) * 1.01)
    with pytest.raises(Failed, match=r"^beyond rounding or not equal: gradient 0$") as error:
        judged(lambda x, *own: call(GradientsOff.apply(x), *own))
    assert error.value.numbers["value / bound"] <= 1
    with pytest.raises(Failed, match=r": equal without gradients$"):
        judged(lambda *own: call(*own) if torch.is_grad_enabled() else -call(*own))


def test_an_operation_of_the_model_is_judged():
    operation = OPERATIONS[0]
    inputs = draw(operation, PACK, HEADS * HEAD, torch.float32, "cpu")
    found = kernels.compare(operation, operation.call(PACK, HEAD), inputs, PACK, HEAD)
    assert found.numbers["value / bound"] <= 1


def test_not_a_number_is_no_rounding():
    operation = OPERATIONS[-1]
    inputs = draw(operation, PACK, HEADS * HEAD, torch.float32, "cpu")

    def one_lost(*own: Tensor) -> Tensor:
        out = operation.call(PACK, HEAD)(*own)
        return out.index_fill(1, torch.tensor([3]), float("nan"))

    with pytest.raises(Failed, match="beyond rounding or not equal: value"):
        kernels.compare(operation, one_lost, inputs, PACK, HEAD)


def test_the_bytes_of_an_operation():
    by_name = {operation.name: bytes_of(operation, 10, 64, 32) for operation in OPERATIONS}
    one, table = 10 * 64 * 2, 10 * 32 * 4
    assert by_name["layer norm with modulation"] == (2 * one, 3 * one)
    assert by_name["gate and addition"] == (3 * one, 3 * one)
    assert by_name["RMS norm with rotation"] == (2 * one + table, 3 * one + table)


# -- attention --------------------------------------------------------------------------------------------------------

CASE = Case("a pack", (40, 1, 7), (6, 3, 9), padding=2)


def plain(q: Tensor, k: Tensor, v: Tensor, q_offsets, k_offsets) -> Tensor:
    parts = [
        ((q[a:b].transpose(0, 1) @ k[c:d].permute(1, 2, 0)) * q.shape[-1] ** -0.5).softmax(-1) @ v[c:d].transpose(0, 1)
        for (a, b), (c, d) in zip(itertools.pairwise(q_offsets), itertools.pairwise(k_offsets), strict=True)
    ]
    return F.pad(torch.cat([part.transpose(0, 1) for part in parts]), (0, 0, 0, 0, 0, q.shape[0] - q_offsets[-1]))


@pytest.mark.parametrize("case", [CASE, Case("negative", (9, 64), negative=True)], ids=lambda case: case.name)
def test_the_reference_is_autograds(case, monkeypatch):
    monkeypatch.setattr("gpu.exact_attention._MOST_SCORES", 50)  # several chunks of queries
    inputs = dataclasses.replace(case, dtype=torch.float64).inputs(2, 16, "cpu")
    exact = exact_attention(inputs, *case.offsets)
    for name, value in run(plain, inputs, case).items():
        assert relative(exact.values[name], value) < 1e-12
        assert (exact.deviations[name][: case.offsets[0][-1] if name in ("out", "dq") else None] > 0).all()


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_is_judged_by_rounding(dtype):
    case = dataclasses.replace(CASE, dtype=dtype)
    inputs, attend = case.inputs(2, 32, "cpu"), IMPLEMENTATIONS["sdpa"]
    exact = exact_attention(inputs, *case.offsets)
    found = compare("sdpa", attend, case, inputs, exact)
    assert all(0.05 < found.numbers[f"{name} / rounding"] < 2 for name in RESULTS)

    def off(q: Tensor, *rest) -> Tensor:
        return 1.01 * attend(q, *rest)

    def gradient_off(q: Tensor, *rest) -> Tensor:
        return attend(GradientsOff.apply(q), *rest)

    def one_row_off(q: Tensor, *rest) -> Tensor:
        out = attend(q, *rest)
        return torch.cat([out[:5], out[4:5], out[6:]])

    def lost(q: Tensor, *rest) -> Tensor:
        return attend(q, *rest) * torch.where(torch.arange(q.shape[0]) == 3, float("nan"), 1.0)[:, None, None].to(q)

    for wrong, names in ((off, "out is"), (gradient_off, "dq is"), (one_row_off, "out is"), (lost, "out is")):
        with pytest.raises(Failed, match=f"^{names} off by"):
            compare("sdpa", wrong, case, inputs, exact)


def test_the_excess_of_one_wrong_row():
    value, deviation = torch.zeros(6, 2, 4, dtype=torch.float64), torch.full((6, 2, 4), 0.5, dtype=torch.float64)
    got = value.clone()
    got[4, 1] = 2.0
    assert excess(got, value, deviation) == pytest.approx((4 / (0.5 * 48**0.5), 4.0))
    assert excess(got * float("nan"), value, deviation)[0] == float("inf")


def test_a_kernel_that_torch_lacks_is_a_failure_only_of_what_the_model_uses():
    case = Case("one", (4,))
    inputs = case.inputs(2, 16, "cpu")
    exact = exact_attention(inputs, *case.offsets)

    def none(*given) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    with pytest.raises(NotRun, match="torch has no such kernel for these inputs"):
        compare("flash", none, case, inputs, exact)
    with pytest.raises(RuntimeError, match="No available kernel"):
        compare("auto", none, case, inputs, exact)


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_precise_fails(tmp_path, monkeypatch):
    from gpu.model import _Model

    it = _Model(context(tmp_path))
    assert precision(it, "auto").numbers["out off by"] < 0.01
    monkeypatch.setitem(it.__dict__, "plain", {name: 1.02 * value for name, value in it.plain.items()})
    with pytest.raises(Failed, match="further from fp64 than rounding explains"):
        precision(it, "auto")


# -- rows, time, processes --------------------------------------------------------------------------------------------


def raised(error: Exception) -> Callable[[], Found]:
    def measure() -> Found:
        raise error

    return measure


def test_what_becomes_of_an_error():
    assert measured("x", lambda: Found("it holds", {"n": 1})).to_json() == {
        "name": "x", "outcome": "passed", "why": "it holds", "numbers": {"n": 1}
    }  # fmt: skip
    lost = torch.OutOfMemoryError("CUDA out of memory")
    assert measured("x", raised(lost), memory_may_lack=True).outcome == "not run"
    assert measured("x", raised(lost)).outcome == "failed"
    absent = ModuleNotFoundError("No module named 'av'", name="av")
    assert measured("x", raised(absent)).why == "the package av is not installed"
    ours = ModuleNotFoundError("No module named 'wan_model.gone'", name="wan_model.gone")
    assert measured("x", raised(ours)).outcome == "failed"
    with pytest.raises(DeviceLostError):
        measured("x", raised(DeviceLostError("an illegal memory access")))


def test_a_row_is_not_begun_without_time_nor_twice(tmp_path):
    begun: list[str] = []
    late = context(tmp_path, seconds=2, begin=begun.append, done=frozenset({"done"}))
    assert list(late.row("done", lambda: Found("again"))) == []
    (row,) = late.row("long", lambda: Found("it holds"), seconds=3)
    assert (row.outcome, row.why) == ("not run", "the time of the stage was used up")
    (row,) = context(tmp_path, seconds=-5).row("known", lambda: Found("it holds"), seconds=AT_ONCE)
    assert row.outcome == "passed"
    (row,) = late.row("short", lambda: Found("it holds"))
    assert (row.outcome, begun) == ("passed", ["short"])


@pytest.mark.parametrize(
    ("planned", "outcome", "said"),
    [(30, "failed", "it overran its 30 s in 'hanging' and was killed"), (100, "not run", "; give more --minutes")],
)
def test_a_stage_with_less_time_than_planned_has_not_failed(planned, outcome, said):
    result = StageResult(Stage("one", "One", "", planned), 30.0)
    assert not _after(result, None, "hanging", time.monotonic(), ended=False)
    (row,) = result.rows
    assert row.outcome == outcome
    assert said in row.why


def test_timing_goes_on_without_calls_that_fail(tmp_path):
    calls: list[str] = []

    def wrong() -> None:
        raise RuntimeError("a wrong shape")

    def large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = time_alternately(
        {"a": lambda: calls.append("a"), "wrong": wrong, "large": large, "b": lambda: calls.append("b")},
        context(tmp_path),
    )
    assert "".join(calls) == "aa" + "bb" + "ba"
    assert [len(found[name].seconds) for name in "ab"] == [2, 2]
    assert found["a"].figures()["each"].count(" ") == 1
    with pytest.raises(Failed, match="RuntimeError: a wrong shape") as error:
        found["wrong"].figures()
    assert error.value.traceback[-1] == "RuntimeError: a wrong shape"
    with pytest.raises(NotRun, match="more memory than the device has"):
        found["large"].figures()
    late = time_alternately({"a": lambda: calls.append("late")}, context(tmp_path, seconds=1))
    with pytest.raises(NotRun, match="the time of the stage was used up"):
        late["a"].figures()
    assert "late" not in calls


def test_the_lines_of_a_training_step():
    line = (
        "step 3/7  loss 0.9961  grad norm 0.020  lr 1.35e-07  1 samples  14,321 tokens/s  371 TFLOP/s/device  MFU 37.5%"
        "  packing 100.0%  data wait 0.00 s  ETA 9.1 s"
    )
    assert _STEP_LINE.search(line).groupdict() == {
        "step": "3", "loss": "0.9961", "tokens": "14,321", "tflops": "371", "mfu": "37.5"
    }  # fmt: skip
    assert _STEP_LINE.search(re.sub(r"  MFU [\d.]+%", "", line))["mfu"] is None


def test_the_report_is_valid_where_numbers_are_not(tmp_path):
    rows = [
        Row(
            "one | two", "failed", "not a number", {"error": float("nan"), "equal": True}, traceback=["File x", "Error"]
        ),
        Row("three", "passed", "it holds", {"GB/s": 3021.4}, table=[{"kernel": "k", "ms": 2.0}, {"kernel": "l"}]),
    ]
    report = Report({"device": "cuda", "card": "NVIDIA H100 80GB HBM3"}, [StageResult(STAGES[1], 45.0, 3.0, rows)])
    report.write(tmp_path)
    written = json.loads((tmp_path / "gpu_check.json").read_text(), parse_constant=pytest.fail)
    assert written["stages"][0]["rows"][0]["numbers"] == {"error": "nan", "equal": True}
    assert report.summary().startswith("1 rows passed, 1 failed, 0 not run in 3 s on NVIDIA H100 80GB HBM3; the check")
    markdown = to_markdown(report)
    assert "| one \\| two | failed | not a number | error nan; equal yes |" in markdown
    assert "| kernel | ms |\n| --- | --- |\n| k | 2 |\n| l |  |" in markdown


def test_a_cpu_is_chosen_for_every_process(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert check.environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""
    on_gpu = check.environment("cuda", Path("/site"))
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "0"
    paths = on_gpu["PYTHONPATH"].split(":")
    assert paths[0] == "/site"
    assert [Path(path).name for path in paths[1:6]] == ["tools", "src", "src", "src", "src"]


# -- wheels -----------------------------------------------------------------------------------------------------------


def test_wheels_have_the_tested_versions(tmp_path):
    versions, commands = wheels.pins(), wheels.commands(tmp_path, "3.12")
    asked = [command[-1] for command in commands]
    assert f"diffusers=={versions['diffusers']}" in asked
    assert f"antlr4-python3-runtime=={versions['antlr4-python3-runtime']}" == asked[-1]
    assert all("--no-deps" in command for command in commands)
    assert all("manylinux_2_31_x86_64" in command for command in commands[:-1])
    for name in (f"diffusers-{versions['diffusers']}-py3-none-any.whl", "diffusers-0.1-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert wheels.unknown_wheels(tmp_path) == ["diffusers-0.1-py3-none-any.whl"]


def test_one_wheel_that_cannot_be_installed_does_not_keep_out_the_others(tmp_path):
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried-1.0.dist-info"
        wheel.writestr("carried.py", "value = 3\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "torn-1.0-py3-none-any.whl").write_bytes(b"PK")
    installed, torn = install_wheels(folder, site, 120)
    assert (installed.outcome, installed.why) == ("passed", "1 of 2 wheels are installed for this run")
    assert (torn.name, torn.outcome) == ("torn-1.0-py3-none-any.whl", "failed")
    assert (site / "carried.py").read_text() == "value = 3\n"
