"""Attribution scores in closed form: a ridge regression, projections, ranks."""

import pytest
import torch

from latentdiff.audit.attribution.gradients import RandomProjection
from latentdiff.audit.attribution.methods import (
    Snapshot,
    feature_scores,
    kernel_scores,
    ranks,
    trace_scores,
)

N, D, RIDGE = 12, 5, 0.7


def ridge(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the minimum of sum_i w_i (y_i - x_i theta)^2 / 2 + RIDGE |theta|^2 / 2."""
    metric = (x * weights[:, None]).T @ x + RIDGE * torch.eye(D, dtype=x.dtype)
    return torch.linalg.solve(metric, (x * weights[:, None]).T @ y)


def test_kernel_scores_are_the_influence_of_a_ridge_regression() -> None:
    """With residuals of length 1 the gradients' metric is the Hessian, and TRAK is exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    signs = torch.randint(2, (N,), generator=generator).double() * 2 - 1
    theta = x.T @ signs / RIDGE
    y = x @ theta + signs  # so that theta is the minimum, and every residual is a sign
    weights = torch.ones(N, dtype=torch.float64)
    assert torch.allclose(ridge(x, y, weights), theta)
    query, target = torch.randn(D, generator=generator, dtype=torch.float64), 0.3

    def loss(at: torch.Tensor) -> torch.Tensor:
        return (target - query @ at).square() / 2

    gradients = -signs[:, None] * x
    own = -(target - query @ theta) * query
    damping = RIDGE / float(gradients.square().sum(1).mean())
    scores = kernel_scores(own[None], gradients, damping=damping)[0]
    step = 1e-6
    for i in range(N):
        more = weights.clone()
        more[i] += step
        change = float(loss(ridge(x, y, more)) - loss(theta)) / step
        assert -change == pytest.approx(float(scores[i]), rel=1e-3, abs=1e-4)


def test_trace_scores_are_what_steps_of_gradient_descent_take_off_the_loss() -> None:
    """One image a step, whose gradient has length 1: the first order of Pruthi et al."""
    generator = torch.Generator().manual_seed(1)
    query, train = torch.randn(1, D, generator=generator), torch.randn(N, D, generator=generator)
    train = torch.nn.functional.normalize(train, dim=1)
    rates = (0.5, 0.25)
    scores = trace_scores(Snapshot(rate, query, train) for rate in rates)
    assert torch.allclose(scores, sum(rates) * query @ train.T, atol=1e-6)
    large = train * torch.arange(1, N + 1)[:, None]
    assert torch.allclose(trace_scores([Snapshot(0.75, query, large)]), scores, atol=1e-6)
    own = trace_scores([Snapshot(1.0, train[3:4], train)])[0]
    assert int(own.argmax()) == 3


def test_a_projection_keeps_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 3000, generator=generator)
    parts = [1000, 2000]
    products = []
    for seed in range(200):
        project = RandomProjection(parts, size=256, seed=seed)
        one, other = project(x.split(parts)), project(y.split(parts))
        products.append(float(one @ other))
    found, true = torch.tensor(products), float(x @ y)
    bound = (2 * float(x.square().sum() * y.square().sum()) / 256) ** 0.5
    assert float(found.std()) < bound
    assert abs(float(found.mean()) - true) < 4 * bound / 200**0.5
    whole = RandomProjection(parts, size=256, seed=0)
    assert torch.allclose(whole([x[:1000], None]), whole([x[:1000], torch.zeros(2000)]))


def test_features_score_by_distance_and_ranks_begin_at_1() -> None:
    train = torch.tensor([[0.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
    scores = feature_scores(torch.tensor([[0.0, 0.0]]), train)[0]
    assert torch.allclose(scores, torch.tensor([-1.0, -3.0, -(2**0.5)]))
    assert ranks(scores).tolist() == [1, 3, 2]
