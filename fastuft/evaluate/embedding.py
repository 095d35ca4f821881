"""t-SNE maps of features (the paper's Figure 1)."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from fastuft.evaluate.inputs import ArrayLike, UndefinedError, as_features


def tsne(features: ArrayLike, *, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """A 2-D t-SNE map of unit features, by openTSNE if it is installed, otherwise by scikit-learn.

    Args:
        features: [N, F], N >= 5; reduced to 50 principal components first.
        perplexity: lowered to (N - 1) / 3 for few images.
        seed: seed of the optimizer.

    Returns:
        coordinates [N, 2] float32.

    Raises:
        UndefinedError: fewer than five images.
    """
    x = F.normalize(as_features("features", features), dim=1).cpu().numpy()
    if len(x) < 5:
        raise UndefinedError(f"a t-SNE map needs at least 5 images, got {len(x)}")
    perplexity = min(perplexity, (len(x) - 1) / 3)
    components = min(50, *x.shape)
    x = PCA(components, random_state=seed).fit_transform(x)
    if find_spec("openTSNE") is not None:
        import openTSNE  # optional dependency

        return np.asarray(openTSNE.TSNE(perplexity=perplexity, random_state=seed).fit(x), dtype=np.float32)
    start = "pca" if components >= 2 else "random"
    return np.asarray(TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(x), dtype=np.float32)
