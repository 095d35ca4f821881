"""Reports and tables from run files: figures, escaping, damage, and missing parts."""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import json
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastuft.report import load_run, table, write_report
from fastuft.report.charts import smooth
from fastuft.report.tables import Figure, Table

EVIL = "<script>alert(1)</script>"
SPREAD = {"mean": 0.8125, "std": 0.0125, "trials": [0.8, 0.825]}


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def evaluation(retrieval=0.9, labeled=True):
    result = {
        "labeled": labeled,
        "classes": ["cat", EVIL] if labeled else [],
        "label_free": {"alignment": 0.3, "uniformity": -2.5, "neighbor_overlap": 0.5},
        "statements": ["No source images were given."],
        "timings": {"features": 1.5, "fewshot": 20.0},
    }
    if labeled:
        shots = {"top1": SPREAD, "mean_class": {**SPREAD, "mean": 0.75}}
        result |= {"retrieval": retrieval, "clustering": SPREAD, "fewshot": {"1": shots, "10": shots}}
        result["forgetting"] = {"after": {"mean": 0.3, "std": None, "trials": [0.3]}}
    return result


def arrays(labeled=True):
    thumbs = [png((i * 40, 90, 200 - 30 * i)) for i in range(6)]
    found = {
        "tsne": np.random.default_rng(0).normal(size=(20, 2)).astype("f4"),
        "tsne_labels": np.arange(20) % 2 if labeled else np.full(20, -1),
        "queries": np.array([0, 1]),
        "neighbors": np.array([[2, 3, 4], [3, 4, 5]]),
        "similarity": np.full((2, 3), 0.5, "f4"),
        "thumb_png": np.concatenate(thumbs),
        "thumb_offsets": np.cumsum([0, *map(len, thumbs)]),
        "thumb_names": np.array([f"cats/{EVIL}.png", *(f"cats/{i}.png" for i in range(1, 6))]),
    }
    if labeled:
        found["right"] = np.array([[True, True, False], [True, False, False]])
    else:
        found["before_neighbors"], found["before_similarity"] = found["neighbors"][::-1], found["similarity"]
    return found


def write_run(folder, *, retrieval=0.9, labeled=True, steps=40, parts=("train", "eval")):
    folder.mkdir(parents=True)
    if "train" in parts:
        rows = [
            {
                "kind": "train",
                "step": s,
                "epoch": s // 10,
                "loss": 8 - s / 20,
                "loss_alignment": -1.0,
                "loss_distribution": 9.0,
                "lr": 0.1,
            }
            for s in range(0, steps, 2)
        ]
        rows.insert(3, {"kind": "watch", "step": 6, "retrieval": 0.5, "source_clustering": 0.4})
        rows[5]["loss"] = float("nan")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = {"steps": steps, "images": 10240, "seconds": 12.5, "bad_files": 1, "seed": 0}
        summary["bad_file_list"] = [{"path": f"{EVIL}.jpg", "reason": "cut off"}]
        (folder / "summary.json").write_text(json.dumps(summary | {"versions": {"fastuft": "0.1.0"}}))
        (folder / "config.yaml").write_text(f"target: {EVIL}\n")
    if "eval" in parts:
        (folder / "eval.json").write_text(json.dumps(evaluation(retrieval, labeled)))
        np.savez(folder / "eval_arrays.npz", **arrays(labeled))
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_data(self, data):
        self.words.append(data)


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_report_shows_arms_side_by_side(tmp_path):
    runs = [("naive", write_run(tmp_path / "a")), ("+ SDR", write_run(tmp_path / "b", retrieval=0.95, steps=60))]
    write_report(tmp_path / "out" / "report.html", runs, title="Two arms", notes=["A note."])
    text, page = read(tmp_path / "out" / "report.html")
    words = " ".join(page.words)
    for expected in (
        "Two arms",
        "A note.",
        "90.0",
        "95.0",
        "81.2 ± 1.2",
        "75.0 ± 1.2",
        "Training curves",
        "Evaluation, seconds",
    ):
        assert expected in words, expected
    assert words.index(" 1-shot %") < words.index("10-shot %") < words.index("source clustering %")
    assert '<td class="best">95.0</td>' in text and '<td class="best">90.0</td>' not in text
    assert "different numbers of steps" in words
    assert "No source images were given." in words
    assert words.count("✓") == 1 + 2 * 3 and words.count("✗") == 2 * 3  # one in the legend
    assert "bad files" in words


def test_statements_of_some_runs_name_them(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    write_report(tmp_path / "both.html", [("naive", first), ("ours", second)])
    assert "naive: No source" not in (tmp_path / "both.html").read_text()
    (second / "eval.json").write_text(json.dumps(evaluation() | {"statements": []}))
    write_report(tmp_path / "one.html", [("naive", first), ("ours", second)])
    assert "naive: No source images were given." in (tmp_path / "one.html").read_text()


def test_pretraining_and_finetuning_have_separate_curves(tmp_path):
    runs = [("pretrained", write_run(tmp_path / "a", steps=1000)), ("naive", write_run(tmp_path / "b"))]
    write_report(tmp_path / "same.html", runs)
    summary = json.loads((tmp_path / "b" / "summary.json").read_text()) | {"init": {"path": "a"}}
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary))
    write_report(tmp_path / "apart.html", runs)
    for page, pictures in (("same.html", 1), ("apart.html", 2)):
        text, parsed = read(tmp_path / page)
        assert text.count('alt="Loss, its alignment') == pictures
        assert ("From a checkpoint" in " ".join(parsed.words)) == (pictures == 2)


def test_accuracies_label_free_figures_and_differences_have_separate_tables(tmp_path):
    forgetting = {
        "before": {"mean": 0.9, "std": None, "trials": [0.9]},
        "after": {"mean": 0.3, "std": None, "trials": [0.3]},
    }
    runs = [(name, write_run(tmp_path / name)) for name in ("a", "b")]
    for name, folder in runs:
        found = evaluation(retrieval=0.9 if name == "a" else 0.8) | {"forgetting": forgetting}
        (folder / "eval.json").write_text(json.dumps(found))
    first, second, third = table(runs).split("\n\n")
    assert "retrieval %" in first and "source before %" in first and "alignment" not in first
    assert "alignment" in second and "neighbors kept %" in second
    assert "difference" in third and "source clustering %" in third
    assert len(table(runs, "csv").splitlines()) == 3
    write_report(tmp_path / "report.html", runs)
    text = (tmp_path / "report.html").read_text()
    assert text.count('class="best">90.0</td>') == 1  # of retrieval; what the source had before does not compete


def test_before_after_and_difference_are_side_by_side(tmp_path):
    run = write_run(tmp_path / "run")
    figures = json.loads((run / "eval.json").read_text())
    figures["before"] = {"retrieval": 0.8, "clustering": {"mean": 0.9, "std": None, "trials": [0.9]}}
    figures["before"]["class_means"] = {"2": SPREAD}
    figures["class_means"] = {"2": {**SPREAD, "mean": 0.875}, "4": SPREAD}
    figures["before"]["fewshot"] = {"10": {"mean_class": {"mean": 0.5, "std": 0.1, "trials": [0.4, 0.6]}}}
    figures["label_free"]["before"] = {"alignment": 0.4, "uniformity": -2.0}
    (run / "eval.json").write_text(json.dumps(figures))
    shown = table([("ours", run)]).split("\n\n")[-1]
    rows = {" ".join(line.split()[1:-3]): line.split()[-3:] for line in shown.splitlines()[2:]}
    assert rows["retrieval %"] == ["80.0", "90.0", "+10.0"] and rows["clustering %"] == ["90.0", "81.2", "-8.8"]
    assert rows["2-shot means %"] == ["81.2", "87.5", "+6.2"] and "4-shot means %" not in rows
    assert rows["10-shot %"] == ["50.0", "75.0", "+25.0"] and "1-shot %" not in rows
    assert rows["alignment"] == ["0.400", "0.300", "-0.100"] and rows["uniformity"] == ["-2.000", "-2.500", "-0.500"]
    write_report(tmp_path / "report.html", [("ours", run)])
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Before and after</h2>" in page
    assert (
        "With labels: retrieval 80.0 → 90.0 % (+10.0), clustering 90.0 → 81.2 % (-8.8), "
        "2-shot means 81.2 → 87.5 % (+6.2), 10-shot 50.0 → 75.0 % (+25.0)." in page
    )
    assert "K-shot means are mean class accuracies of the nearest class mean" in page
    assert page.index("<h2>Verdict</h2>") < page.index("<h2>Figures</h2>")


def test_looks_and_verdicts_of_runs_are_shown(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for step in (0, 10, 20):
            file.write(json.dumps({"kind": "look", "step": step, "effective_rank": 10.0 + step, "lidar": None}) + "\n")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"verdict": {"line": f"Without labels: {EVIL}"}}))
    write_report(tmp_path / "report.html", [("ours", run)])
    page = (tmp_path / "report.html").read_text()
    assert "<p>Without labels: &lt;script&gt;" in page and 'alt="Label-free measures' in page


def test_runs_without_figures_are_marked(tmp_path):
    runs = [("arm", write_run(tmp_path / "a", parts=("train",)))]
    assert "fastuft eval" in table(runs) and len(table(runs).splitlines()) == 1


def test_report_is_self_contained(tmp_path):
    write_report(tmp_path / "report.html", [("arm", write_run(tmp_path / "a"))])
    text, page = read(tmp_path / "report.html")
    assert all(link.startswith("data:") for link in page.links)
    assert all(uri.startswith("data:") for uri in re.findall(r'url\("([^"]*)"\)', text))
    assert "@import" not in text and "http-equiv" in text
    images = [link for link in page.links if link.startswith("data:image")]
    assert len(images) == 3  # curves, watched figures and map
    svg = next(link for link in images if "svg" in link)
    assert b"<svg" in base64.b64decode(svg.split(",")[1])


def test_names_from_disk_are_escaped(tmp_path):
    run = write_run(tmp_path / "<b>run<")
    write_report(tmp_path / "report.html", [(f"arm {EVIL}", run)], title=EVIL, notes=[EVIL])
    text, page = read(tmp_path / "report.html")
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert EVIL not in text and "&lt;script&gt;" in text


def test_the_pages_policy_lets_its_own_script_run_and_no_other(tmp_path):
    write_report(tmp_path / "report.html", [("arm", write_run(tmp_path / "a"))])
    text = (tmp_path / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;\"]*)", text) == [f"'sha256-{digest}'"] and "default-src 'none'" in text


@pytest.mark.parametrize("name", ["a $x", "$\\frac{", "_hidden", "caf\udce9", "\u6587", "two\nlines"])
def test_any_name_of_a_run_or_class_can_be_drawn(tmp_path, name):
    write_run(tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    (tmp_path / "run" / "eval.json").write_text(json.dumps(figures | {"classes": [name, f"{name}$"]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path / "report.html", [(name, tmp_path / "run")])
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/svg+xml") == 2
    shown = table([(name, tmp_path / "run")])
    assert shown.encode() and len(shown.splitlines()) == 7


def test_a_failed_report_keeps_the_older_one(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    page = tmp_path / "report.html"
    page.write_text("the old one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(page, [("run", tmp_path / "run")])
    assert page.read_text() == "the old one" and len(list(tmp_path.iterdir())) == 2


def test_report_without_labels_shows_before_and_after(tmp_path):
    write_report(tmp_path / "report.html", [("arm", write_run(tmp_path / "a", labeled=False))])
    words = " ".join(read(tmp_path / "report.html")[1].words)
    assert "before" in words and "after" in words and "✓" not in words
    assert "neighbors kept %" in words and "retrieval %" not in words


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_run_without_evaluation_has_a_report(tmp_path, part):
    write_report(tmp_path / "report.html", [("arm", write_run(tmp_path / "a", parts=(part,)))])
    words = " ".join(read(tmp_path / "report.html")[1].words)
    assert ("Training curves" in words) == (part == "train")
    assert ("Nearest neighbors" in words) == (part == "eval")


def test_training_and_evaluation_folders_may_differ(tmp_path):
    train = write_run(tmp_path / "a", parts=("train",))
    write_run(train / "eval", parts=("eval",))
    run = load_run("arm", train)
    assert run.metrics and run.evaluation and run.arrays
    apart = load_run("arm", [write_run(tmp_path / "b", parts=("train",)), train / "eval"])
    assert apart.summary["steps"] == 40 and apart.evaluation == run.evaluation


def test_seeds_of_one_arm_are_averaged(tmp_path):
    runs = [("arm", write_run(tmp_path / str(i), retrieval=value)) for i, value in enumerate((0.90, 0.92, 0.97))]
    text = table(runs)
    assert "93.0 ± 3.6" in text and len(text.splitlines()) == 7  # two tables of one row, a line between
    rows = list(csv.reader(io.StringIO(table(runs, "csv"))))
    assert rows[0][:2] == ["run", "retrieval %"] and rows[1][:2] == ["arm", "93.0 ± 3.6"]
    assert table(runs, "markdown").splitlines()[1].startswith("| --- | ---: |")
    write_report(tmp_path / "report.html", runs)
    assert "over the runs of a row" in (tmp_path / "report.html").read_text()


def test_table_formats_escape_and_align():
    shown = Table(["a|b", "n"], [["x\\|y", "1"], ["long name", "22"]])
    assert shown.markdown().splitlines()[0] == "| a\\|b | n |"
    assert shown.markdown().splitlines()[2] == "| x\\\\\\|y | 1 |"
    assert [len(line) for line in shown.text().splitlines()] == [13, 13, 13, 13]
    with pytest.raises(ValueError, match="format='xml' is not allowed; choose one of 'text'"):
        shown.show("xml")


def test_figure_spread_is_the_sample_deviation():
    assert Figure.of([1.0, 2.0, 3.0]).text() == "2.0 ± 1.0"
    assert Figure.of([2.0]).text(2) == "2.00"


def test_moving_average_keeps_constants_and_means():
    np.testing.assert_allclose(smooth(np.full(9, 3.0), 5), 3.0)
    np.testing.assert_allclose(smooth(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])


def test_a_truncated_last_metrics_line_is_ignored(tmp_path):
    run = write_run(tmp_path / "a")
    whole = len(load_run("arm", run).metrics)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert len(load_run("arm", run).metrics) == whole


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has none of metrics\.jsonl"):
        load_run("arm", tmp_path)
    with pytest.raises(ValueError, match="runs is empty"):
        write_report(tmp_path / "report.html", [])


def test_report_works_without_torch(tmp_path):
    run = write_run(tmp_path / "a")
    code = (
        "import sys; sys.modules['torch'] = None; from fastuft.report import write_report; "
        f"write_report({str(tmp_path / 'report.html')!r}, [('arm', {str(run)!r})])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
