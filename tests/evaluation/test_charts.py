"""Laws of the charts: what the picture says is what the data say."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_jax.errors import UserError
from spt_jax.evaluation.charts import HEIGHT, WIDTH, Series, line_chart, smooth, spread, thin
from spt_jax.evaluation.selection_charts import heat_map, usage_bars
from spt_jax.evaluation.svg import element, tick_labels, ticks

VALUES = st.floats(-1e6, 1e6, allow_nan=False) | st.none() | st.just(math.nan) | st.just(math.inf)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in parse(svg).iter("text")]


def pixels(polyline: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in polyline.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_elements_escape_attributes_and_name_them_as_svg_does() -> None:
    parsed = parse(element("g", class_="\"><script a='", stroke_width=1.23456))
    assert parsed.attrib == {"class": "\"><script a='", "stroke-width": "1.23"}


@settings(max_examples=60)
@given(st.lists(st.lists(VALUES, max_size=70), max_size=4))
def test_any_data_gives_well_formed_svg_with_all_points_inside(curves: list[list[float | None]]) -> None:
    svg = line_chart("Loss <&>", [Series(f"s{i} <b>", range(len(y)), y) for i, y in enumerate(curves)])
    root = parse(svg)
    assert root.find("title").text == "Loss <&>"  # pyright: ignore[reportOptionalMemberAccess]
    assert root.find("desc").text  # pyright: ignore[reportOptionalMemberAccess]
    assert "nan" not in svg
    for polyline in root.iter("polyline"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pixels(polyline))


@pytest.mark.parametrize("steps", [(2.0**64,), (-(2.0**64),), (1e300,), (0.0, 2.0**64), (-1.7e308, 1.7e308)])
@pytest.mark.parametrize("values", [(3.5, 2.5), (2.0**64, 2.0**64), (-1.7e308, 1.7e308), (0.0, 5e-324)])
def test_numbers_of_any_size_have_a_picture(steps: tuple[float, ...], values: tuple[float, ...]) -> None:
    svg = line_chart("t", [Series("a", steps, values[: len(steps)])])
    assert "nan" not in svg and "inf" not in svg
    for polyline in parse(svg).iter("polyline"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pixels(polyline))


def test_curve_is_an_affine_picture_of_its_data() -> None:
    x, y = [0, 10, 20, 40], [3.0, 1.0, 2.0, 0.5]
    points = pixels(next(parse(line_chart("t", [Series("a", x, y)])).iter("polyline")))
    for axis, data, sign in ((0, x, 1), (1, y, -1)):
        scale = (points[3][axis] - points[0][axis]) / (data[3] - data[0])
        assert scale * sign > 0
        assert [p[axis] for p in points] == pytest.approx(
            [points[0][axis] + scale * (d - data[0]) for d in data], abs=0.2
        )


def test_missing_values_are_left_out_and_an_empty_chart_says_so() -> None:
    svg = line_chart("t", [Series("a", [1, 2, 3, 4], [1.0, None, math.nan, 2.0])])
    assert len(pixels(next(parse(svg).iter("polyline")))) == 2
    assert "no values were logged" in texts(line_chart("t", [Series("a", [1], [None])]))


def test_only_long_curves_are_smoothed_over_a_faint_one() -> None:
    def opacities(count: int, **options: bool) -> list[str]:
        chart = line_chart("t", [Series("a", range(count), [float(i % 7) for i in range(count)])], **options)
        return [polyline.attrib["stroke-opacity"] for polyline in parse(chart).iter("polyline")]

    assert opacities(50) == ["1"]
    assert opacities(51) == ["0.3", "1"]
    assert opacities(51, smoothed=False) == ["1"]


def test_several_curves_are_named_at_their_ends_without_overlap() -> None:
    chart = line_chart("t", [Series(f"prompt {k}", [1, 2], [0.2, 0.25]) for k in range(4)])
    labels = [element for element in parse(chart).iter("text") if (element.text or "").startswith("prompt")]
    heights = sorted(float(element.attrib["y"]) for element in labels)
    assert len(heights) == 4
    assert all(b - a >= 13 for a, b in pairwise(heights))


@given(st.lists(st.floats(0, 100), max_size=9), st.floats(1, 20))
def test_spread_labels_keep_their_order_their_gap_and_their_bounds(positions: list[float], gap: float) -> None:
    placed = spread(positions, gap, 0, 100)
    reach = min(gap, 100 / max(1, len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    for a, b in pairwise(order):
        assert placed[b] - placed[a] >= reach - 1e-6
    assert all(-1e-6 <= position <= 100 + 1e-6 for position in placed)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_smoothing_keeps_steps_and_range_and_leaves_a_constant_alone(values: list[float]) -> None:
    smoothed = smooth(list(enumerate(values)))
    assert [x for x, _ in smoothed] == list(range(len(values)))
    assert all(min(values) - 1e-6 <= y <= max(values) + 1e-6 for _, y in smoothed)
    assert [y for _, y in smooth([(x, 2.5) for x, _ in smoothed])] == pytest.approx([2.5] * len(values))


@given(st.integers(0, 900), st.integers(3, 60))
def test_thinning_keeps_the_ends_and_a_straight_line_straight(count: int, most: int) -> None:
    line = [(float(i), 3.0 * i - 1) for i in range(count)]
    thinned = thin(line, most)
    assert len(thinned) == min(count, most)
    assert thinned[:1] == line[:1]
    assert thinned[-1:] == line[-1:]
    assert [y for _, y in thinned] == pytest.approx([3.0 * x - 1 for x, _ in thinned])
    assert all(a[0] < b[0] for a, b in pairwise(thinned))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    assert 1 <= len(marks) <= 6
    assert all(low - 1e-6 * span <= mark <= low + span * (1 + 1e-6) for mark in marks)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], ["0", "0.5", "1"]),
        ([0, 10000, 20000], ["0", "10k", "20k"]),
        ([0, 1.5e6], ["0", "1.5M"]),
        ([0, 1e-4, 2e-4], ["0", "0.0001", "0.0002"]),
        ([5e-6, 1e-5], ["5e-6", "1e-5"]),
        ([-2, 0], ["−2", "0"]),
    ],
)
def test_tick_labels_are_short_and_distinct(values: list[float], expected: list[str]) -> None:
    assert tick_labels(values) == expected


def test_series_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="'a' has 2 steps and 1 values"):
        line_chart("t", [Series("a", [1, 2], [1.0])])


def test_heat_map_deepens_with_the_value_and_tells_every_cell() -> None:
    svg = heat_map("h", [[0.0, 1.0], [0.5, math.nan]], ["d<1>", "d2"], bounds=(0, 1), legend="share", percent=True)
    cells = [group for group in parse(svg).iter("g") if group.find("title") is not None]
    told = {cell.find("title").text: cell for cell in cells}  # pyright: ignore[reportOptionalMemberAccess]
    assert set(told) == {
        "d<1> · prompt 0: 0 %",
        "d2 · prompt 0: 100 %",
        "d<1> · prompt 1: 50 %",
        "d2 · prompt 1: –",
    }
    depths = {name: [rect.attrib["fill-opacity"] for rect in cell.iter("rect")][1:] for name, cell in told.items()}
    assert [depths[name] for name in sorted(depths)] == [["1"], [], ["0"], ["0.5"]]


def test_heat_map_marks_its_cells_and_explains_the_mark() -> None:
    svg = heat_map("h", [[0.0], [1.0]], ["d"], bounds=(0, 1), legend="x", marks={(1, 0)}, mark_legend="lowest nll")
    marked = [group for group in parse(svg).iter("g") if group.find("title") is not None and list(group.iter("circle"))]
    assert [group.find("title").text for group in marked] == ["d · prompt 1: 1 · lowest nll"]  # pyright: ignore
    assert "lowest nll" in texts(svg)


def test_a_thousand_dialogues_still_give_readable_column_names() -> None:
    svg = heat_map("h", [[0.5] * 1000], [str(i) for i in range(1000)], bounds=(0, 1), legend="x")
    names = [element for element in parse(svg).iter("text") if element.attrib.get("font-size") == "10"]
    places = [float(element.attrib["x"]) for element in names]
    assert all(b - a >= 27 for a, b in pairwise(places))


def test_heat_map_rows_of_another_length_are_refused() -> None:
    with pytest.raises(UserError, match="Row 1 of the heat map 'h' has 1 values for 2 columns"):
        heat_map("h", [[0, 1], [0]], ["a", "b"], bounds=(0, 1), legend="x")


def test_usage_bars_are_as_long_as_their_shares() -> None:
    svg = usage_bars("u", {"before": [0.5, 0.5], "after": [0.25, 0.75]})
    widths = [float(rect.attrib["width"]) for rect in parse(svg).iter("rect")]
    assert [width / widths[1] for width in widths] == pytest.approx([0.5, 1, 1.5, 1], abs=0.01)
    assert {"25 % after", "50 % before", "75 %"} <= set(texts(svg))


def test_usage_of_different_numbers_of_prompts_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[1, 2\]"):
        usage_bars("u", {"before": [1.0], "after": [0.5, 0.5]})
