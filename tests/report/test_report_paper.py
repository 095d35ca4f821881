"""Reproduced figures compared with the paper's."""

from __future__ import annotations

import csv
import io
import json

import pytest

from fastuft.report import compare_with_paper, comparison_table, paper_figures, read_results, write_comparison

CELL = {"table": "2", "pretraining": "unsupervised", "backbone": "resnet50", "method": "ours", "metric": "retrieval"}
PAPER = {"caltech101": 85.95, "pet": 71.67, "cifar100": 68.83, "food101": 75.13}


def row(value, trial=0, dataset="pet", **changes):
    return {**CELL, "dataset": dataset, "trial": trial, "value": value, "run": "runs/ours pet", **changes}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def by_key(cells):
    return {(c.key[3], c.key[4], c.key[5]): c for c in cells}


def test_the_packaged_published_figures_are_complete():
    figures = paper_figures()
    assert len(figures) == 232
    assert figures["2", "unsupervised", "resnet50", "ours", "pet", "cluster"] == 56.11
    assert {key[0] for key in figures} == {"1", "2", "3", "4", "5", "6", "text"}


def test_mean_spread_and_difference():
    cells = by_key(compare_with_paper([row(70.0), row(72.0, 1), row(74.0, 2)], missing=False))
    cell = cells["ours", "pet", "retrieval"]
    assert (cell.ours.mean, cell.ours.std, cell.ours.count, cell.paper) == (72.0, 2.0, 3, 71.67)
    assert cell.difference == pytest.approx(0.33)
    assert len(cells) == 1


def test_missing_cells_of_touched_tables_are_listed():
    cells = compare_with_paper([row(70.0)])
    assert len(cells) == len([key for key in paper_figures() if key[0] == "2"])
    assert sum(cell.ours is not None for cell in cells) == 1
    assert [c.key for c in cells] == [key for key in paper_figures() if key[0] == "2"]  # the paper's order


def test_averages_need_all_data_sets():
    rows = [row(value + 1, dataset=name) for name, value in PAPER.items()]
    average = by_key(compare_with_paper(rows))["ours", "average", "retrieval"]
    assert average.difference == pytest.approx(1.0)
    assert average.paper == pytest.approx(sum(PAPER.values()) / 4)
    assert not any(key[1] == "average" for key in by_key(compare_with_paper(rows[:3])))


def test_figures_without_a_published_counterpart_have_no_difference():
    cell = compare_with_paper([row(50.0, method="mix_only")], missing=False)[0]
    assert cell.paper is None and cell.difference is None


def test_tables_in_each_format():
    cells = compare_with_paper([row(70.0), row(72.0, 1)], missing=False)
    assert "71.00" in comparison_table(cells) and "-0.67" in comparison_table(cells)
    record = next(csv.DictReader(io.StringIO(comparison_table(cells, "csv"))))
    assert record["mean"] == "71.00" and record["trials"] == "2" and record["paper"] == "71.67"
    bare = comparison_table(compare_with_paper([row(50.0, method="other")], missing=False), "csv")
    assert next(csv.DictReader(io.StringIO(bare)))["paper"] == ""
    assert record["runs"] == "runs/ours pet"
    lines = comparison_table(cells, "markdown", {"runs/ours pet": "runs/ours%20pet"}).splitlines()
    assert lines[0].startswith("| table | pretraining |") and "| [71.00](<runs/ours%20pet>) |" in lines[2]
    assert "[" not in comparison_table(compare_with_paper([row(70.0)])[:1], "markdown")  # a cell without a run


def test_written_pages_link_to_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = write(tmp_path / "results.jsonl", [row(70.0), row(72.0, 1)])
    write_comparison(tmp_path / "out", results, notes=["Tiny <b>scale</b>."])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"comparison.{s}" for s in ("txt", "csv", "md", "html")}
    for suffix in ("txt", "md"):
        assert (tmp_path / "out" / f"comparison.{suffix}").read_text().startswith("Tiny <b>scale</b>.\n\n")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert 'href="../runs/ours%20pet"' in page
    assert "71.0 ± 1.4" in page and "71.7 (-0.7)" in page
    assert "Tiny &lt;b&gt;scale" in page and "34.51" in page
    assert page.count("<h2>") == 2  # Table 2 and the known slips


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"table": "2"}], "row 1 lacks pretraining"),
        ([row(170.0)], r"value=170\.0; allowed: a number from 0 to 100, in per cent"),
        ([row(None)], "value=None"),
        ([row(1.0), row(2.0)], r"row 2 repeats 2 unsupervised .* from .*row 1"),
    ],
)
def test_bad_results_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_results(write(tmp_path / "results.jsonl", rows))


def test_a_results_file_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no results yet"):
        write_comparison(tmp_path, write(tmp_path / "results.jsonl", []))


def test_several_result_files_are_merged(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", [row(70.0 + i, trial=i)]) for i in range(3)]
    assert compare_with_paper(read_results(paths), missing=False)[0].ours.count == 3
