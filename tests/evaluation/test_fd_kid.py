"""FD, KID, precision and recall: against independent implementations and closed forms."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial import KDTree
from scipy.special import iv
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from latentdiff.evaluation.metrics import fd_kid as module
from latentdiff.evaluation.metrics.fd_kid import (
    clip_mmd,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_recall,
)


class Features(nn.Identity):
    """An extractor for torchmetrics that takes features as they are."""

    num_features = 16


def points(n: int, d: int = 16, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


A, B = points(300), points(200, seed=1, shift=0.3, scale=1.3)
B_LIKE_A = points(300, seed=2, shift=0.3, scale=1.3)


def filled(metric, a: Tensor, b: Tensor):
    metric = metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return metric


def naive_kid(a: Tensor, b: Tensor) -> float:
    def kernel(x, y):
        return float(x @ y / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(x, y) for x in a for y in b)
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * across / (n * m)


def mean_cubic_kernel(mu: Tensor, s: float, nu: Tensor, t: float) -> float:
    """Return E (x.y / D + 1)^3 for x ~ N(mu, s^2), y ~ N(nu, t^2)."""
    d = len(mu)
    mn, mm, nn_ = float(mu @ nu), float(mu @ mu), float(nu @ nu)
    second = mn**2 + t**2 * mm + s**2 * nn_ + s**2 * t**2 * d
    third = mn**3 + 3 * t**2 * mm * mn + 3 * s**2 * mn * (nn_ + t**2 * (d + 2))
    return third / d**3 + 3 * second / d**2 + 3 * mn / d + 1


def true_kid(d: int, shift: float, scale: float) -> float:
    zero = torch.zeros(d, dtype=torch.float64)
    far = zero + shift
    return (
        mean_cubic_kernel(zero, 1, zero, 1)
        + mean_cubic_kernel(far, scale, far, scale)
        - 2 * mean_cubic_kernel(zero, 1, far, scale)
    )


def test_fd_agrees_with_torchmetrics():
    theirs = filled(FrechetInceptionDistance(feature=Features()), A, B).compute()
    assert frechet_distance(A, B).value == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (20, 40)])
def test_fd_agrees_with_the_matrix_square_root(n, d):
    a, b = points(n, d) @ points(d, d, seed=5), points(n + 5, d, seed=1, shift=0.5)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    expected = float(shift) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    tolerance = 1e-9 if n > d else 1e-5  # the square root of a singular matrix is inexact
    assert frechet_distance(a, b).value == pytest.approx(expected, rel=tolerance)


def test_fd_of_moved_and_stretched_sets_is_known():
    far = torch.arange(16.0, dtype=torch.float64)
    assert frechet_distance(A, A).value == pytest.approx(0, abs=1e-9)
    assert frechet_distance(A, A + far).value == pytest.approx(float(far @ far))
    stretched = A.mean(0) + 3 * (A - A.mean(0))
    trace = float(A.var(0).sum())
    assert frechet_distance(A, stretched).value == pytest.approx((3 - 1) ** 2 * trace)


def test_fd_ignores_order_of_sets_and_turns_of_the_axes():
    turn = torch.linalg.qr(points(16, 16, seed=3)).Q
    value = frechet_distance(A, B).value
    assert frechet_distance(B, A).value == pytest.approx(value)
    assert frechet_distance(A @ turn, B @ turn).value == pytest.approx(value)


def test_fd_is_biased_and_its_note_warns():
    few = [frechet_distance(points(40, seed=2 * i), points(40, seed=2 * i + 1)) for i in range(20)]
    many = [
        frechet_distance(points(400, seed=2 * i), points(400, seed=2 * i + 1)) for i in range(20)
    ]
    assert np.mean([one.value for one in few]) > 5 * np.mean([one.value for one in many]) > 0
    assert not few[0].has_enough_samples
    assert "warning: 40 samples are too few for 16 features" in few[0].caution
    assert many[0].has_enough_samples
    assert "warning" not in many[0].caution
    assert "biased" in many[0].caution


def test_fd_warns_below_ten_samples_a_feature():
    assert not frechet_distance(points(159), points(300)).has_enough_samples
    assert frechet_distance(points(160), points(300)).has_enough_samples


def test_kid_agrees_with_torchmetrics():
    metric = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=len(A))
    theirs, _ = filled(metric, A, B_LIKE_A).compute()
    assert kernel_distance(A, B_LIKE_A).estimate == pytest.approx(float(theirs), rel=1e-5)


def test_kid_and_its_error_agree_with_plain_sums():
    a, b = points(9, 4), points(7, 4, seed=1, shift=1.0)
    ours = kernel_distance(a, b)
    assert ours.estimate == pytest.approx(naive_kid(a, b))
    without_a = [naive_kid(torch.cat([a[:i], a[i + 1 :]]), b) for i in range(9)]
    without_b = [naive_kid(a, torch.cat([b[:i], b[i + 1 :]])) for i in range(7)]
    variance = 8 * np.var(without_a) + 6 * np.var(without_b)
    assert (ours.high - ours.low) / (2 * 1.959964) == pytest.approx(variance**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "d", "shift", "scale"),
    [(100, 100, 16, 0.3, 1.0), (100, 60, 8, 0.5, 1.0), (100, 100, 16, 0.2, 1.2)],
)
def test_kid_s_interval_holds_the_truth_in_95_percent_of_cases(n, m, d, shift, scale):
    truth = true_kid(d, shift, scale)
    cases = [
        kernel_distance(points(n, d, seed=2 * i), points(m, d, seed=2 * i + 1) * scale + shift)
        for i in range(400)
    ]
    assert np.mean([case.contains(truth) for case in cases]) == pytest.approx(0.95, abs=0.03)
    estimates = np.array([case.estimate for case in cases])
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / 20  # unbiased


def test_equal_distributions_seldom_seem_different():
    cases = [
        kernel_distance(points(60, seed=2 * i), points(60, seed=2 * i + 1)) for i in range(400)
    ]
    estimates = np.array([case.estimate for case in cases])
    assert np.mean([case.low > 0 for case in cases]) <= 0.05
    assert abs(estimates.mean()) < 4 * estimates.std() / 20
    assert (estimates < 0).any()


def test_cmmd_of_a_circle_and_a_point_is_a_bessel_function():
    """The mean kernel over a circle of radius 1 is exp(-1 / sigma^2) I_0(1 / sigma^2)."""
    turns = torch.arange(64, dtype=torch.float64) * 2 * torch.pi / 64
    circle, point = torch.stack([turns.cos(), turns.sin()], 1), torch.tensor([[3.0, 0]] * 5)
    mean = np.exp(-0.01) * iv(0, 0.01)
    assert clip_mmd(circle, point).biased == pytest.approx(1000 * (1 - mean), rel=1e-9)
    other = clip_mmd(torch.tensor([[0.0, 7]] * 4), point)
    assert other.biased == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-9)
    assert other.unbiased.estimate == pytest.approx(other.biased, rel=1e-9)


def test_cmmd_is_that_of_plain_sums_over_unit_vectors():
    a, b = points(9, 4), points(7, 4, seed=1, shift=1.0)
    kernel = {}
    for name, (x, y) in {"aa": (a, a), "bb": (b, b), "ab": (a, b)}.items():
        unit_x, unit_y = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
        kernel[name] = 1000 * torch.exp(-(torch.cdist(unit_x, unit_y) ** 2) / 200)
    means = {name: float(one.mean()) for name, one in kernel.items()}
    found = clip_mmd(a, b)
    assert found.biased == pytest.approx(means["aa"] + means["bb"] - 2 * means["ab"])
    apart = [float(kernel[k].sum() - 1000 * n) / (n * (n - 1)) for k, n in (("aa", 9), ("bb", 7))]
    assert found.unbiased.estimate == pytest.approx(sum(apart) - 2 * means["ab"])
    assert found.unbiased.low < found.unbiased.estimate < found.unbiased.high


def test_cmmd_of_equal_distributions_is_unbiased():
    cases = [clip_mmd(points(60, seed=2 * i), points(60, seed=2 * i + 1)) for i in range(200)]
    estimates = np.array([case.unbiased.estimate for case in cases])
    assert abs(estimates.mean()) < 4 * estimates.std() / 200**0.5
    assert np.mean([case.unbiased.low > 0 for case in cases]) <= 0.05
    assert min(case.biased for case in cases) > 0


def test_sums_in_chunks_equal_sums_at_once(monkeypatch):
    whole = kernel_distance(A, B), precision_recall(A, B), nearest(A, B, k=3)
    monkeypatch.setattr(module, "CHUNK_PAIRS", 7 * 200)
    assert kernel_distance(A, B).estimate == pytest.approx(whole[0].estimate, rel=1e-10)
    assert kernel_distance(A, B).high == pytest.approx(whole[0].high, rel=1e-10)
    assert precision_recall(A, B) == whole[1]
    assert all(map(torch.equal, nearest(A, B, k=3), whole[2]))


def test_nearest_agrees_with_a_tree():
    distances, places = nearest(B, A, k=4)
    expected, expected_places = KDTree(A.numpy()).query(B.numpy(), k=4)
    np.testing.assert_allclose(distances.numpy(), expected)
    np.testing.assert_array_equal(places.numpy(), expected_places)
    assert nearest(A, A, k=1)[0].max() == 0


def test_nearest_distances_of_float32_are_those_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    others = 100 + torch.rand(300, 16, generator=generator)
    close = others[:60] + 1e-3 * torch.rand(60, 16, generator=generator)
    every = torch.cdist(close, others, compute_mode="donot_use_mm_for_euclid_dist")
    distances, places = nearest(close, others, k=20)
    assert torch.equal(distances, torch.topk(every, 20, dim=1, largest=False).values)
    assert torch.equal(every.gather(1, places), distances)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_trees(k):
    def covered(x: Tensor, by: Tensor) -> float:
        radii = KDTree(by.numpy()).query(by.numpy(), k=k + 1)[0][:, -1]
        gaps = np.linalg.norm(x.numpy()[:, None] - by.numpy()[None], axis=2)
        return float((gaps <= radii).any(axis=1).mean())

    a, b = A[:, :4], B[:, :4]
    ours = precision_recall(a, b, k=k)
    assert ours.precision.estimate == pytest.approx(covered(b, a))
    assert ours.recall.estimate == pytest.approx(covered(a, b))
    assert (ours.precision.num_samples, ours.recall.num_samples, ours.k) == (200, 300, k)
    assert 0.2 < ours.precision.estimate < 1


def test_precision_and_recall_of_plain_cases():
    same, apart = precision_recall(A, A), precision_recall(A, A + 100)
    assert (same.precision.estimate, same.recall.estimate) == (1, 1)
    assert (apart.precision.estimate, apart.recall.estimate) == (0, 0)
    assert same.precision.low < 1
    two_modes = torch.cat([points(150, 4), points(150, 4, seed=4, shift=50.0)])
    dropped = precision_recall(two_modes, points(200, 4, seed=5))
    assert dropped.precision.estimate > 0.9
    assert dropped.recall.estimate < 0.55


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, clip_mmd, precision_recall])
def test_wrong_features_are_refused(measure):
    with pytest.raises(ValueError, match="16 and 8 features"):
        measure(A, points(20, 8))
    with pytest.raises(ValueError, match=r"features must be \(N, D\)"):
        measure(A, A[:1])
    with pytest.raises(ValueError, match=r"features must be \(N, D\)"):
        measure(A, A[0])
    with pytest.raises(ValueError, match="16 of 4800 features are not finite"):
        measure(A, torch.cat([A[1:], torch.full((1, 16), torch.nan)]))
