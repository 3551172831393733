"""The drawings of a report and the pages around them: marks where the figures are, nothing hidden, nothing run."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from compress.records import Gate, Interval, PassResult
from compress.report import to_html
from compress.report.curve_chart import curve_chart
from compress.report.front_chart import Point, front_chart
from compress.report.front_points import trade_of
from compress.report.heat_rows import MAX_COLUMNS, MAX_ROWS, heat_of, heat_table
from compress.report.html_page import MAX_BYTES
from compress.report.size_rows import parts_of, size_table
from helpers.chart_report import (
    KINDS,
    RECIPE,
    Seen,
    curve,
    heights,
    layer,
    passes,
    plan,
    points,
    quality,
    report,
    speed,
    table,
    timing,
    trade,
)
from helpers.reports import around


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_better_of_two_stands_higher(better: Any) -> None:
    worse = Point("w2", 0.4, 2.6, 200, "front")
    found = heights(front_chart(trade(worse, better=better)))
    assert (found["w2"] > found["w4"]) == (better == "lower")


def test_no_loss_stands_on_top_though_losses_span_orders_of_magnitude() -> None:
    many = [Point(f"v{place}", 10.0**-place, 1.5 + place / 10, 10, "front") for place in range(1, 5)]
    found = heights(front_chart(trade(*many)))
    assert found["baseline"] < found["v4"] < found["v3"] < found["v2"] < found["v1"]
    gaps = [found[f"v{place}"] - found[f"v{place + 1}"] for place in (1, 2, 3)]
    assert max(gaps) - min(gaps) < 1  # equal ratios, equal distances


def test_ties_are_ringed_predictions_hatched_and_limits_shaded() -> None:
    plain = front_chart(trade())
    tied = front_chart(trade(Point("w3", 0.006, 2.5, 300, "dominated", tied=True)))
    predicted = front_chart(trade(Point("far", 0.006, 3.5, 300, "front", predicted=True)))
    limited = front_chart(trade(worst_quality=0.004, least_speedup=1.5))
    assert [svg.count('class="ring"') for svg in (plain, tied, predicted, limited)] == [0, 1, 0, 0]
    assert [svg.count('class="mark predicted"') for svg in (plain, tied, predicted, limited)] == [0, 0, 1, 0]
    assert [svg.count('class="beyond"') for svg in (plain, tied, predicted, limited)] == [0, 0, 0, 2]
    assert "predicted, not measured" in predicted and "dominated, tied" in tied


def test_every_mark_lies_on_the_page_and_has_its_words() -> None:
    odd = [
        Point("nan", float("nan"), 1.0, 5, "front"),
        Point("far", 1e9, 1e9, 0, "dominated", around(1e9, 1e12), Interval(low=-1.0, high=float("inf"))),
    ]
    svg = front_chart(trade(*odd))
    positions = [float(found) for found in re.findall(r'(?:\bx|x1|x2|cx)="(-?[\d.]+)%"', svg)]
    assert positions and all(0 <= position <= 100 for position in positions)
    assert "w4: 2.50x, KL 0.00500, 300 B, recommended" in svg and ">nan<" not in svg and 'x="nan' not in svg


def test_names_that_would_meet_become_numbers_with_a_key() -> None:
    few = front_chart(trade())
    assert ">w4</text>" in few and ">2</text>" not in few
    crowd = [Point(f"a long name of variant {place}", 0.005, 2.5 + place / 100, 300, "front") for place in range(9)]
    svg = front_chart(trade(*crowd))
    for place, point in enumerate(points(*crowd), 1):
        assert f">{place}. {point.name}</text>" in svg


def test_one_run_is_drawn_as_its_baseline_its_artifact_and_the_prediction() -> None:
    found = trade_of(report(gates=(Gate(name="kl", bound=0.02, found=0.0054, met=True),)))
    assert found is not None and found.worst_quality == 0.02
    assert [(point.name, point.predicted, point.tied) for point in found.points] == [
        ("baseline", False, False), ("artifact", False, False), ("predicted", True, False)
    ]  # fmt: skip
    assert found.points[2].speedup == 4.0
    open_ = trade_of(report(speed=speed(timing("inconclusive", 1.05))))
    assert open_ is not None and open_.points[1].tied


def test_what_was_not_measured_is_not_drawn() -> None:
    nothing = report(speed=None, plan=None)
    assert trade_of(nothing) is None
    assert "<svg" not in to_html(nothing.model_copy(update={"passes": (), "artifact_quality": None}))


def test_a_predicted_speed_has_a_row_of_its_own() -> None:
    rows = table(report(), "quality").rows
    assert rows[-1][:3] == ("plan, predicted", "400 kB", "4.00x")
    assert rows[1][2] == "2.50x (2.40 to 2.60)"
    row = table(report(), "latency").rows[0]
    assert row[-2:] == ("4.00x", "2.50x (2.40 to 2.60)")


def test_the_heat_map_has_a_cell_per_layer_and_outlines_the_worst() -> None:
    heat = heat_of(passes())
    assert heat is not None
    assert heat.columns == KINDS and heat.rows == ("0", "1", "2", "3")
    assert [cell.layer for cell in heat.worst] == [f"model.layers.{block}.down_proj" for block in (3, 2, 1)]
    assert heat.cells[3][6] == heat.worst[0] and heat.worst[0].level == 6
    levels = [cell.level for row in heat.cells for cell in row if cell]
    assert min(found for found in levels if found is not None) == 0
    svg = to_html(report()).partition('<svg class="chart heat"')[2].partition("</svg>\n<figcaption>")[0]
    assert svg.count("<title>model.layers.") == 28 and svg.count(' worst"') == 3
    assert "<title>model.layers.3.down_proj: 0.00220, 4.5 bits</title>" in svg


def test_bits_stand_in_the_header_where_a_column_shares_them() -> None:
    mixed = tuple(
        layer(block, kind, bits=8.5 if (block, kind) == (0, "q_proj") else 4.5) for block in (0, 1) for kind in KINDS
    )
    found = heat_table(heat_of((PassResult(pass_text=RECIPE, matches={}, layers=mixed, seconds=1.0),)))
    assert found.columns[:3] == ("block", "q_proj", "k_proj (4.5 bits)")
    assert found.rows[0][1:3] == ("0.000100 (8.5 bits)", "0.000400")


def test_experts_share_the_cell_of_the_worst_of_them() -> None:
    names = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in (0, 1) for expert in range(8)]
    found = tuple(
        layer(0, "up_proj", error=0.001 * (1 + place)).model_copy(update={"layer": name})
        for place, name in enumerate(names)
    )
    heat = heat_of((PassResult(pass_text=RECIPE, matches={}, layers=found, seconds=1.0),))
    assert heat is not None and heat.rows == ("0", "1") and heat.columns == ("up_proj",)
    cells = [row[0] for row in heat.cells]
    assert [(cell.layer, cell.count) for cell in cells if cell] == [(names[7], 8), (names[15], 8)]


def test_too_many_blocks_and_kinds_are_gathered_and_said_to_be() -> None:
    kinds = tuple(f"part{place}" for place in range(30))
    layers = tuple(
        layer(0, "q_proj", error=1e-4 * (1 + place)).model_copy(update={"layer": f"layers.{block}.{kind}"})
        for block in range(250)
        for place, kind in enumerate(kinds)
    )
    heat = heat_of((PassResult(pass_text=RECIPE, matches={}, layers=layers, seconds=1.0),))
    assert heat is not None
    assert len(heat.rows) == 84 <= MAX_ROWS and heat.rows[0] == "0 to 2"
    assert heat.columns == kinds[-MAX_COLUMNS:]  # the worst
    assert "3 neighbouring blocks" in heat.notes[0] and "16 kinds" in heat.notes[1]


def test_a_model_without_blocks_or_errors_has_no_heat_map() -> None:
    assert heat_of(passes(blocks=1)) is None
    bare = tuple(each.model_copy(update={"output_error": None, "error_after": None}) for each in passes()[0].layers)
    assert heat_of((PassResult(pass_text=RECIPE, matches={}, layers=bare, seconds=1.0),)) is None
    assert heat_of((passes()[0].model_copy(update={"layers": tuple(
        each.model_copy(update={"output_error": float("nan")}) for each in passes()[0].layers)}),)) is None  # fmt: skip


def test_the_parts_are_all_of_the_bytes() -> None:
    found = parts_of(report())
    assert sum(part.stored for part in found) == 410_000
    assert (found[0].name, found[-1].name) == ("lm_head", "all else")
    row = size_table(report()).rows[1]
    assert row == ("model.layers.*.q_proj", "4", "32.8k", "int4(group=128)", "4.5", "18.4 kB", "4.5%")


def test_a_curve_has_a_step_and_a_band_per_part() -> None:
    svg = curve_chart(curve())
    assert svg.count('class="band"') == svg.count('class="line"') == 6
    assert "0 to 8: 0.004 (0.001 to 0.009) nats" not in svg and "<title>0 to 8: 0.004" in svg
    negative = curve().model_copy(update={"points": tuple(
        point.model_copy(update={"value": -point.value}) for point in curve().points)})  # fmt: skip
    assert curve_chart(negative).count('class="line"') == 6
    assert curve_chart(curve().model_copy(update={"points": ()})) == ""
    assert 'class="one"' in curve_chart(curve("reliability", "fraction"))


def test_worst_samples_show_their_blanks_and_line_ends() -> None:
    row = table(report(), "worst").rows[0]
    assert row == ("3, 7", '... "if not x:\\n return"', '" None"', '" None"', "90.0%", '" x"', "20.0%", "1.50")


def test_a_page_of_eighty_blocks_is_under_its_limit_and_whole() -> None:
    curves = (curve(), curve("kl_by_confidence"), curve("reliability", "fraction"))
    found = report(
        passes=passes(80), plan=plan(80), artifact_quality=quality(curves=curves, worst=quality().worst * 20)
    )
    page = to_html(found)
    assert len(page.encode()) < MAX_BYTES == 300_000
    assert len(re.findall(r"<title>model\.layers\.\d", page)) == 560


def test_every_drawing_is_named_and_stands_over_its_table() -> None:
    seen = Seen(to_html(report())).tags
    ids = Counter(attributes["id"] for _, attributes in seen if "id" in attributes)
    assert set(ids.values()) == {1}
    charts = [attributes for tag, attributes in seen if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) == 6 and {attributes["aria-labelledby"] for attributes in charts} <= ids.keys()
    tables = [attributes for tag, attributes in seen if tag == "table"]
    assert {attributes["aria-labelledby"] for attributes in tables} <= ids.keys()
    heads = [attributes.get("scope") for tag, attributes in seen if tag == "th"]
    assert set(heads) == {"col", "row"}
    links = [attributes["href"] for tag, attributes in seen if tag == "a"]
    assert links and {str(link).removeprefix("#") for link in links} <= ids.keys()
    levels = [int(tag[1]) for tag, _ in seen if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
