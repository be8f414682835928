"""Scores of training images for a query image, from their gradients or features. Pure functions.

A score is higher the more the training image lowers the query's loss, as the method estimates it.
Queries are Q images, training images N; gradients are those of gradients.py. docs/attribution.md
says how far each is to be trusted.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Snapshot(NamedTuple):
    """The gradients of the loss at a saved state of training, and the learning rate there."""

    learning_rate: float
    queries: Tensor  # (Q, P)
    train: Tensor  # (N, P)


def kernel_scores(queries: Tensor, train: Tensor, *, damping: float) -> Tensor:
    """Return g_q (G'G + lambda I)^-1 g_i for gradients (Q, P) and (N, P), as (Q, N).

    Of the loss: TRAK (Park et al. 2023, "TRAK: attributing model behavior at scale") of one model,
    with its residuals within the gradients. Of the squared output in place of the loss:
    D-TRAK (Zheng et al. 2024, "Intriguing properties of data attribution on diffusion
    models"). lambda: `damping` times the mean square norm of the training gradients. By the
    push-through identity the inverse is of N x N.
    """
    train, queries = train.double(), queries.double()
    gram = train @ train.T
    size = damping * gram.diagonal().mean()
    gram.diagonal().add_(size)
    return torch.linalg.solve(gram, train @ queries.T).T.float()


def trace_scores(snapshots: Iterable[Snapshot]) -> Tensor:
    """Return the sum over snapshots k of eta_k <g_q, g_i> / |g_i|, as (Q, N).

    TracInCP (Pruthi et al. 2020, "Estimating training data influence by tracing gradient
    descent"), with training gradients of length 1, or images of large gradients rank high for any
    query (Xie et al. 2024, "Data attribution for diffusion models: timestep-induced bias in
    influence estimation").
    """
    return sum(
        (
            one.learning_rate * one.queries @ torch.nn.functional.normalize(one.train, dim=1).T
            for one in snapshots
        ),
        start=torch.zeros(()),
    )


def feature_scores(queries: Tensor, train: Tensor) -> Tensor:
    """Return the distances of features (Q, D) and (N, D) below 0, as (Q, N).

    The baseline: it knows the images, and nothing of the training.
    """
    return -torch.cdist(queries.double(), train.double()).float()


def ranks(scores: Tensor) -> Tensor:
    """Return the rank of each of N scores, 1 for the highest, (N,) int64."""
    found = torch.empty(len(scores), dtype=torch.int64)
    found[scores.argsort(descending=True, stable=True)] = torch.arange(1, len(scores) + 1)
    return found
