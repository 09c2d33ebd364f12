"""The picture of shared prefixes shows its lines, on a scale of doublings."""

from __future__ import annotations

import xml.etree.ElementTree

from tokasaurus.bench.shared_prefix_plot import Curves, write_shared_prefix_plot

SVG = "{http://www.w3.org/2000/svg}"


def test_each_panel_has_its_lines_and_counts(tmp_path):
    path = tmp_path / "plot.svg"
    lines = {"128 < tokens": [(2, 1.0), (4, 2.0), (16, 4.0)], "64 tokens": [(2, 0.0), (16, 1.0)]}
    write_shared_prefix_plot(str(path), [Curves("Decodes", "sequences", lines)] * 2)
    root = xml.etree.ElementTree.parse(path).getroot()
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for text in ("Decodes", "sequences", "128 < tokens", "2", "4", "16", "4x"):
        assert texts.count(text) == 2, text
    first, second, *_ = (line.get("points") for line in root.iter(f"{SVG}polyline"))
    points = [tuple(map(float, point.split(","))) for point in first.split()]
    (x2, _), (x4, _), (x16, y4) = points
    assert abs((x16 - x4) - 2 * (x4 - x2)) < 0.2
    bottom = float(second.split()[0].split(",")[1])
    assert abs((bottom - y4) - 4 * (bottom - points[0][1])) < 0.2
