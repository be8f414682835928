"""The timesteps that training samples are noised to; TIMESTEP_SAMPLINGS names the choices.

Every function turns uniform draws u, (B,) in [0, 1), into timesteps, so that the caller decides
where randomness comes from. Nothing here waits for the device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TimestepSampler = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Takes u (B,), each sample's stratum (B,) int64, one of the step's each, and the step's number of
samples; returns timesteps (B,) int64 and the weights (B,) of their losses."""


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of a timestep sampler; mean, std and is_unbiased are those of logit_normal.

    is_unbiased: sample a tenth of the timesteps uniformly and weight the losses, so that the
    minimum is that of uniform timesteps.
    """

    num_timesteps: int
    mean: float = 0.0
    std: float = 1.0
    is_unbiased: bool = False
    device: torch.device | str = "cpu"


def build_timestep_sampler(name: str, options: SamplingOptions) -> TimestepSampler:
    """Return the sampler of that name in TIMESTEP_SAMPLINGS; ValueError for an unknown one."""
    if name not in TIMESTEP_SAMPLINGS:
        known = ", ".join(TIMESTEP_SAMPLINGS)
        raise ValueError(f"unknown timestep sampling {name!r}: choose one of {known}")
    return TIMESTEP_SAMPLINGS[name](options)


def _uniform(options: SamplingOptions) -> TimestepSampler:
    def sample(u: Tensor, stratum: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return uniform_timesteps(u, options.num_timesteps), _equal_weights(u)

    return sample


def _stratified(options: SamplingOptions) -> TimestepSampler:
    def sample(u: Tensor, stratum: Tensor, count: int) -> tuple[Tensor, Tensor]:
        u = stratify(u, stratum, num_strata=count)
        return uniform_timesteps(u, options.num_timesteps), _equal_weights(u)

    return sample


def _logit_normal(options: SamplingOptions) -> TimestepSampler:
    num, mean, std = options.num_timesteps, options.mean, options.std
    if options.is_unbiased:
        p = logit_normal_probabilities(num, mean=mean, std=std).to(options.device)

    def sample(u: Tensor, stratum: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if options.is_unbiased:
            t, weights = sample_from(p, u)
            return t, weights.float()
        return logit_normal_timesteps(u, num, mean=mean, std=std), _equal_weights(u)

    return sample


def _loss_aware(options: SamplingOptions) -> TimestepSampler:
    return LossSecondMomentSampler(options.num_timesteps, device=options.device)


TIMESTEP_SAMPLINGS: dict[str, Callable[[SamplingOptions], TimestepSampler]] = {
    "uniform": _uniform,
    "stratified": _stratified,
    "logit_normal": _logit_normal,
    "loss_aware": _loss_aware,
}


def _equal_weights(u: Tensor) -> Tensor:
    return torch.ones_like(u, dtype=torch.float32)


def uniform_timesteps(u: Tensor, num_timesteps: int) -> Tensor:
    """Return floor(u T): every step as likely as any other (Ho et al. 2020, Alg. 1). (B,) int64."""
    return (u * num_timesteps).long().clamp(max=num_timesteps - 1)


def logit_normal_timesteps(
    u: Tensor, num_timesteps: int, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Return timesteps whose logit is normal: more of the middle (Esser et al. 2024, Sec. 3.1).

    mean > 0 favours noise. This changes the minimum of the loss, and weights that undid it would
    grow without bound at both ends; those of `logit_normal_probabilities`, with a share of uniform
    samples, are bounded.
    """
    normal = torch.special.ndtri(u.double() if u.device.type != "mps" else u)
    return uniform_timesteps(torch.sigmoid(mean + std * normal), num_timesteps)


def logit_normal_probabilities(
    num_timesteps: int, *, mean: float = 0.0, std: float = 1.0, uniform_share: float = 0.1
) -> Tensor:
    """Return p_t of a logit-normal mixed with a uniform, (T,) float64, for `sample_from`.

    No p_t is below uniform_share / T, so no weight is above 1 / uniform_share.
    """
    if not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share is {uniform_share}: need 0 <= uniform_share <= 1")
    edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    below = torch.special.ndtr((torch.logit(edges) - mean) / std)  # 0 and 1 at the ends
    return (1 - uniform_share) * below.diff() + uniform_share / num_timesteps


def sample_from(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sample timesteps by their probabilities p (T,): (B,) int64, and the weights (B,) of their
    losses, 1 / (T p_t), which keep the mean of the weighted loss that of uniform timesteps.

    u: (B,) in [0, 1), float64 as a rule: rare steps are thinner than float32.
    """
    edges = p.to(u.dtype).cumsum(0)
    t = torch.searchsorted(edges, u * edges[-1], right=True)
    t = t.clamp(max=len(p) - 1)
    return t, 1 / (len(p) * p.gather(0, t))


def stratify(u: Tensor, stratum: Tensor, *, num_strata: int) -> Tensor:
    """Move the u of stratum i of n into [i / n, (i + 1) / n) (Kingma et al. 2021, App. I).

    u: (B,); stratum: (B,) int64 in [0, num_strata), each once in the whole batch over all
    processes, and at random: what decides a stratum must not depend on what the sample is. Then
    each u is uniform in [0, 1), so every timestep sampler stays unbiased.
    """
    return (stratum + u) / num_strata


class LossSecondMomentSampler:
    """Sample t with p_t in proportion to sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, Eq. 18).

    p_t is proportional to sqrt(mean of the last losses at t, squared), uniform until every step has
    been seen `history` times; `uniform_share` of the samples always stays uniform. The weights
    1 / (T p_t) keep the mean of the weighted loss that of uniform timesteps. History is state: save
    it. With several processes gather t and losses first, so that all hold the same state.
    """

    def __init__(
        self,
        num_timesteps: int,
        *,
        history: int = 10,
        uniform_share: float = 0.001,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share is {uniform_share}: need 0 < uniform_share <= 1")
        self.uniform_share = uniform_share
        # The last row takes the writes to be discarded: a masked write would wait for the device.
        self._losses = torch.zeros(num_timesteps + 1, history, device=device)
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """Return p_t, (T,) float32, each at least uniform_share / T."""
        num_timesteps, history = len(self._counts), self._losses.shape[1]
        size = self._losses[:-1].square().mean(1).sqrt()
        share = size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        p = share * (1 - self.uniform_share) + self.uniform_share / num_timesteps
        ready = (self._counts.min() >= history) & (size.sum() > 0)
        return torch.where(ready, p, 1 / num_timesteps)

    def __call__(self, u: Tensor, stratum: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Sample as a TimestepSampler does."""
        return self.sample(u)

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) int64 and the weights (B,) of their losses. u: (B,) in [0, 1)."""
        return sample_from(self.probabilities(), u)

    def update(self, t: Tensor, losses: Tensor, ok: Tensor | None = None) -> None:
        """Add the losses of a batch before weighting, dropping the oldest first. Both (B,).

        ok: 0-dim, bool or float; where it is 0 nothing changes, even if losses are NaN.
        """
        flag = torch.ones((), device=t.device) if ok is None else ok.detach().to(t.device)
        kept = flag.reshape(()) != 0
        num_timesteps, history = len(self._counts), self._losses.shape[1]
        same = t[:, None] == t[None, :]  # (B, B)
        before, after = same.tril(-1).sum(1), same.triu(1).sum(1)
        slot = (self._counts.gather(0, t) + before) % history
        row = torch.where((after < history) & kept, t, num_timesteps)
        self._losses[row, slot] = losses.detach().float()
        self._counts.scatter_add_(0, t, kept.long().expand_as(t))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as plain tensors: losses (T, history) float32, counts (T,) int64."""
        return {"losses": self._losses[:-1].clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state back. Raises ValueError when it is of another number of steps or history."""
        for name, own in (("losses", self._losses[:-1]), ("counts", self._counts)):
            if name not in state:
                raise ValueError(
                    f"there is no timestep sampler state {name!r}: the run did not sample timesteps"
                    " by their losses"
                )
            if state[name].shape != own.shape:
                raise ValueError(
                    f"timestep sampler state {name!r} has shape {tuple(state[name].shape)},"
                    f" expected {tuple(own.shape)}: it is of a run with other num_timesteps or"
                    " history"
                )
            own.copy_(state[name])
