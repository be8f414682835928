"""Distances between sets of images as feature vectors: FD, KID, CMMD, precision, recall.

FD: Frechet distance of two Gaussians fitted to them (Heusel et al. 2017, FID is its name for one
network's features). KID: squared maximum mean discrepancy under a polynomial kernel (Binkowski et
al. 2018), unbiased, so fit for small sets. CMMD: the same under a Gaussian kernel, of CLIP's
embeddings (Jayasumana et al. 2024). Precision and recall: how much of either set lies in the
other's neighbourhood (Kynkäänniemi et al. 2019).

Ours and not torchmetrics': its KID averages random subsets without an interval, and its metrics
take images with a network; here any features go in, all pairs count, and estimates have intervals.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import Interval, normal_interval, proportion

SAMPLES_PER_FEATURE = 10  # below, FD is mostly bias
CHUNK_PAIRS = 2**24  # kernel values or distances held at once: 128 MiB in float64
SPARE = 14  # candidates more than are asked for, which rounding may have put behind
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, Sec. 4
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x.y, x.x and y.y, which broadcast


@dataclass(frozen=True)
class FrechetDistance:
    """FD with the sample counts that limit its accuracy."""

    value: float
    num_a: int
    num_b: int
    num_features: int

    @property
    def caution(self) -> str:
        """Return a note on FD's bias, and a warning where samples are too few for the features."""
        note = "FD is biased upwards in small samples: compare only figures of equal sample counts"
        lowest, wanted = min(self.num_a, self.num_b), SAMPLES_PER_FEATURE * self.num_features
        if lowest >= wanted:
            return note
        return (
            f"warning: {lowest} samples are too few for {self.num_features} features (10 x "
            f"features are {wanted}); trust KID instead. {note}"
        )

    @property
    def has_enough_samples(self) -> bool:
        """Tell whether both sets have 10 samples a feature."""
        return min(self.num_a, self.num_b) >= SAMPLES_PER_FEATURE * self.num_features


@dataclass(frozen=True)
class ClipMmd:
    """CMMD, unbiased with its interval; biased: with each image's kernel with itself.

    The reference implementation prints the biased one, which small sets make larger.
    """

    unbiased: Interval
    biased: float


@dataclass(frozen=True)
class PrecisionRecall:
    """The part of the generated set within the real one's neighbourhoods, and the reverse.

    Each interval is over the samples counted, with the other set's neighbourhoods as they are.
    """

    precision: Interval
    recall: Interval
    k: int


def frechet_distance(a: Tensor, b: Tensor) -> FrechetDistance:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). a: (N, D), b: (M, D) features.

    With S = R^T R, the trace of the square root is the sum of the singular values of R_a R_b^T:
    no matrix square root, no negative eigenvalues. Raises ValueError for fewer than 2 samples,
    unequal D, or features that are not finite.
    """
    a, b = _checked(a, b)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    value = shift + root_a.square().sum() + root_b.square().sum() - 2 * shared
    return FrechetDistance(max(0.0, float(value)), len(a), len(b), a.shape[1])


def kernel_distance(
    a: Tensor, b: Tensor, *, degree: int = 3, coef: float = 1.0, level: float = 0.95
) -> Interval:
    """Return KID, the unbiased estimate of MMD^2, with its interval. a: (N, D), b: (M, D).

    The kernel is (x.y / D + coef)^degree (Binkowski et al. 2018, Sec. 4). All pairs are used, not
    random subsets. The standard error is the jackknife's over both sets, which is wide where they
    have one distribution, so such sets seldom seem different. The estimate may be negative.
    Raises ValueError for fewer than 3 samples, and as `frechet_distance` does.
    """
    a, b = _checked(a, b, at_least=3)
    num_features = a.shape[1]

    def kernel(products: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return (products / num_features + coef) ** degree

    return _mmd(a, b, kernel, level=level)[0]


def clip_mmd(a: Tensor, b: Tensor, *, level: float = 0.95) -> ClipMmd:
    """Return CMMD of two sets of CLIP's image embeddings. a: (N, D), b: (M, D), scaled to length 1.

    1000 times the squared MMD under the kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma 10
    (Jayasumana et al. 2024, Eq. 4): no Gaussian is fitted, so small sets do. Interval and errors as
    of `kernel_distance`.
    """
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in _checked(a, b, at_least=3))

    def kernel(products: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
        return CMMD_SCALE * torch.exp((2 * products - xx - yy) / (2 * CMMD_SIGMA**2))

    return ClipMmd(*_mmd(a, b, kernel, level=level))


def _mmd(a: Tensor, b: Tensor, kernel: Kernel, *, level: float) -> tuple[Interval, float]:
    """Return the unbiased squared MMD with the jackknife's interval, and the biased one."""
    n, m = len(a), len(b)
    own_a, own_b = (kernel(xx, xx, xx) for xx in (a.square().sum(1), b.square().sum(1)))
    within_a, within_b = (
        _kernel_sums(a, a, kernel)[0] - own_a,
        _kernel_sums(b, b, kernel)[0] - own_b,
    )
    across_a, across_b = _kernel_sums(a, b, kernel)
    all_a, all_b, across = within_a.sum(), within_b.sum(), across_a.sum()
    mean_a, mean_b = all_a / (n * (n - 1)), all_b / (m * (m - 1))
    estimate = mean_a + mean_b - 2 * across / (n * m)
    without_a = (all_a - 2 * within_a) / ((n - 1) * (n - 2)) + mean_b
    without_a = without_a - 2 * (across - across_a) / ((n - 1) * m)  # (N,)
    without_b = (all_b - 2 * within_b) / ((m - 1) * (m - 2)) + mean_a
    without_b = without_b - 2 * (across - across_b) / (n * (m - 1))  # (M,)
    variance = sum((len(x) - 1) * x.var(correction=0) for x in (without_a, without_b))
    interval = normal_interval(
        float(estimate), float(variance) ** 0.5, level=level, num_samples=min(n, m)
    )
    biased = (all_a + own_a.sum()) / n**2 + (all_b + own_b.sum()) / m**2 - 2 * across / (n * m)
    return interval, float(biased)


def precision_recall(
    real: Tensor, generated: Tensor, *, k: int = 3, level: float = 0.95
) -> PrecisionRecall:
    """Return improved precision and recall. real: (N, D), generated: (M, D) features.

    A sample is covered by a set if it lies within the distance of some member to that member's k-th
    nearest neighbour (Kynkäänniemi et al. 2019, Eqs. 1 to 3). Raises ValueError for sets of k or
    fewer samples, and as `frechet_distance` does.
    """
    real, generated = _checked(real, generated, at_least=k + 1)
    good = _covered(generated, by=real, k=k)
    found = _covered(real, by=generated, k=k)
    return PrecisionRecall(
        proportion(int(good.sum()), len(good), level=level),
        proportion(int(found.sum()), len(found), level=level),
        k,
    )


def nearest(points: Tensor, others: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Return distances, rising, and indices of each point's k nearest others. Both (N, k).

    points: (N, D), others: (M, D). A point that is among the others finds itself. A matrix product
    finds the candidates, whose distances alone are then taken exactly: a quarter of the time.
    """
    wide, num = others.double(), min(k + SPARE, len(others))
    squares, distances, indices = wide.square().sum(1), [], []
    for part in _chunks(len(points), len(others)):
        order = torch.addmm(squares, points[part].double(), wide.T, alpha=-2)
        near = torch.topk(order, num, dim=1, largest=False).indices.sort(dim=1).values
        pairs = zip(points[part], near, strict=True)
        exact = torch.cat([_distances(point[None], others[rows]) for point, rows in pairs])
        best = torch.topk(exact, k, dim=1, largest=False)
        distances.append(best.values)
        indices.append(near.gather(1, best.indices))
    return torch.cat(distances), torch.cat(indices)


def _covered(points: Tensor, *, by: Tensor, k: int) -> Tensor:
    """Tell which points lie in the neighbourhood of a set. (N,) bool."""
    radii = nearest(by, by, k=k + 1)[0][:, -1]  # the nearest of all is the point itself
    parts = _chunks(len(points), len(by))
    return torch.cat([(_distances(points[part], by) <= radii).any(dim=1) for part in parts])


def _distances(points: Tensor, others: Tensor) -> Tensor:
    """Return Euclidean distances (N, M), exact for equal points."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


def _covariance_root(x: Tensor) -> Tensor:
    """Return R (min(N, D), D) with R^T R the unbiased covariance of x (N, D)."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _kernel_sums(a: Tensor, b: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Return the kernel matrix's sums over b (N,) and over a (M,), without holding all of it."""
    rows, columns = [], torch.zeros(len(b), dtype=b.dtype, device=b.device)
    squares_a, squares_b = a.square().sum(1), b.square().sum(1)
    for part in _chunks(len(a), len(b)):
        values = kernel(a[part] @ b.T, squares_a[part, None], squares_b)
        rows.append(values.sum(1))
        columns += values.sum(0)
    return torch.cat(rows), columns


def _chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_PAIRS // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _checked(a: Tensor, b: Tensor, *, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Return both feature sets as float64, or raise ValueError."""
    for x in (a, b):
        if x.ndim != 2 or len(x) < at_least:
            raise ValueError(
                f"features must be (N, D) with N of {at_least} or more, got {tuple(x.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError(f"{int((~x.isfinite()).sum())} of {x.numel()} features are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"the sets have {a.shape[1]} and {b.shape[1]} features; use one extractor for both"
        )
    return a.double(), b.double()
