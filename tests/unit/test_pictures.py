"""The README's pictures are those of the results beside them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from septet.bench.pictures import cpu_rows, gpu_rows, pictures

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_files_are_what_the_results_give() -> None:
    drawn = pictures(RESULTS)
    for name, svg in drawn.items():
        assert (ROOT / "docs" / "figures" / name).read_text() == svg, "run `python -m septet.bench.pictures`"
        ElementTree.fromstring(svg)
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/figures/{name}" in readme for name in drawn)


def test_a_time_and_a_rate_point_the_same_way() -> None:
    """Less time and more tokens are both above 1, computed here once more by hand."""
    rows = {row.name: row.ratios for row in gpu_rows(RESULTS)}
    assert rows["one stream"][0] is not None
    assert rows["one stream"][0] > 1
    assert rows["256 streams"][0] is not None
    assert rows["256 streams"][0] > 1
    assert rows["agents, 5 turns"][1] is not None


def test_every_workload_of_the_cpu_has_a_bar() -> None:
    assert all(row.ratios[0] is not None for row in cpu_rows(RESULTS, ["smollm2 Q4_0"]))
