"""The loss of a step against its closed form, setting by setting, and what timesteps it takes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.timesteps import (
    LossSecondMomentSampler,
    SamplingOptions,
    build_timestep_sampler,
    logit_normal_probabilities,
)
from latentdiff.models.build import make_ddpm_scheduler, schedule_of
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.text_to_image.objective import Objective

T, B = 1000, 6
SCHEDULE = schedule_of(make_ddpm_scheduler())
PLAIN = Objective(
    SCHEDULE,
    prediction_type="epsilon",
    null_text=Conditioning(torch.zeros(1, 2, 3)),
    sample_timesteps=build_timestep_sampler("uniform", SamplingOptions(T)),
)
SNR = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)


def batch(n: int = B, **others: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z0, eps, perturbation = torch.randn(3, n, 4, 2, 2, generator=generator)
    return {
        "z0": z0,
        "eps": eps,
        "perturbation": perturbation,
        "offset": torch.randn(n, 4, 1, 1, generator=generator),
        "u": (torch.arange(n, dtype=torch.float64) + 0.5) / n,
        "stratum": torch.arange(n),
        "prompt_embeds": torch.zeros(n, 2, 3),
        "dropped": torch.zeros(n, dtype=torch.bool),
    } | others


def zero(zt: Tensor, t: Tensor, text: Conditioning) -> Tensor:
    return torch.zeros_like(zt)


def losses_of(objective: Objective, given: dict[str, Tensor], model: Any = zero) -> Any:
    return objective.losses(model, given, count=len(given["u"]))


def test_loss_is_the_squared_error_of_the_diffused_latents() -> None:
    given = batch(dropped=torch.ones(B, dtype=torch.bool), prompt_embeds=torch.ones(B, 2, 3))
    objective = replace(PLAIN, prediction_type="v_prediction")

    def model(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.prompt_embeds is not None  # 0: all captions are dropped
        return 0.5 * zt + conditioning.prompt_embeds.sum()

    found = losses_of(objective, given, model)
    alphas = SCHEDULE.alphas_cumprod[found.t].float().view(-1, 1, 1, 1)
    signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
    zt = signal * given["z0"] + noise * given["eps"]
    v = signal * given["eps"] - noise * given["z0"]
    torch.testing.assert_close(found.loss, (v - 0.5 * zt).square().flatten(1).mean(1))


def test_huber() -> None:
    given = batch()
    found = losses_of(replace(PLAIN, huber_delta=0.3), given).loss
    expected = 2 * 0.3 * ((given["eps"].square() + 0.09).sqrt() - 0.3)
    torch.testing.assert_close(found, expected.flatten(1).mean(1))


@pytest.mark.parametrize(
    ("weighting", "gamma", "expected"),
    [
        ("min_snr", None, lambda snr: (5 / snr).clamp(max=1)),
        ("min_snr", 2.0, lambda snr: (2 / snr).clamp(max=1)),
        ("soft_min_snr", None, lambda snr: 5 / (snr + 5)),
        ("p2", None, lambda snr: 1 / (1 + snr)),
        ("p2", 0.5, lambda snr: (1 + snr) ** -0.5),
    ],
)
def test_weights_by_timestep(weighting: str, gamma: float | None, expected: Any) -> None:
    given = batch()
    found = losses_of(replace(PLAIN, loss_weighting=weighting, snr_gamma=gamma), given)
    plain = losses_of(PLAIN, given).loss
    torch.testing.assert_close(found.loss / plain, expected(SNR[found.t]).float())


def test_perturbed_input_is_noisier_and_the_target_is_not() -> None:
    given, seen = batch(), []

    def model(zt: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        seen.append(zt)
        return torch.zeros_like(zt)

    found = losses_of(replace(PLAIN, input_perturbation=0.1), given, model)
    torch.testing.assert_close(found.loss, given["eps"].square().flatten(1).mean(1))
    alphas = SCHEDULE.alphas_cumprod[found.t].float().view(-1, 1, 1, 1)
    noise = given["eps"] + 0.1 * given["perturbation"]
    torch.testing.assert_close(seen[0], alphas.sqrt() * given["z0"] + (1 - alphas).sqrt() * noise)


def test_offset_noise_is_seen_and_is_the_target() -> None:
    given, seen = batch(), []

    def model(zt: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        seen.append(zt)
        return torch.zeros_like(zt)

    found = losses_of(replace(PLAIN, offset_noise=0.2), given, model)
    noise = given["eps"] + 0.2 * given["offset"]
    torch.testing.assert_close(found.loss, noise.square().flatten(1).mean(1))
    alphas = SCHEDULE.alphas_cumprod[found.t].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0], alphas.sqrt() * given["z0"] + (1 - alphas).sqrt() * noise)


def test_logit_normal_takes_its_mean_and_deviation_from_the_settings() -> None:
    options = SamplingOptions(T, mean=0.7, std=0.5)
    sampler = build_timestep_sampler("logit_normal", options)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    t, importance_weight = sampler(u, torch.arange(20_000), 20_000)
    logit = torch.logit((t + 0.5) / T)
    assert float(logit.mean()) == pytest.approx(0.7, abs=1e-2)
    assert float(logit.std()) == pytest.approx(0.5, abs=1e-2)
    assert (importance_weight == 1).all()


def loss_aware() -> Objective:
    sampler = LossSecondMomentSampler(T, history=2)
    steps = torch.arange(T).repeat(2)
    sampler.update(steps, 1 / (1 + steps))
    return replace(PLAIN, sample_timesteps=sampler)


def unbiased_logit_normal() -> Objective:
    options = SamplingOptions(T, mean=0.5, std=0.7, is_unbiased=True)
    return replace(PLAIN, sample_timesteps=build_timestep_sampler("logit_normal", options))


@pytest.mark.parametrize("make", [loss_aware, unbiased_logit_normal])
def test_gradients_of_importance_sampling_are_unbiased(make: Any) -> None:
    """Their mean over the draws is the mean over all timesteps, for a model that errs with t."""
    n = 200_000
    given = batch(1)
    given = {name: x.expand(n, *x.shape[1:]) for name, x in given.items()}
    given |= {
        "u": (torch.arange(n, dtype=torch.float64) + 0.5) / n,
        "stratum": torch.arange(n),
    }

    def gradient(objective: Objective, *, weighs: bool) -> Tensor:
        scale = torch.tensor([0.3, -0.2], requires_grad=True)

        def model(zt: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            x = (t / T)[:, None, None, None]
            return (scale[0] * x + scale[1]) * zt

        found = losses_of(objective, given, model)
        (found.loss * (found.importance_weight if weighs else 1)).mean().backward()
        assert scale.grad is not None
        return scale.grad

    wanted = gradient(PLAIN, weighs=True)  # uniform: every timestep equally often
    torch.testing.assert_close(gradient(make(), weighs=True), wanted, rtol=2e-3, atol=2e-3)
    assert (gradient(make(), weighs=False) / wanted - 1).abs().max() > 0.1


def test_weights_of_the_unbiased_logit_normal_are_bounded_and_p_adds_up() -> None:
    p = logit_normal_probabilities(T, mean=-0.3, std=0.6)
    assert float(p.sum()) == pytest.approx(1)
    assert float((1 / (T * p)).max()) <= 10 + 1e-9
    assert int(p.argmax()) == pytest.approx(1000 * torch.tensor(-0.35).sigmoid(), abs=60)
    with pytest.raises(ValueError, match="uniform_share"):
        logit_normal_probabilities(T, uniform_share=1.5)
