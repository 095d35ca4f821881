"""Pages and tables made from run files; nothing here trains, evaluates or needs torch.

:func:`write_report` turns run folders into one self-contained HTML page, :func:`table` into text, Markdown or CSV.
:func:`write_comparison` compares reproduced figures with the paper's. Run files have fractions; pages show per cent.
"""

from fastuft.report.files import RunFiles, load_run
from fastuft.report.page import write_report
from fastuft.report.paper import (
    Key,
    compare_with_paper,
    comparison_table,
    paper_figures,
    read_results,
    write_comparison,
)
from fastuft.report.tables import Table, accuracy_table, table

__all__ = [
    "Key",
    "RunFiles",
    "Table",
    "accuracy_table",
    "compare_with_paper",
    "comparison_table",
    "load_run",
    "paper_figures",
    "read_results",
    "table",
    "write_comparison",
    "write_report",
]
