"""Search: the images of a collection that are nearest to a query."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

from fastuft.config import EmbedConfig, SearchConfig
from fastuft.evaluate import nearest_neighbors
from fastuft.jobs.embedding import embed_images
from fastuft.jobs.storage import read_embeddings
from fastuft.names import printable


@dataclass(frozen=True)
class Found:
    """The nearest images of one query, best first.

    Args:
        query: the image.
        paths: the images found.
        similarities: their cosine similarities.
    """

    query: str
    paths: tuple[str, ...]
    similarities: tuple[float, ...]


def search(config: SearchConfig) -> list[Found]:
    """Embed each query in the same way as the collection, and find its nearest images by exact search.

    Raises:
        ValueError: the file has no embeddings, the checkpoint has other weights, or there is no query.
        OSError: a file cannot be read.
    """
    collection = read_embeddings(config.in_)
    settings = collection.settings
    known = {field.name for field in fields(EmbedConfig)}
    options = {name: value for name, value in settings.items() if name in known}
    try:
        wanted = EmbedConfig(
            **{
                **options,
                "images": config.query,
                "checkpoint": config.checkpoint or settings["checkpoint"],
                "suffixes": config.suffixes,
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{printable(config.in_)} lacks settings; write it with `fastuft embed`") from error
    queries = embed_images(dataclasses.replace(wanted, device="auto"), keep=False)
    if queries.settings["weights"] != settings.get("weights"):
        raise ValueError(
            f"checkpoint={wanted.checkpoint!r} does not have the weights that made {printable(config.in_)}; name the "
            "checkpoint that does, or embed the collection again"
        )
    top = min(config.top, len(collection.paths))
    similarities, indices = nearest_neighbors(queries.features, collection.features, top)
    return [
        Found(path, tuple(collection.paths[i] for i in found.tolist()), tuple(values.tolist()))
        for path, found, values in zip(queries.paths, indices, similarities, strict=True)
    ]
