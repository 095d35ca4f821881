"""From benchmark files to committed results, and from results to ``docs/benchmarks.md``.

::

    pytest bench --benchmark-only --benchmark-json=raw.json
    python bench/report.py collect raw.json          # bench/results/DEVICE/DATE.json, without the raw rounds
    python bench/report.py page                      # docs/benchmarks.md and its plots, from the newest of each device

A result file has the machine, the versions, what was left out, and for each benchmark its group, median, quantiles and recorded
counts. For a device without figures, the page says "not measured yet", in one line per benchmark file.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not measured yet"
HEADERS = ("median", "20-80 %", "speed", "% of limit", "ceiling", "extra MB", "rate")
LEGEND = (
    "20-80 %: quantiles of the rounds over their median; speed: the baseline's median over this one's; "
    "% of limit: the same of the row that does less than any other can; "
    "ceiling: of the bandwidth or matrix rate measured here"
)


def readable_time(seconds: float) -> str:
    """Seconds with a fitting unit, three significant digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def slug(device: str) -> str:
    """Folder name of a device: ``nvidia-h200`` for "NVIDIA H200", ``cpu`` for any CPU."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return name if any(word in name for word in ("nvidia", "geforce", "tesla", "quadro")) else "cpu"


def by_group(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Entries of each group, the fastest first; groups in the order they ran."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["group"] or "", []).append(entry)
    return {name: sorted(members, key=lambda e: e["median"]) for name, members in groups.items()}


def cells(entry: dict[str, Any], members: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """(median, quantiles, speed, % of limit, ceiling, extra MB, rate) of one entry beside the others of its group, as text."""
    reference = next((other["median"] for other in members if other.get("baseline")), None)
    limit = next((other["median"] for other in members if other.get("limit")), None)
    percent, peak, rate = (entry.get(key) for key in ("percent_of_ceiling", "peak_extra_bytes", "items_per_second"))
    quantiles = entry.get("quantiles_seconds")
    spread = [f"{quantiles[q] / entry['median']:.2f}" for q in ("0.2", "0.8")] if quantiles else []
    return (
        readable_time(entry["median"]),
        "-".join(spread),
        "" if reference is None else f"{reference / entry['median']:.2f}x",
        "" if limit is None else f"{100 * limit / entry['median']:.0f}%",
        "" if percent is None else f"{percent:.0f}% {entry['ceiling']}",
        "" if peak is None else f"{peak / 1e6:.1f}",
        "" if rate is None else f"{rate:,.0f}/s",
    )


def label(entry: dict[str, Any]) -> str:
    """Name of an entry as tables show it."""
    roles = ", ".join(role for role in ("baseline", "limit") if entry.get(role))
    return entry["name"].removeprefix("test_") + (f" ({roles})" if roles else "")


def table_lines(entries: Iterable[dict[str, Any]]) -> list[str]:
    """The short text table, group after group; empty without entries."""
    groups = by_group(entries)
    rows = {name: [(label(e), *cells(e, members)) for e in members] for name, members in groups.items()}
    if not rows:
        return []
    every = [("", *HEADERS), *(row for members in rows.values() for row in members)]
    widths = [max(len(row[column]) for row in every) for column in range(len(HEADERS) + 1)]

    def line(row: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return ("  " + "  ".join([row[0].ljust(widths[0]), *numbers])).rstrip()

    lines = [line(every[0])]
    for name, members in rows.items():
        lines += [name or "(no group)", *map(line, members)]
    return [*lines, LEGEND]


def compact(raws: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """pytest-benchmark files of one session without their raw rounds, as one record.

    Args:
        raws: contents of ``--benchmark-json``, taken on one machine.
        parts: steps of a suite: name, status, seconds, detail.
    """
    entries = []
    for raw in raws:
        for bench in raw["benchmarks"]:
            entries.append(
                {
                    "file": bench["fullname"].split("::")[0].rsplit("/", 1)[-1],
                    "group": bench["group"],
                    "name": bench["name"],
                    "params": bench["params"],
                    "median": bench["stats"]["median"],
                    "rounds": bench["stats"]["rounds"],
                    **bench["extra_info"],
                }
            )
    machine, commit = raws[0]["machine_info"], raws[0]["commit_info"]
    return {
        "date": raws[0]["datetime"][:10],
        "device": machine["device"],
        "threads": machine["threads"],
        "system": f"{machine['system']} {machine['machine']}",
        "versions": machine["versions"],
        "commit": commit["id"] + (" with changes" if commit["dirty"] else ""),
        "smoke": any(raw["smoke"] for raw in raws),
        "left_out": {name: reason for raw in raws for name, reason in raw["left_out"].items()},
        "parts": list(parts),
        "benchmarks": entries,
    }


def read_parts(path: Path) -> list[dict[str, Any]]:
    """Steps of a suite from lines of name, status, seconds, detail, separated by tabs."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [{"name": n, "status": s, "seconds": float(t), "detail": d} for n, s, t, d in rows]


def collect(raw_paths: Sequence[Path], results: Path, parts_path: Path | None) -> Path:
    """Write one result file from the pytest-benchmark files of one session; returns its path."""
    raws = [json.loads(path.read_text()) for path in raw_paths]
    result = compact(raws, read_parts(parts_path) if parts_path else ())
    if result["smoke"]:
        raise ValueError(f"{raw_paths[0]}: figures of a --smoke run say nothing; run without --smoke")
    path = results / slug(result["device"]) / f"{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def newest_results(results: Path) -> dict[str, dict[str, Any]]:
    """The newest result of each device folder; the CPU comes first."""
    folders = sorted((path for path in results.iterdir() if path.is_dir()), key=lambda p: (p.name != "cpu", p.name))
    newest = {folder.name: max(folder.glob("*.json"), default=None) for folder in folders}
    return {name: json.loads(path.read_text()) for name, path in newest.items() if path is not None}


def _claim(file: str) -> tuple[str, str]:
    """(title, text) from the docstring of a benchmark file."""
    path = ROOT / "bench" / file
    text = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
    title, _, rest = (text or file).partition("\n")
    return title.rstrip("."), " ".join(rest.split())


def _markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _missing_kinds(results: dict[str, dict[str, Any]]) -> list[str]:
    """Kinds of device that no result was taken on."""
    kinds = [] if "cpu" in results else ["a CPU"]
    return [*kinds, "a GPU"] if all(name == "cpu" for name in results) else kinds


def _file_section(file: str, results: dict[str, dict[str, Any]]) -> list[str]:
    title, text = _claim(file)
    lines = [f"## {title}", ""]
    lines += [text, ""] if text else []
    lines += [f"`pytest bench/{file} --benchmark-only`, or `fastuft bench {file[6:-3]} --slow true`", ""]
    unmeasured = []
    for result in results.values():
        groups = by_group(entry for entry in result["benchmarks"] if entry["file"] == file)
        if not groups:
            unmeasured.append(result["device"])
            continue
        lines += [f"### On {result['device']}", ""]
        for group, members in groups.items():
            lines += [f"**{group or title}**", ""]
            lines += [*_markdown_table(("", *HEADERS), [(label(e), *cells(e, members)) for e in members]), ""]
    for device in unmeasured + _missing_kinds(results):
        lines += [f"On {device}: {NOT_MEASURED}.", ""]
    return lines


# Plots: one file each, left out where nothing was recorded for it.

_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": "fastuft"}


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def _sweep_plot(entries: list[dict[str, Any]], along: str, value: str, path: Path, title: str, unit: str) -> bool:
    """``value`` against ``along`` (B or K) at the most frequent other sizes, one line per implementation."""
    import matplotlib.pyplot as plt

    others = [name for name in ("B", "K", "D") if name != along]
    sized = [e for e in entries if all(name in e for name in ("B", "K")) and e.get(value) is not None]
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in sized:
        settings.setdefault(tuple(entry.get(name) for name in others), []).append(entry)
    chosen = max(settings.items(), key=lambda item: len({e[along] for e in item[1]}), default=None)
    if chosen is None or len({e[along] for e in chosen[1]}) < 2:
        return False
    setting, members = chosen
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in members:
        name = str(entry.get("impl") or label(entry).split("[")[0])
        series.setdefault(name, []).append((entry[along], entry[value]))
    scale = 1e3 if value == "median" else 1e-6
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for name, points in series.items():
        points.sort()
        axes.plot([x for x, _ in points], [max(y * scale, 1e-3) for _, y in points], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=along, ylabel=unit)
    axes.set_xscale("log", base=2)
    fixed = ", ".join(f"{name}={number}" for name, number in zip(others, setting, strict=True) if number is not None)
    axes.set_title(f"{title} ({fixed})")
    axes.legend(frameon=False)
    _save(figure, path)
    plt.close(figure)
    return True


def _ceiling_plot(entries: list[dict[str, Any]], path: Path) -> bool:
    import matplotlib.pyplot as plt

    rows = [e for e in entries if e.get("percent_of_ceiling") is not None and not e.get("baseline")]
    if not rows:
        return False
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in rows:  # one bar per benchmark: its largest size is its last group
        best[entry["file"], label(entry).split("[")[0]] = entry
    names = [f"{label(e).split('[')[0]} ({e['ceiling']})" for e in best.values()]
    figure, axes = plt.subplots(figsize=(5.5, 0.3 * len(best) + 0.8))
    axes.barh(names, [e["percent_of_ceiling"] for e in best.values()], color="#4878a8")
    axes.invert_yaxis()
    axes.axvline(100, color="#888888", linewidth=0.8)
    axes.set(xlabel="% of the ceiling measured in the same run")
    _save(figure, path)
    plt.close(figure)
    return True


def _throughput_plot(entries: list[dict[str, Any]], path: Path) -> bool:
    """Images a second of the loader, the encoders, the step on synthetic images, and end to end."""
    import matplotlib.pyplot as plt

    groups = by_group(entry for entry in entries if (entry["group"] or "").startswith("images per second"))
    if not groups:
        return False
    figure, panels = plt.subplots(len(groups), squeeze=False, figsize=(5.5, 1.7 * len(groups)))
    for axes, (group, members) in zip(panels[:, 0], groups.items(), strict=True):
        rates = {label(e).split("[")[-1].split("]")[0].replace("_", " "): e["items_per_second"] for e in members}
        bars = axes.barh(list(rates), list(rates.values()), color="#4878a8")
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.invert_yaxis()
        axes.set_title(group, fontsize=8)
        axes.set(xlabel="images per second")
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)
    return True


def _plots(name: str, result: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Write the plots of one device; (title, file name) of those that there was something for."""
    import matplotlib

    matplotlib.use("svg")
    folder.mkdir(parents=True, exist_ok=True)
    every = result["benchmarks"]
    loss = [entry for entry in every if entry["file"].startswith("bench_loss")]
    made = []
    with matplotlib.rc_context(_STYLE):
        for title, stem, draw in (
            ("Loss: time against K", "loss-time-k", lambda p: _sweep_plot(loss, "K", "median", p, "Time", "ms")),
            ("Loss: time against B", "loss-time-b", lambda p: _sweep_plot(loss, "B", "median", p, "Time", "ms")),
            (
                "Loss: extra memory against K",
                "loss-memory-k",
                lambda p: _sweep_plot(loss, "K", "peak_extra_bytes", p, "Extra memory", "MB"),
            ),
            ("Share of the ceiling", "ceilings", lambda p: _ceiling_plot(every, p)),
            ("Images a second, part by part", "throughput", lambda p: _throughput_plot(every, p)),
        ):
            file = f"{name}-{stem}.svg"
            if draw(folder / file):
                made.append((title, file))
    return made


def write_page(results_folder: Path, page: Path) -> None:
    """Write the page and its plots, ``page`` beside a folder ``benchmarks`` of SVG files."""
    results = newest_results(results_folder) if results_folder.is_dir() else {}
    lines = [
        "# Benchmarks",
        "",
        "Every figure here comes from a command: `pytest bench --benchmark-only` on any machine (`make bench` leaves the "
        "longest rows out), `bench/gpu_suite.sh` on one with a GPU, then `python bench/report.py collect` and `page`. "
        "Each benchmark first asserts that its result is right. Compare figures within one table only: they were "
        "taken in one run, on random inputs, as medians of warm rounds; on one CPU thread, of its processor time.",
        "",
        "*20-80 %* are quantiles of the rounds over their median; *speed* is the baseline's median over this row's; "
        "*% of limit* is the median of the row marked as the limit over this row's, where one operation does less than "
        "any of the others can (a copy for CutMix, the two products for the loss, slices for the queue); "
        "*ceiling* is the share of the memory bandwidth or of the matrix rate measured in the same run that the written "
        "counts of bytes and FLOPs reach; *extra MB* is the largest memory alive during a call above what was alive "
        "before; an empty cell was not counted.",
        "",
        "| device | date | versions | matrix rate, float32 | bandwidth | left out |",
        "|---|---|---|---:|---:|---|",
    ]
    for result in results.values():
        rates: dict[str, float] = {}
        for entry in result["benchmarks"]:
            rates |= entry.get("ceilings", {})
        matrix, copy = rates.get("matrix_float32_flops_per_second"), rates.get("bytes_per_second")
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k in ("torch", "triton", "python"))
        left_out = ", ".join(f"{peer}: {reason}" for peer, reason in result["left_out"].items())
        cells_ = (
            result["device"],
            result["date"],
            versions,
            f"{matrix / 1e9:,.0f} GFLOP/s" if matrix else "",
            f"{copy / 1e9:,.1f} GB/s" if copy else "",
            left_out,
        )
        lines.append("| " + " | ".join(cells_) + " |")
    lines.append("")
    for device in _missing_kinds(results):
        lines += [f"On {device}: {NOT_MEASURED}.", ""]
    for name, result in results.items():
        plots = _plots(name, result, page.parent / "benchmarks")
        if plots:
            lines += [f"## Plots: {result['device']}", ""]
            lines += [f"![{title}](benchmarks/{file})" for title, file in plots] + [""]
    files = sorted(path.name for path in (ROOT / "bench").glob("bench_*.py"))
    for file in files:
        lines += _file_section(file, results)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines).rstrip() + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description="Benchmark results and their page.")
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="pytest-benchmark files to results/DEVICE/DATE.json")
    collecting.add_argument("raw", type=Path, nargs="+")
    collecting.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    collecting.add_argument("--parts", type=Path, help="steps of a suite, tab-separated")
    paging = commands.add_parser("page", help="the newest results to docs/benchmarks.md")
    paging.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    paging.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args(argv)
    if arguments.command == "page":
        write_page(arguments.results, arguments.out)
        print(f"wrote {arguments.out}")
        return 0
    try:
        path = collect(arguments.raw, arguments.results, arguments.parts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = json.loads(path.read_text())
    print("\n".join([result["device"], *table_lines(result["benchmarks"])]))
    for peer, reason in result["left_out"].items():
        print(f"left out: {peer} {reason}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
