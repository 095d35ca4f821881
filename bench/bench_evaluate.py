"""Retrieval and K-means beside scikit-learn, at Food-101's shape.

Claim: exact neighbours and Lloyd's algorithm over 75,750 x 2048 features take seconds on a GPU, and on a CPU about as
long as scikit-learn's, with the same result. Results are compared before anything is timed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from fastuft.evaluate import kmeans, nearest_neighbours

FOOD101 = (75_750, 25_250, 2048, 101)
SMOKE = (1_500, 500, 128, 20)
ITERATIONS = 10


@pytest.fixture(scope="module")
def features(request):
    """(training [N, F], test [Q, F], initial centres [K, F]) of overlapping groups, float32."""
    train, test, width, groups = SMOKE if request.config.getoption("--smoke", default=False) else FOOD101
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, width, generator=generator)

    def draw(count):
        which = torch.randint(groups, (count,), generator=generator)
        return centres[which] + 2 * torch.randn(count, width, generator=generator)

    x = draw(train)
    return x, draw(test), x[torch.randperm(train, generator=generator)[:groups]]


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


@pytest.mark.benchmark(group="retrieval")
@pytest.mark.parametrize("device", DEVICES)
def test_retrieval(benchmark, features, device):
    train, test, _ = (x.to(device) for x in features)
    few = test[:64].cpu()
    expected = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(features[0].numpy())
    found = nearest_neighbours(few, train.cpu(), 5)[1].numpy()
    np.testing.assert_array_equal(found, expected.kneighbors(few.numpy(), return_distance=False))
    benchmark.pedantic(nearest_neighbours, (test, train, 5), rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="retrieval")
def test_retrieval_sklearn(benchmark, features):
    train, test, _ = (x.numpy() for x in features)
    index = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(train)
    benchmark.pedantic(index.kneighbors, (test,), rounds=1)


@pytest.mark.benchmark(group=f"K-means, {ITERATIONS} iterations")
@pytest.mark.parametrize("device", DEVICES)
def test_kmeans(benchmark, features, device):
    train, _, init = (x.to(device) for x in features)
    part = features[0][:1000].numpy()
    theirs = KMeans(len(init), init=init.cpu().numpy(), n_init=1, max_iter=ITERATIONS).fit(part)
    ours = kmeans(part, len(init), init=init.cpu(), max_iterations=ITERATIONS)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-4)
    options = {"init": init, "max_iterations": ITERATIONS, "tolerance": 0.0}
    benchmark.pedantic(kmeans, (train, len(init)), options, rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group=f"K-means, {ITERATIONS} iterations")
def test_kmeans_sklearn(benchmark, features):
    train, _, init = (x.numpy() for x in features)
    model = KMeans(len(init), init=init, n_init=1, max_iter=ITERATIONS, tol=0.0)
    benchmark.pedantic(model.fit, (train,), rounds=1)
