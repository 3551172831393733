"""What the plan predicted, beside what was measured. The two never share a cell."""

from __future__ import annotations

from compress.records import Plan, PredictedLatency, Report, Speed, Timing
from compress.report import format as fmt
from compress.report.table import Row, Table, capped

ARTIFACT_SIZE, PEAK_MEMORY, TIME = "artifact size", "peak memory of the run", "time"


def predictions(plan: Plan) -> dict[str, str]:
    """What a run was predicted to make and take, by the name that a page gives it."""
    return {
        ARTIFACT_SIZE: fmt.size(plan.predicted_artifact_bytes),
        "compressed model size": fmt.size(plan.predicted_model_bytes),
        PEAK_MEMORY: fmt.size(plan.predicted_peak_memory_bytes),
        "disk needed by the run": fmt.size(plan.predicted_disk_bytes),
        TIME: fmt.duration(plan.predicted_seconds),
    }


def prediction_table(report: Report) -> Table:
    """Bytes, memory, disk and time of the run itself."""
    title, columns = "Plan: predicted and measured", ("quantity", "predicted", "measured")
    if report.plan is None:
        return Table("plan", title, (), "", (), empty="no plan was recorded")
    measured = _measured(report)
    rows = tuple((name, text, measured.get(name, "not recorded")) for name, text in predictions(report.plan).items())
    return Table("plan", title, columns, "lrr", rows)


def latency_table(report: Report) -> Table:
    """Predicted speed-ups, and what the timing of the same setting found."""
    found = report.plan.predicted_latency if report.plan else ()
    rows, notes = capped(
        (_latency_row(one, report.speed) for one in found),
        (
            "Predicted by the profile's figures of its kernels where it has them; else at best: bytes at its "
            "bandwidth, products at its dense peak, nothing else counted. Of a model that fits a cache this says "
            "little.",
        ),
    )
    columns = ("setting", "baseline, predicted", "variant, predicted", "bound by", "speed-up, predicted", "measured")
    return Table("latency", "Latency: predicted and measured", columns, "lrrlrr", rows, notes=notes)


def predicted_speedup(plan: Plan | None, timing: Timing | None) -> PredictedLatency | None:
    """The prediction for the setting that leads the report; without timings for decoding or whatever comes first."""
    found = plan.predicted_latency if plan else ()
    if timing is None:
        decode = [one for one in found if one.phase == "decode"] or list(found)
        return min(decode, key=lambda one: (one.batch, one.prompt), default=None)
    # a decode step of one token after 127 is predicted as after 128
    alike = [one for one in found if one.phase == timing.phase and one.batch == timing.batch]
    close = [one for one in alike if abs(one.prompt - timing.prompt) <= 1]
    return min(close, key=lambda one: abs(one.prompt - timing.prompt), default=None)


def setting(one: PredictedLatency) -> str:
    """`decode batch 1 prompt 128`."""
    return f"{one.phase} batch {one.batch} prompt {one.prompt}"


def ratio(one: PredictedLatency) -> float:
    """Predicted speed-up."""
    return one.baseline_s / one.variant_s if one.variant_s > 0 else float("nan")


def _latency_row(one: PredictedLatency, speed: Speed | None) -> Row:
    timings = speed.timings if speed else ()
    alike = [each for each in timings if (each.phase, each.batch) == (one.phase, one.batch)]
    timing = next((each for each in alike if abs(each.prompt - one.prompt) <= 1), None)
    measured = fmt.NOT_MEASURED
    if timing is not None:
        measured = fmt.speedup_text(timing.speedup, timing.interval)
    times = fmt.duration(one.baseline_s), fmt.duration(one.variant_s)
    return setting(one), *times, one.bound, f"{fmt.significant(ratio(one))}x", measured


def _measured(report: Report) -> dict[str, str]:
    passes_time = fmt.duration(sum(result.seconds for result in report.passes))
    found = {
        ARTIFACT_SIZE: fmt.size(report.artifact_bytes) if report.artifact_bytes > 0 else fmt.NOT_MEASURED,
        TIME: f"{passes_time} in the passes alone",
    }
    if report.cost:
        found[TIME] = f"{fmt.duration(report.cost.seconds)} ({passes_time} in the passes)"
        passes_peak = fmt.size(report.cost.passes_peak_memory_bytes)
        found[PEAK_MEMORY] = f"{fmt.size(report.cost.peak_memory_bytes)} ({passes_peak} in the passes)"
    return found
