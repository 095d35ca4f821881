"""Whatever a run folder contains, a report names what is damaged and shows the rest."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_report_pages import arrays, evaluation, read, write_run

from fastuft.cli import main
from fastuft.report import load_run, table, write_report


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def write_page(page, runs):
    """The text of a report's page, written without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(page, runs)
    return " ".join(read(page)[1].words)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", b'{"a": 1\n{"b": 2}\n', "line 1 is not JSON|1 of 1 rows have no step"),
        ("metrics.jsonl", b'[1]\n{"step": 1, "kind": "train", "loss": 1}\n', "is not a JSON object"),
        ("metrics.jsonl", b'{"step": "x", "loss": 1}\n', "1 of 1 rows have no step"),
        ("metrics.jsonl", b'{"step": ' + b"9" * 500 + b', "loss": 1}\n', "1 of 1 rows have no step"),
        ("metrics.jsonl", b"\xff\xfe\x00" * 40 + b"\n{}\n", "is not JSON"),
        ("metrics.jsonl", b"nonsense\n" * 50 + b"{}", "46 more"),
        ("summary.json", b"", "summary.json is not JSON|summary.json: .*is not JSON"),
        ("summary.json", b'{"steps": [1]}', "steps is not a number"),
        ("summary.json", b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 20 deep"),
        ("summary.json", b"[" * 100_000, "is not JSON"),
        ("eval.json", b"[1]", "is not a JSON object"),
        ("eval.json", b"\xff", "is not JSON"),
        ("eval.json", json.dumps(evaluation() | {"retrieval": "high"}).encode(), "retrieval is not a figure"),
        ("eval.json", json.dumps(evaluation() | {"retrieval": True}).encode(), "retrieval is not a figure"),
        ("eval.json", b'{"retrieval": 1e999, "clustering": 0.5}', "retrieval is not a figure"),
        ("eval.json", b'{"clustering": {"mean": 1, "std": 1, "trials": []}}', "clustering is not a figure"),
        ("eval.json", b'{"clustering": {"mean": null, "trials": [1]}}', "clustering is not a figure"),
        ("eval.json", b'{"before": {"retrieval": "high"}, "retrieval": 0.5}', "before.retrieval is not a figure"),
        ("eval.json", b'{"retrieval": 1e300}', "retrieval is not a figure"),
        ("eval.json", b'{"retrieval": {"a": 0.5}}', "retrieval is not a figure"),
        ("eval.json", b'{"fewshot": {"x": {"mean_class": 0.5}}}', "'x' is not a number of images"),
        ("eval.json", b'{"class_means": {"x": 0.5}}', "class_means: 'x' is not a number of images"),
        ("eval.json", b'{"fewshot": [1]}', "fewshot is not a figure"),
        ("eval.json", b'{"fewshot": 0.5}', "fewshot is not a group of figures"),
        ("eval.json", b'{"before": {"fewshot": {"x": {"mean_class": 0.5}}}}', "before.fewshot: 'x' is not a number of"),
        ("eval.json", b'{"label_free": {"target_drift": [1]}}', "label_free.target_drift is not a figure"),
        (
            "eval.json",
            b'{"statements": {"a": 1}, "classes": [1], "timings": [1]}',
            "statements is not a list of strings",
        ),
        ("eval_arrays.npz", b"PK\x03\x04", "eval_arrays.npz: cannot be read"),
        ("eval_arrays.npz", b"", "eval_arrays.npz: cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_read(run, file, content, words):
    (run / file).write_bytes(content)
    loaded = load_run("arm", run)
    assert any(re.search(words, damage) for damage in loaded.damaged), loaded.damaged
    assert all(file in damage for damage in loaded.damaged)
    table([loaded])
    parts = {"metrics.jsonl": loaded.metrics, "summary.json": loaded.summary, "eval.json": loaded.evaluation}
    parts |= {"eval_arrays.npz": loaded.arrays, "config.yaml": loaded.config}
    assert all(content for name, content in parts.items() if name != file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tsne": np.zeros((20, 3), "f4")}, "the map is damaged"),
        ({"tsne": np.full((20, 2), np.nan, "f4")}, "the map is damaged"),
        ({"tsne": np.full((20, 2), 1e300)}, "the map is damaged"),
        ({"tsne": np.zeros((0, 2), "f4"), "tsne_labels": np.zeros(0, int)}, "the map is damaged"),
        ({"tsne_labels": np.zeros(20, "f4")}, "tsne_labels does not fit"),
        ({"tsne_labels": None}, "tsne_labels is missing"),
        ({"thumb_offsets": np.arange(3)}, "thumb_offsets does not fit"),
        ({"thumb_offsets": np.full(7, 10**9)}, "thumb_offsets does not fit"),
        ({"thumb_names": np.arange(6)}, "thumb_names does not fit"),
        ({"neighbors": np.full((2, 3), 99)}, "neighbors does not fit"),
        ({"neighbors": np.full((2, 3), -1)}, "neighbors does not fit"),
        ({"queries": np.array([[0, 1]])}, "the gallery is damaged"),
        ({"queries": np.array([], int)}, "does not fit"),
        ({"similarity": np.zeros((2, 2), "f4")}, "similarity does not fit"),
        ({"right": np.zeros(3, bool)}, "right does not fit"),
        ({"thumb_png": None}, "thumb_png is missing"),
    ],
)
def test_damaged_arrays_are_named_and_the_others_are_read(run, changes, words):
    content = {name: value for name, value in (arrays() | changes).items() if value is not None}
    np.savez(run / "eval_arrays.npz", **content)
    loaded = load_run("arm", run)
    assert len(loaded.damaged) == 1 and words in loaded.damaged[0], loaded.damaged
    assert ("tsne" in loaded.arrays) != ("neighbors" in loaded.arrays)  # the other part is whole


def npz(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_the_page_says_what_is_damaged_and_shows_the_rest(run, whole, tmp_path):
    (run / "summary.json").write_bytes(b"{")
    (run / "eval.json").write_text(json.dumps(evaluation() | {"retrieval": "high"}))
    (run / "eval_arrays.npz").write_bytes(b"PK")
    words = write_page(tmp_path / "report.html", [("arm", run), ("whole", whole)])
    assert "Damaged files" in words and "retrieval is not a figure" in words and "81.2" in words
    assert words.count("cannot be read") == 1 and words.count("is not JSON") == 1
    assert "Damaged files" not in write_page(tmp_path / "report.html", [("whole", whole)])


def test_pickles_bombs_and_huge_shapes_in_arrays_are_refused(run):
    np.savez(run / "eval_arrays.npz", tsne=np.array([{"a": 1}], dtype=object))
    assert "allow_pickle" in load_run("arm", run).damaged[0]

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15, 2)})
    (run / "eval_arrays.npz").write_bytes(npz({"tsne.npy": header.getvalue()}))
    assert "tsne cannot be read" in load_run("arm", run).damaged[0]

    (run / "eval_arrays.npz").write_bytes(npz({"tsne.npy": b"\0" * 2**21}).replace(b"\0\0 \0", b"\xff\xff\xff\x7f"))
    assert "eval_arrays.npz" in load_run("arm", run).damaged[0]


def test_decompression_bombs_are_not_unpacked(run, monkeypatch):
    monkeypatch.setattr("fastuft.report.files._MAX_ARRAYS", 1000)
    assert "bytes when unpacked" in load_run("arm", run).damaged[0]


def test_any_name_is_shown(run, tmp_path):
    names = ["$x^{2$", "$\\frac$", "_hidden", "\udcff\udc80", "a\nb\x1b[31m", "日本語 🎉", "<script>", "a" * 300, ""]
    (run / "eval.json").write_text(json.dumps(evaluation() | {"classes": [*names, "\ud800"], "statements": names}))
    runs = [load_run(name, run) for name in names]
    assert not any(loaded.damaged for loaded in runs)
    words = write_page(tmp_path / "report.html", runs)
    assert all(shown in words for shown in ("$x^{2$", "_hidden", r"\xff\x80", r"a\nb\x1b[31m", "日本語 🎉", "<script>"))
    shown = table(runs)
    assert "\x1b" not in shown and shown.encode() and "$x^{2$" in shown


def test_a_report_is_written_atomically(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a", parts=("eval",))
    write_report(tmp_path / "report.html", [("arm", run)])
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path / "report.html", [("other", run)])
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "report.html"]


def test_the_command_says_what_is_damaged_and_reports_the_rest(tmp_path, capsys):
    run = write_run(tmp_path / "a=b")
    (run / "summary.json").write_text("{")
    assert main(["report", str(run), f"second={run}", "--out", str(tmp_path / "report.html")]) == 0
    out, err = capsys.readouterr()
    assert "a=b" in out and "second" in out and "81.2" in out
    assert err.count("summary.json") == 1 and "Traceback" not in err


NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400), st.booleans())
TEXTS = st.text(st.characters(), max_size=12)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
KEYS = (
    "before",
    "retrieval",
    "clustering",
    "fewshot",
    "class_means",
    "fixmatch",
    "forgetting",
    "label_free",
    "source_drift",
    "classes",
)
KEYS += ("statements", "timings")


def damaged_json(draw, whole):
    """The values of a valid file, some of them replaced by other values or by nearly valid figures."""
    result = dict(whole)
    near = st.fixed_dictionaries({}, optional={"mean": VALUES, "std": VALUES, "trials": VALUES, "1": VALUES})
    for key in draw(st.lists(st.sampled_from([*whole, *KEYS]), max_size=4)):
        result[key] = draw(
            st.one_of(VALUES, near, st.dictionaries(st.sampled_from(["1", "after", "fewshot", "x"]), near))
        )
    return json.dumps(result).encode()


def cut_or_flipped(draw, content):
    kind = draw(st.sampled_from(["cut", "flip", "keep", "keep"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:at]
    if kind == "flip" and content:
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    return content


@st.composite
def crafted(draw):
    """Contents of the five files of a run, each valid, altered or damaged."""
    rows = [
        {"kind": "train", "step": s, "loss": 1.0, "loss_alignment": -1.0, "loss_distribution": 2.0, "lr": 0.1}
        for s in range(8)
    ]
    rows += draw(
        st.lists(st.fixed_dictionaries({"kind": st.just("train"), "step": VALUES, "loss": VALUES}), max_size=3)
    )
    npz_file = io.BytesIO()
    changed = dict(arrays())
    for key in draw(st.lists(st.sampled_from(sorted(changed)), max_size=2)):
        shape = draw(st.sampled_from([(0,), (2,), (2, 3), (20, 2), (7,), (6,), (20,)]))
        changed[key] = np.full(shape, draw(st.sampled_from([-1, 0, 5, 10**6]))).astype(
            draw(st.sampled_from(["i8", "f4", "u1", "?"]))
        )
    np.savez(npz_file, **changed)
    files = {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "summary.json": damaged_json(draw, {"steps": 8, "seconds": 1.0, "manifest": {"num_target": 3}}),
        "eval.json": damaged_json(draw, evaluation()),
        "eval_arrays.npz": npz_file.getvalue(),
        "config.yaml": draw(st.binary(max_size=20)),
    }
    return {name: cut_or_flipped(draw, content) for name, content in files.items()}


@pytest.mark.slow
@seed(15)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(files=crafted(), name=TEXTS)
def test_no_malformed_run_folder_stops_a_report(tmp_path_factory, files, name):
    folder = tmp_path_factory.mktemp("crafted") / "a"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    loaded = load_run(name, folder)
    table([loaded])
    write_page(folder.parent / "report.html", [loaded])
