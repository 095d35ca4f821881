"""The sections of an evaluation. Each returns its part of ``eval.json``, its arrays and its statements.

A new metric is a new function here, or a line in one. It reads folders and features from the context and returns a
:class:`Part`. What it cannot compute becomes a statement and does not affect the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastuft.evaluate.sections import accuracies, changes, pictures
from fastuft.evaluate.sections.context import AFTER, BEFORE, Context, Progress
from fastuft.evaluate.sections.part import Part

__all__ = ["AFTER", "BEFORE", "SECTIONS", "Context", "Part", "Progress", "Section", "run_sections"]


@dataclass(frozen=True)
class Section:
    """One section.

    Args:
        name: its name in the timings.
        title: its result, as the beginning of a sentence.
        run: computes the section.
    """

    name: str
    title: str
    run: Callable[[Context], Part]


SECTIONS = (
    Section("clustering", "Clustering accuracy", accuracies.clustering),
    Section("retrieval", "Retrieval accuracy", accuracies.retrieval),
    Section("class means", "Few-shot accuracy of class means", accuracies.class_means),
    Section("fewshot", "Few-shot accuracy", accuracies.few_shot),
    Section("fixmatch", "FixMatch accuracy", accuracies.semi_supervised),
    Section("label-free", "What changed without labels", changes.label_free),
    Section("source", "Forgetting of the source", changes.source),
    Section("map", "The map", pictures.tsne_map),
    Section("gallery", "The gallery of neighbors", pictures.gallery),
)


def run_sections(context: Context, sections: tuple[Section, ...] = SECTIONS) -> Part:
    """The parts of all sections as one; a section that fails becomes a statement."""
    whole = Part()
    for section in sections:
        with context.timed(section.name):
            part = whole.known(section.title, partial(section.run, context))
        if part is not None:
            whole.add(part)
    return whole
