"""Noise schedules: inverses, limits, and equality with diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from latentdiff.diffusion.schedules import (
    BETA_SCHEDULES,
    alphas_cumprod_from_log_snr,
    betas_from_alphas_cumprod,
    log_snr,
    make_betas,
    rescale_zero_terminal_snr,
    space_timesteps,
)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_betas_match_diffusers(name: str, zero_snr: bool) -> None:
    scheduler = DDPMScheduler(
        num_train_timesteps=100,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=name,
        rescale_betas_zero_snr=zero_snr,
    )
    betas = make_betas(name, 100)
    betas = rescale_zero_terminal_snr(betas) if zero_snr else betas
    torch.testing.assert_close(betas.float(), scheduler.betas, atol=1e-5, rtol=0)


def test_cosine_is_its_plain_name_and_quadratic_is_scaled_linear() -> None:
    assert torch.equal(make_betas("cosine"), make_betas("squaredcos_cap_v2"))
    assert torch.equal(make_betas("quadratic"), make_betas("scaled_linear"))
    assert not torch.equal(make_betas("linear"), make_betas("scaled_linear"))


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 1000])
def test_every_schedule_is_float64_inside_the_unit_interval(name: str, num_timesteps: int) -> None:
    betas = make_betas(name, num_timesteps)
    assert betas.dtype == torch.float64
    assert betas.shape == (num_timesteps,)
    assert bool(((betas > 0) & (betas < 1)).all())


def test_cosine_alphas_cumprod_is_a_squared_cosine_before_the_cap() -> None:
    alphas_cumprod = torch.cumprod(1 - make_betas("cosine", 1000), 0)
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    f = torch.cos((s + 0.008) / 1.008 * torch.pi / 2) ** 2
    f0 = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(alphas_cumprod[:-1], (f / f0)[:-1], rtol=1e-10, atol=0)


def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_pure_noise() -> None:
    betas = make_betas("scaled_linear")
    rescaled = rescale_zero_terminal_snr(betas)
    assert rescaled[-1] == 1
    torch.testing.assert_close(rescaled[0], betas[0], rtol=1e-12, atol=0)
    assert bool((rescaled[:-1] < 1).all())
    # sqrt(alphas_cumprod) is an affine map of the old one (Lin et al. 2023, Alg. 1)
    old = torch.cumprod(1 - betas, 0).sqrt()
    new = torch.cumprod(1 - rescaled, 0).sqrt()
    slope = (new[1:] - new[:-1]) / (old[1:] - old[:-1])
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-8, atol=0)


def test_betas_and_alphas_cumprod_and_log_snr_are_inverses() -> None:
    betas = rescale_zero_terminal_snr(make_betas("cosine", 50))
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(betas_from_alphas_cumprod(alphas_cumprod), betas)
    lam = log_snr(alphas_cumprod)
    assert lam[-1] == -torch.inf
    assert bool((lam[1:] < lam[:-1]).all())
    torch.testing.assert_close(lam[:-1].exp(), (alphas_cumprod / (1 - alphas_cumprod))[:-1])
    torch.testing.assert_close(alphas_cumprod_from_log_snr(lam), alphas_cumprod)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="scaled_linear"):
        make_betas("scaled-linear")
    with pytest.raises(ValueError, match="at least 1"):
        make_betas("linear", 0)
    with pytest.raises(ValueError, match="beta_start"):
        make_betas("linear", beta_start=0.2, beta_end=0.1)
    with pytest.raises(ValueError, match="at least 2"):
        rescale_zero_terminal_snr(make_betas("linear", 1))


def test_even_spacing_keeps_both_ends() -> None:
    steps = space_timesteps("250", 1000)
    assert len(steps) == 250
    assert steps[[0, -1]].tolist() == [0, 999]
    assert set((steps[1:] - steps[:-1]).tolist()) == {4, 5}
    assert torch.equal(space_timesteps("1000", 1000), torch.arange(1000))
    assert space_timesteps("1", 10).tolist() == [0]


def test_sections_keep_their_own_numbers() -> None:
    steps = space_timesteps("10,15,20", 300)
    assert [int(((steps >= a) & (steps < a + 100)).sum()) for a in (0, 100, 200)] == [10, 15, 20]
    assert steps[[0, 9, 10, 24, 25, 44]].tolist() == [0, 99, 100, 199, 200, 299]
    assert space_timesteps("2,2", 7).tolist() == [0, 2, 3, 6]


def test_ddim_spacing_has_one_whole_stride_from_zero() -> None:
    assert torch.equal(space_timesteps("ddim25", 1000), torch.arange(0, 1000, 40))
    scheduler = DDPMScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(25)
    assert torch.equal(space_timesteps("ddim25", 1000), scheduler.timesteps.flip(0))


@pytest.mark.parametrize("spec", ["1001", "ddim7000", "600,1", "0", "", "ten", "10,", "-5", "ddim"])
def test_impossible_spacings_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="steps"):
        space_timesteps(spec, 1000)
