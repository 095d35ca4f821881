"""Jobs shared by the command line and the Python calls, besides training: evaluating checkpoints, embedding, search."""

from fastuft.jobs.embedding import embed_images
from fastuft.jobs.evaluation import EvaluatedCheckpoint, evaluate_checkpoint
from fastuft.jobs.inputs import check_checkpoint
from fastuft.jobs.nearest import Found, search
from fastuft.jobs.storage import Embeddings, read_embeddings, write_embeddings

__all__ = [
    "Embeddings",
    "EvaluatedCheckpoint",
    "Found",
    "check_checkpoint",
    "embed_images",
    "evaluate_checkpoint",
    "read_embeddings",
    "search",
    "write_embeddings",
]
