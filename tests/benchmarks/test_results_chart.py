"""The picture of the learning results."""

from xml.etree import ElementTree

from benchmarks.results_chart import HIGH, LOW, PANEL_H, PANELS, SERIES, TOP, render_results_chart


def test_every_series_has_a_point_for_each_round_at_its_height() -> None:
    """Axis .3 to .9 over 220 pixels from y = 58: .3 is at 278, .6 at 168, .9 at 58; other values are on the border."""
    assert (LOW, HIGH, TOP, PANEL_H) == (0.3, 0.9, 58, 220)
    interval = {"value": 0.6, "low": 0.1, "high": 0.9}
    names = ["base", *(f"{series}, round 1" for series in SERIES)]
    rows = [{"row": name, "accuracy": dict.fromkeys(PANELS, interval)} for name in names]
    root = ElementTree.fromstring(render_results_chart(rows, rounds=1))
    svg = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{svg}polyline")
    assert len(lines) == len(PANELS) * len(SERIES)
    heights = {point.split(",")[1] for line in lines for point in line.attrib["points"].split()}
    assert heights == {"168.0"}
    bars = [line for line in root.findall(f"{svg}line") if line.attrib["x1"] == line.attrib["x2"]]
    assert {(bar.attrib["y1"], bar.attrib["y2"]) for bar in bars} == {("278.0", "58.0")}
    labels = [text.text for text in root.findall(f"{svg}text")]
    assert labels.count("base") == labels.count("round 1") == len(PANELS)
    assert set(PANELS.values()) | set(SERIES) <= set(labels)
