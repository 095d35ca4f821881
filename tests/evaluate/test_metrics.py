"""Metrics over features and labels: by hand, against other implementations, and by property."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import NearestNeighbors

import fastuft
from fastuft import evaluate
from fastuft.evaluate import clustering

labelings = st.lists(st.tuples(st.integers(0, 6), st.integers(-3, 3)), min_size=1, max_size=60)


def brute_force_bcubed(clusters, labels):
    shares = []
    for c, label in zip(clusters, labels, strict=True):
        members = [other for cc, other in zip(clusters, labels, strict=True) if cc == c]
        shares.append(sum(other == label for other in members) / len(members))
    return sum(shares) / len(shares)


def test_bcubed_by_hand():
    # Cluster 0 holds a, a, b (shares 2/3, 2/3, 1/3); cluster 1 holds b (1).
    assert fastuft.bcubed_precision([0, 0, 0, 1], ["a", "a", "b", "b"]) == pytest.approx(
        (2 / 3 + 2 / 3 + 1 / 3 + 1) / 4
    )


@given(labelings)
def test_bcubed_equals_its_definition(pairs):
    clusters, labels = zip(*pairs, strict=True)
    assert fastuft.bcubed_precision(clusters, labels) == pytest.approx(brute_force_bcubed(clusters, labels))


@given(labelings, st.randoms(use_true_random=False))
def test_bcubed_ignores_cluster_names_and_order(pairs, random):
    clusters, labels = zip(*pairs, strict=True)
    names = random.sample(range(100), 7)
    random.shuffle(pairs)
    renamed = [names[c] for c, _ in pairs], [f"class {label}" for _, label in pairs]
    assert fastuft.bcubed_precision(*renamed) == pytest.approx(fastuft.bcubed_precision(clusters, labels))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_bcubed_of_perfect_and_of_single_clusterings(labels):
    assert fastuft.bcubed_precision(labels, labels) == 1.0
    assert fastuft.bcubed_precision(range(len(labels)), labels) == 1.0
    shares = np.bincount(labels) / len(labels)
    assert fastuft.bcubed_precision([0] * len(labels), labels) == pytest.approx(float((shares**2).sum()))


def test_bcubed_of_a_random_clustering_is_near_chance():
    rng = np.random.default_rng(0)
    value = fastuft.bcubed_precision(rng.integers(0, 10, 20_000), rng.integers(0, 10, 20_000))
    assert value == pytest.approx(0.1, abs=0.002)


def test_bcubed_equals_the_published_package():
    bcubed = pytest.importorskip("bcubed")
    rng = np.random.default_rng(1)
    for count, clusters, classes in ((30, 4, 3), (200, 12, 7), (150, 2, 20)):
        found, truth = rng.integers(0, clusters, count), rng.integers(0, classes, count)
        theirs = bcubed.precision(
            {i: {int(c)} for i, c in enumerate(found)}, {i: {int(label)} for i, label in enumerate(truth)}
        )
        assert fastuft.bcubed_precision(found, torch.from_numpy(truth)) == pytest.approx(theirs)


def test_bcubed_at_food101_size_is_fast():
    rng = np.random.default_rng(2)
    truth = np.repeat(np.arange(101), 750)
    value = fastuft.bcubed_precision(rng.permutation(truth), truth)
    assert 1 / 101 < value < 0.02


@given(labelings)
def test_accuracies_equal_sklearn(pairs):
    predicted, labels = zip(*pairs, strict=True)
    assert evaluate.top1_accuracy(predicted, labels) == pytest.approx(accuracy_score(labels, predicted))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        assert evaluate.mean_class_accuracy(predicted, labels) == pytest.approx(
            balanced_accuracy_score(labels, predicted)
        )


def test_mean_class_accuracy_weighs_classes_equally():
    assert evaluate.mean_class_accuracy([0, 0, 0, 0], [0, 0, 0, 1]) == 0.5
    assert evaluate.top1_accuracy([0, 0, 0, 0], [0, 0, 0, 1]) == 0.75


def test_retrieval_by_hand():
    train = [[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]
    # Nearest to (2, 0.1): rows 1 and 0, both "x"; nearest to (0.1, 1): row 2 "y", then row 1 "x".
    value = fastuft.retrieval_accuracy(train, ["x", "x", "y", "y"], [[2.0, 0.1], [0.1, 1.0]], ["x", "y"], k=2)
    assert value == pytest.approx((1.0 + 0.5) / 2)


def test_neighbors_equal_sklearn_and_faiss(monkeypatch):
    monkeypatch.setattr("fastuft.evaluate.retrieval.BLOCK_VALUES", 7 * 90)  # several uneven blocks
    rng = np.random.default_rng(3)
    gallery, queries = rng.normal(size=(90, 16)).astype("f4"), rng.normal(size=(40, 16)).astype("f4")
    distance, expected = NearestNeighbors(n_neighbors=5, metric="cosine").fit(gallery).kneighbors(queries)
    values, indices = evaluate.nearest_neighbors(queries, gallery, 5)
    np.testing.assert_array_equal(indices.numpy(), expected)
    np.testing.assert_allclose(values.numpy(), 1 - distance, atol=1e-5)
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(16)
    index.add(gallery / np.linalg.norm(gallery, axis=1, keepdims=True))
    np.testing.assert_array_equal(indices.numpy(), index.search(queries, 5)[1])


def test_retrieval_equals_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    generator = torch.Generator().manual_seed(9)
    train, test = torch.randn(80, 12, generator=generator), torch.randn(25, 12, generator=generator)
    train_y, test_y = torch.arange(80) % 4, torch.randint(0, 4, (25,), generator=generator)
    similarity = torch.nn.functional.cosine_similarity(test[:, None], train[None], dim=2)
    pairs = zip(similarity, test_y, strict=True)
    expected = [float(retrieval.retrieval_precision(row, train_y == label, top_k=5)) for row, label in pairs]
    assert fastuft.retrieval_accuracy(train, train_y, test, test_y) == pytest.approx(np.mean(expected))


def test_neighbors_within_one_set_exclude_the_item():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    x[7] = x[3]  # a duplicate: equal similarity to itself and to its twin
    _, indices = evaluate.nearest_neighbors(x, x, 3, own=torch.arange(20))
    assert indices.shape == (20, 3)
    assert not (indices == torch.arange(20)[:, None]).any()
    assert indices[3, 0] == 7 and indices[7, 0] == 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_retrieval_ignores_names_scale_and_order(seed):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(30, 8)), rng.normal(size=(9, 8))
    train_y, test_y = np.arange(30) % 3, rng.integers(0, 3, 9)
    value = fastuft.retrieval_accuracy(train, train_y, test, test_y)
    order, names = rng.permutation(30), np.array(["q", "a", "z"])
    scaled = train * rng.uniform(0.1, 10, size=(30, 1))
    same = fastuft.retrieval_accuracy(scaled[order], names[train_y[order]], torch.from_numpy(test), names[test_y])
    assert same == pytest.approx(value)


def test_retrieval_of_separated_classes_is_perfect():
    rng = np.random.default_rng(4)
    labels = np.arange(60) % 3
    x = np.eye(3)[labels] + 0.01 * rng.normal(size=(60, 3))
    assert fastuft.retrieval_accuracy(x[:45], labels[:45], x[45:], labels[45:]) == 1.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kmeans_equals_sklearn_from_the_same_centers(dtype):
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(400, 12)) + 2 * rng.normal(size=(8, 12))[rng.integers(0, 8, 400)]).astype(dtype)
    init = x[rng.choice(400, 8, replace=False)]
    theirs = SklearnKMeans(8, init=init, n_init=1, algorithm="lloyd").fit(x)
    ours = evaluate.kmeans(x, 8, init=init)
    np.testing.assert_array_equal(ours.labels.numpy(), theirs.labels_)
    np.testing.assert_allclose(ours.centers.numpy(), theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_kmeans_refills_empty_clusters_as_sklearn_does():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(60, 2))
    init = np.concatenate([x[:3], [[50.0, 50.0], [-50.0, 50.0]]])  # two centers that attract nothing
    theirs = SklearnKMeans(5, init=init, n_init=1, algorithm="lloyd").fit(x)
    ours = evaluate.kmeans(x, 5, init=init)
    np.testing.assert_array_equal(ours.labels.numpy(), theirs.labels_)
    assert len(np.unique(ours.labels)) == 5


def test_kmeans_does_not_depend_on_blocks(monkeypatch):
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    whole = evaluate.kmeans(x, 5, seed=3)
    monkeypatch.setattr(clustering, "BLOCK_VALUES", 5 * 17)
    blocked = evaluate.kmeans(x, 5, seed=3)
    assert torch.equal(whole.labels, blocked.labels)


def test_kmeans_is_seeded_and_restarts_help():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(evaluate.kmeans(x, 9, seed=1).labels, evaluate.kmeans(x, 9, seed=1).labels)
    assert evaluate.kmeans(x, 9, restarts=8, seed=1).inertia <= evaluate.kmeans(x, 9, restarts=1, seed=1).inertia


def test_kmeans_quality_matches_sklearn_with_its_own_starts():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(600, 10)) + 3 * rng.normal(size=(20, 10))[rng.integers(0, 20, 600)]
    theirs = [SklearnKMeans(20, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(30)]
    ours = [evaluate.kmeans(x, 20, restarts=1, seed=seed).inertia for seed in range(30)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.05)
    assert evaluate.kmeans(x, 20, restarts=20).inertia == pytest.approx(min(theirs), rel=1e-3)


def test_clustering_accuracy_of_separated_classes_is_one():
    rng = np.random.default_rng(8)
    labels = np.arange(90) % 3
    x = np.eye(3)[labels] * rng.uniform(0.5, 3, size=(90, 1)) + 0.01 * rng.normal(size=(90, 3))
    assert evaluate.clustering_accuracy(x, labels) == 1.0


def test_alignment_and_uniformity_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert evaluate.alignment(x, x) == 0.0
    assert evaluate.alignment(x, x.flip(0)) == pytest.approx(2.0)
    assert evaluate.uniformity(x) == pytest.approx(math.log(math.exp(-2 * 2)))


def test_uniformity_equals_the_mean_over_all_pairs():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    expected = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert evaluate.uniformity(x) == pytest.approx(float(expected))


def test_drift_of_rotated_features():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    assert evaluate.linear_cka(x, x) == pytest.approx(1.0) and evaluate.mean_cosine(x, x) == pytest.approx(1.0)
    assert evaluate.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0)
    assert evaluate.neighbor_overlap(x, x @ rotation) == 1.0


def test_neighbor_overlap_of_unrelated_features_is_chance():
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(400, 16, generator=generator), torch.randn(400, 16, generator=generator)
    assert evaluate.neighbor_overlap(x, y) == pytest.approx(5 / 399, abs=0.01)


def test_effective_rank_equals_its_definition():
    generator = torch.Generator().manual_seed(6)
    for shape in ((40, 8), (8, 40)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        shares = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
        assert evaluate.effective_rank(x) == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
    assert evaluate.effective_rank(torch.eye(5)) == pytest.approx(5.0)
    assert evaluate.effective_rank(torch.ones(9, 5)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("width", [6, 300])
def test_lidar_equals_its_definition(width):
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(40, width, generator=generator, dtype=torch.float64) * torch.linspace(1, 3, width)
    a, b = (images + 0.4 * torch.randn(40, width, generator=generator, dtype=torch.float64) for _ in range(2))
    views = torch.stack([a, b]) - (a + b).mean(0) / 2
    views = views / views.square().mean().sqrt()
    means = views.mean(0)
    within = (views - means).flatten(0, 1)
    noise = within.T @ within / len(within) + 1e-4 * torch.eye(width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(noise)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    spectrum = torch.linalg.eigvalsh(root @ (means.T @ means / len(means)) @ root).clamp(min=0)
    shares = spectrum / spectrum.sum()
    assert evaluate.lidar(a, b) == pytest.approx(math.exp(float(torch.special.entr(shares).sum())), rel=1e-6)
    assert evaluate.lidar(3 * a, 3 * b) == pytest.approx(evaluate.lidar(a, b))


def test_lidar_counts_the_discriminative_directions():
    generator = torch.Generator().manual_seed(8)
    images = torch.zeros(200, 10)
    images[:, :3] = torch.randn(200, 3, generator=generator)
    a, b = (images + 0.1 * torch.randn(200, 10, generator=generator) for _ in range(2))
    assert 2.5 < evaluate.lidar(a, b) < 3.5 < evaluate.effective_rank(a)


def test_view_agreement_is_one_for_equal_views_and_chance_for_unrelated_ones():
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(400, 16, generator=generator), torch.randn(400, 16, generator=generator)
    assert evaluate.view_agreement(x, x) == 1.0
    assert evaluate.view_agreement(x, y) == pytest.approx(5 / 399, abs=0.01)


GOOD = np.eye(6) + 1.0
SAME = np.ones((6, 6)) * np.arange(1, 7)[:, None]
NAN = np.where(np.eye(6) > 0, np.nan, GOOD)
Y = [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastuft.retrieval_accuracy(NAN, Y, GOOD, Y), "train_x has NaN or infinity in 6 of 6 rows"),
        (lambda: fastuft.retrieval_accuracy(GOOD, Y, NAN[:1], Y[:1]), "test_x has NaN"),
        (lambda: fastuft.retrieval_accuracy(GOOD, Y, GOOD, [0, 0, 0, 1, 2, 7]), "without training examples: 2, 7"),
        (lambda: fastuft.retrieval_accuracy(GOOD, [0] * 6, GOOD, [0] * 6), "only one class"),
        (lambda: fastuft.retrieval_accuracy(GOOD, Y[:5], GOOD, Y), "train_y has 5 entries but there are 6"),
        (lambda: fastuft.retrieval_accuracy(GOOD, Y, GOOD[:, :4], Y), "queries have 4 features and the gallery has 6"),
        (
            lambda: fastuft.retrieval_accuracy(GOOD, Y, GOOD, Y, k=7),
            "it needs the 7 nearest neighbors, but there are only 6 images",
        ),
        (lambda: fastuft.retrieval_accuracy(GOOD[0], Y, GOOD, Y), r"train_x has shape \(6,\)"),
        (lambda: fastuft.retrieval_accuracy(GOOD, np.array(Y) + 0.5, GOOD, Y), "not integers"),
        (lambda: evaluate.nearest_neighbors(GOOD, GOOD, 0), "k=0 is out of range"),
        (lambda: evaluate.nearest_neighbors(GOOD, GOOD, 6, own=range(6)), "there are only 5 images to choose from"),
        (lambda: evaluate.nearest_neighbors(GOOD, GOOD, 2, own=[0] * 5 + [6]), "own has rows outside the gallery"),
        (lambda: fastuft.retrieval_accuracy(SAME, Y, GOOD, Y), "train_x: the features of all 6 images are the same"),
        (lambda: evaluate.clustering_accuracy(SAME, Y), "the network has collapsed"),
        (lambda: evaluate.clustering_accuracy(GOOD, range(6)), "each class has only one image"),
        (lambda: evaluate.mean_cosine(GOOD, GOOD[:, :4]), "widths of the features differ"),
        (lambda: fastuft.bcubed_precision([0, 1], [0]), "2 entries and labels has 1"),
        (lambda: fastuft.bcubed_precision([], []), "at least one entry"),
        (lambda: evaluate.kmeans(GOOD, 7), "clusters=7 is out of range; allowed: 1 to 6"),
        (lambda: evaluate.kmeans(NAN, 2), "x has NaN"),
        (lambda: evaluate.kmeans(GOOD, 2, init=GOOD), r"init has shape \(6, 6\); it must be \(2, 6\)"),
        (lambda: evaluate.kmeans(GOOD, 2, restarts=0), "restarts=0"),
        (lambda: evaluate.clustering_accuracy(GOOD, [1] * 6), "only one class"),
        (lambda: evaluate.linear_cka(np.ones((4, 2)), GOOD[:4]), "one set is constant"),
        (lambda: evaluate.mean_cosine(GOOD, GOOD[:4]), "row i of both must be the same image"),
        (lambda: evaluate.effective_rank(np.zeros((4, 3))), "all zero"),
        (lambda: evaluate.lidar(np.ones((4, 2)), np.ones((4, 2))), "they are constant"),
        (lambda: evaluate.uniformity(GOOD[:1]), "there is only one image"),
    ],
)
def test_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_gpu_results_equal_cpu_results_and_are_deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    generator = torch.Generator().manual_seed(6)
    means = torch.randn(12, 64, generator=generator)
    labels = torch.randint(12, (900,), generator=generator)
    x = means[labels] * 2 + torch.randn(900, 64, generator=generator)
    torch.use_deterministic_algorithms(True)
    try:
        on_cpu, on_gpu, again = (evaluate.kmeans(x, 12, device=device) for device in ("cpu", "cuda", "cuda"))
        assert torch.equal(on_gpu.labels, again.labels) and on_gpu.inertia == again.inertia
        assert on_gpu.inertia == pytest.approx(on_cpu.inertia, rel=1e-4)
        halves = x[100:], labels[100:], x[:100], labels[:100]
        cpu, gpu = (fastuft.retrieval_accuracy(*halves, device=device) for device in ("cpu", "cuda"))
        assert gpu == pytest.approx(cpu, abs=1e-3)
    finally:
        torch.use_deterministic_algorithms(False)
