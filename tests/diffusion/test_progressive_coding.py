"""Progressive decoding and interpolation on data whose posterior is known."""

import pytest
import torch
from fakes_diffusion import gaussian, three_blobs
from torch import Tensor

from latentdiff.diffusion.ddpm import p_sample_loop
from latentdiff.diffusion.schedules import Schedule, make_betas
from latentdiff.diffusion.theory.progressive_coding import interpolate, progressive_x0

SCHEDULE = Schedule.from_betas(make_betas("cosine", 50))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def test_predicted_x0_goes_from_the_mean_of_all_data_to_the_sample() -> None:
    world = three_blobs()
    model, xt = world.model(SCHEDULE, "epsilon"), _randn(200, 2)
    shown = progressive_x0(
        SCHEDULE,
        model,
        xt,
        generator=_generator(1),
        prediction_type="epsilon",
        shown=[49, 20, 0],
    )
    sample = p_sample_loop(SCHEDULE, model, xt, generator=_generator(1), prediction_type="epsilon")
    assert shown.shape == (3, 200, 2)
    mean = (world.weights[:, None] * world.means).sum(0)
    torch.testing.assert_close(shown[0], mean.expand(200, 2), rtol=0, atol=0.02)
    torch.testing.assert_close(shown[2], sample)
    error = (shown - sample).square().mean((1, 2))
    assert error[0] > error[1] > error[2]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolation_at_no_depth_mixes_the_images_themselves(share: float) -> None:
    """At the first step almost nothing was lost, so the decoder gives the mixture back."""
    a, b = _randn(100, 1, seed=1), _randn(100, 1, seed=2)
    mixed = interpolate(
        SCHEDULE,
        gaussian([0.0], [1.0]).model(SCHEDULE, "epsilon"),
        (a, b),
        eps=_randn(100, 1, seed=3),
        depth=0,
        share=share,
        generator=_generator(4),
        prediction_type="epsilon",
    )
    first_noise = float(SCHEDULE.sqrt_one_minus_alphas_cumprod[0])
    assert float((mixed - torch.lerp(a, b, share)).abs().max()) < 5 * first_noise
    assert float((a - b).abs().mean()) > 10 * first_noise


def test_interpolation_at_full_depth_forgets_both_images() -> None:
    a, b = torch.full((4000, 1), 3.0).double(), torch.full((4000, 1), 5.0).double()
    mixed = interpolate(
        SCHEDULE,
        gaussian([0.0], [1.0]).model(SCHEDULE, "epsilon"),
        (a, b),
        eps=_randn(4000, 1, seed=3),
        depth=49,
        share=0.5,
        generator=_generator(4),
        prediction_type="epsilon",
        variance_type="fixed_large",
    )
    assert abs(float(mixed.mean())) < 4 / 4000**0.5
    assert abs(float(mixed.std()) - 1) < 4 / 8000**0.5
