"""What operators take of a call: the profilers' own words read aright, and told in the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compress
from compress import hwprofiles
from compress.errors import UnsupportedError
from compress.export import find
from compress.export.onnx.profiler import read_events
from compress.profiles import as_profile
from compress.records import Footprint, Interval, Speed, Timing
from compress.records.speed import OperatorTimes
from compress.report.operator_rows import MOST_BARS, operator_chart, operator_table
from compress.speed.measure import with_operators
from compress.speed.operators import WARM_CALLS, Profiled, operator_record, operator_times, repeat
from compress.speed.timing_process import TimingRequest
from compress.target import Session

PROFILE = as_profile(hwprofiles.load("cpu-x86-avx2"), "onnx")


def node(kind: str, microseconds: int) -> dict[str, Any]:
    return {"cat": "Node", "name": "some/node_kernel_time", "dur": microseconds, "args": {"op_name": kind}}


def run(*nodes: dict[str, Any]) -> list[dict[str, Any]]:
    return [*nodes, {"cat": "Session", "name": "model_run", "dur": 10_000, "args": {}}]


def profiled(*calls: Mapping[str, tuple[int, float]]) -> Profiled:
    return Profiled("a profiler", calls)


def speed(**changes: Any) -> Speed:
    one = Interval(low=1.0, high=1.0)
    timing = Timing(
        phase="decode", batch=1, prompt=16, rounds=30, baseline_s=1.0, variant_s=1.0, baseline_tokens_per_s=1.0,
        variant_tokens_per_s=1.0, speedup=1.0, interval=one, control=one, verdict="same",
    )  # fmt: skip
    foot = Footprint(disk_bytes=1)
    return Speed(runtime="r", threads=1, machine={}, timings=(timing,), baseline=foot, variant=foot, **changes)


@pytest.fixture(scope="module")
def exported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, target = tmp_path_factory.mktemp("exported"), find("onnx")
    target.write(compress.load(llama), PROFILE, folder)  # type: ignore[arg-type]
    return folder


def decode(session: Session) -> Callable[[], None]:
    return session.call(np.array([[5]]), 16)


def test_the_calls_that_warm_up_are_left_out_and_operators_are_added_up_by_kind() -> None:
    cold = run(node("MatMul", 9000)) * WARM_CALLS
    warm = run(node("MatMul", 30), node("Add", 5), node("MatMul", 10)) + run(node("MatMul", 50))
    first, second = read_events([*run()[:0], *cold, *warm], calls=2)
    assert first == {"MatMul": (2, pytest.approx(40e-6)), "Add": (1, pytest.approx(5e-6))}
    assert second == {"MatMul": (1, pytest.approx(50e-6))}


def test_an_operator_that_holds_others_is_not_counted_on_top_of_them() -> None:
    events = run(node("MatMul", 30), node("If", 40)) * (WARM_CALLS + 1)
    assert read_events(events, calls=1) == [{"MatMul": (1, pytest.approx(30e-6))}]


def test_a_call_of_several_runs_is_their_sum() -> None:
    events = run(node("Conv", 20)) * (3 * (WARM_CALLS + 2))
    assert read_events(events, calls=2) == [{"Conv": (3, pytest.approx(60e-6))}] * 2


def test_a_profile_of_another_kind_is_refused_and_not_taken_for_no_time() -> None:
    with pytest.raises(UnsupportedError, match="another kind of profile"):
        read_events([{"name": "something", "cat": "else"}], calls=1)
    with pytest.raises(UnsupportedError, match="another kind of profile"):
        read_events(run() * (WARM_CALLS + 1), calls=1)


def test_calls_to_count_end_with_the_time_for_them_but_not_before_a_few() -> None:
    now, done = [0.0], [0]

    def call() -> None:
        now[0] += 4.0
        done[0] += 1

    assert repeat(call, lambda: now[0]) == 3
    assert done[0] == WARM_CALLS + 3


def test_kinds_are_medians_over_calls_and_the_one_that_takes_most_comes_first() -> None:
    found = operator_record(
        "decode",
        profiled({"MatMul": (4, 0.008)}, {"MatMul": (4, 0.010)}, {"MatMul": (4, 0.030)}),
        profiled({"MatMulNBits": (4, 0.002), "Add": (1, 0.001)}, {"MatMulNBits": (4, 0.004), "Add": (1, 0.003)}),
    )
    assert [each.kind for each in found.operators] == ["MatMul", "MatMulNBits", "Add"]
    first, second, _ = found.operators
    assert (first.baseline_nodes, first.baseline_s, first.variant_nodes, first.variant_s) == (4, 0.010, 0, 0.0)
    assert (second.baseline_s, second.variant_s) == (0.0, pytest.approx(0.003))
    assert (found.calls, found.baseline_s, found.variant_s) == (2, 0.010, pytest.approx(0.005))


def test_onnxruntime_tells_what_a_real_graph_does_and_leaves_no_file_behind(exported: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("compress-profile-*"))
    found = operator_times(find("onnx"), {"baseline": exported, "variant": exported}, 1, "decode", decode)
    assert set(Path(tempfile.gettempdir()).glob("compress-profile-*")) <= before
    assert not [path for path in exported.iterdir() if path.suffix == ".json" and "run" in path.name]
    matmul = next(each for each in found.operators if "MatMul" in each.kind)
    assert matmul.baseline_nodes == matmul.variant_nodes >= 3 * 4
    assert 0 < matmul.baseline_s < found.baseline_s
    assert found.profiler.startswith("onnxruntime")


def test_a_runtime_that_does_not_tell_leaves_its_reason_in_the_report() -> None:
    profile = as_profile(PROFILE, "checkpoint")
    request = TimingRequest(
        baseline=Path("a"), variant=Path("b"), profile=profile, vocabulary=9, longest=9, budget_s=1.0
    )
    found = with_operators(speed(), request)
    assert found.operators is None
    (row,), (note,) = operator_table(found).rows, operator_table(found).notes
    assert "not measured" in row
    assert "does not tell what its operators take" in note
    assert operator_table(speed()).rows == ()


def test_the_table_and_the_bars_show_the_largest_and_all_others_as_one() -> None:
    kinds = {f"Kind{place:02}": (1, 1e-3 / (place + 1)) for place in range(30)}
    times = operator_record("decode", profiled(kinds), profiled({"Kind00": (2, 5e-4)}))
    table = operator_table(speed(operators=times))
    assert table.rows[0] == ("Kind00", "1.00 ms", "25.0%", "500 us", "100.0%", "1", "2")
    assert table.rows[-2][0] == "11 other kinds"
    assert table.rows[-1][0] == "all operators"
    svg = operator_chart(times)
    assert svg.count('class="before"') == MOST_BARS
    assert operator_chart(None) == ""


def test_names_of_operators_are_only_text_and_figures_that_are_none_are_not_drawn() -> None:
    hostile = operator_record("decode", profiled({"<img onerror=x>": (1, 1.0)}), profiled({"Add": (1, float("nan"))}))
    svg = operator_chart(hostile)
    assert "<img" not in svg
    assert "nan" not in svg
    assert OperatorTimes.model_validate_json(hostile.model_dump_json()).operators[0].kind


def test_openvino_tells_it_too(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    target = find("openvino")
    target.write(compress.load(llama), as_profile(hwprofiles.load("cpu-x86-avx512-vnni"), "openvino"), tmp_path)  # type: ignore[arg-type]
    found = operator_times(target, {"baseline": tmp_path, "variant": tmp_path}, 1, "decode", decode)
    assert found.profiler.startswith("openvino")
    assert any("FullyConnected" in each.kind or "MatMul" in each.kind for each in found.operators)
    assert found.baseline_s > 0
