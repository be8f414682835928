"""The chain against closed forms."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import (
    VARIANCE_TYPES,
    p_mean_variance,
    p_sample_loop,
    p_sample_steps,
    q_posterior_mean_variance,
    q_sample,
    randn_like,
    simple_loss,
    split_variance,
)
from latentdiff.diffusion.prediction import (
    DDPM_TYPES,
    check_objective,
    predict_eps,
    predict_x0,
    velocity,
)
from latentdiff.diffusion.schedules import (
    Schedule,
    make_betas,
    rescale_zero_terminal_snr,
    respace,
    space_timesteps,
)

T = 1000
TIMESTEPS = [0, 1, 2, 17, 500, 998, 999]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=dtype)


def _schedule(*, zero_snr: bool = False) -> Schedule:
    betas = make_betas("scaled_linear", T)
    return Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_snr else betas)


def test_respacing_keeps_the_marginals_and_composes() -> None:
    schedule = _schedule(zero_snr=True)
    kept = space_timesteps("100", T)
    short = respace(schedule, kept)
    torch.testing.assert_close(short.alphas_cumprod, schedule.alphas_cumprod[kept])
    shorter = respace(short, space_timesteps("10", 100))
    assert torch.equal(shorter.timesteps, kept[space_timesteps("10", 100)])
    whole = respace(schedule, torch.arange(T))
    torch.testing.assert_close(whole.posterior_variance, schedule.posterior_variance)


def test_steps_show_the_loop_and_may_start_half_way() -> None:
    schedule = Schedule.from_betas(make_betas("linear", 6, beta_end=0.5))
    seen: list[int] = []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return 0.3 * xt

    xt = _randn(2, 3)
    steps = list(
        p_sample_steps(
            schedule, model, xt, generator=_generator(1), prediction_type="epsilon", start=3
        )
    )
    assert seen == [step.t for step in steps] == [3, 2, 1, 0]
    by_hand = predict_x0(schedule, 0.3 * xt, xt, torch.full((2,), 3), prediction_type="epsilon")
    torch.testing.assert_close(steps[0].x0, by_hand)
    torch.testing.assert_close(steps[-1].sample, steps[-1].x0)
    whole = list(
        p_sample_steps(schedule, model, xt, generator=_generator(1), prediction_type="epsilon")
    )
    loop = p_sample_loop(schedule, model, xt, generator=_generator(1), prediction_type="epsilon")
    assert torch.equal(whole[-1].sample, loop)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_table_is_finite_float64(zero_snr: bool) -> None:
    schedule = _schedule(zero_snr=zero_snr)
    for field in dataclasses.fields(schedule):
        table = getattr(schedule, field.name)
        assert table.shape == (T,), field.name
        assert bool(table.isfinite().all()), field.name
        if field.name != "timesteps":
            assert table.dtype == torch.float64, field.name


def test_closed_form_is_the_chain_taken_step_by_step() -> None:
    """Compose q(x_t | x_{t-1}) = N(sqrt(1 - beta) x, beta) one step at a time (Eq. 2)."""
    schedule = _schedule()
    factor, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        factor, variance = (1 - beta) ** 0.5 * factor, (1 - beta) * variance + beta
        assert float(schedule.sqrt_alphas_cumprod[t]) == pytest.approx(factor, rel=1e-12)
        noise = float(schedule.sqrt_one_minus_alphas_cumprod[t])
        assert noise**2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_posterior_is_bayes_rule(t: int) -> None:
    """q(x_{t-1} | xt, x0) as the normalised product q(xt | x_{t-1}) q(x_{t-1} | x0)."""
    schedule = _schedule()
    x0 = torch.tensor([[0.7]], dtype=torch.float64)
    xt = torch.tensor([[-1.3]], dtype=torch.float64)
    mean, variance = q_posterior_mean_variance(schedule, x0, xt, torch.tensor([t]))
    beta, alpha = schedule.betas[t], schedule.alphas[t]
    previous = schedule.alphas_cumprod[t - 1]
    precision = alpha / beta + 1 / (1 - previous)
    by_hand = (alpha.sqrt() / beta * xt + previous.sqrt() / (1 - previous) * x0) / precision
    torch.testing.assert_close(mean, by_hand, rtol=1e-9, atol=0)
    torch.testing.assert_close(variance, (1 / precision).view(1, 1), rtol=1e-9, atol=0)


def test_posterior_at_the_first_step_is_the_data() -> None:
    x0 = _randn(3, 2, dtype=torch.float64)
    t = torch.zeros(3, dtype=torch.int64)
    mean, variance = q_posterior_mean_variance(_schedule(), x0, _randn(3, 2).double(), t)
    torch.testing.assert_close(mean, x0, rtol=1e-9, atol=1e-12)
    assert torch.equal(variance, torch.zeros(3, 1, dtype=torch.float64))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", DDPM_TYPES)
def test_predictions_convert_back_to_x0_and_eps(prediction_type: str, zero_snr: bool) -> None:
    schedule = _schedule(zero_snr=zero_snr)
    t = torch.tensor(TIMESTEPS)
    x0 = _randn(len(t), 4, 2, 2, seed=1, dtype=torch.float64)
    eps = _randn(len(t), 4, 2, 2, seed=2, dtype=torch.float64)
    xt = q_sample(schedule, x0, t, eps)
    output = {"epsilon": eps, "sample": x0, "v_prediction": velocity(schedule, x0, eps, t)}
    x0_back = predict_x0(schedule, output[prediction_type], xt, t, prediction_type=prediction_type)
    eps_back = predict_eps(
        schedule, output[prediction_type], xt, t, prediction_type=prediction_type
    )
    informed = slice(0, -1) if zero_snr and prediction_type == "epsilon" else slice(None)
    torch.testing.assert_close(x0_back[informed], x0[informed])
    torch.testing.assert_close(eps_back, eps)


def test_epsilon_with_zero_terminal_snr_is_refused_before_sampling() -> None:
    def never(xt: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    schedule = _schedule(zero_snr=True)
    with pytest.raises(ValueError, match="v_prediction"):
        check_objective(schedule, "epsilon")
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        p_sample_loop(
            schedule, never, _randn(1, 2), generator=_generator(), prediction_type="epsilon"
        )
    check_objective(schedule, "v_prediction")
    check_objective(schedule, "sample")
    check_objective(Schedule.from_betas(make_betas("cosine")), "epsilon")


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_wrong_number_of_output_channels_is_refused(variance_type: str) -> None:
    channels = 4 if variance_type == "learned_range" else 8
    with pytest.raises(ValueError, match=f"{channels} channels"):
        split_variance(_randn(1, channels), _randn(1, 4), variance_type=variance_type)


def test_unknown_names_and_bad_betas_are_refused() -> None:
    with pytest.raises(ValueError, match="v_prediction"):
        check_objective(_schedule(), "v")
    with pytest.raises(ValueError, match="fixed_small"):
        split_variance(_randn(1, 4), _randn(1, 4), variance_type="small")
    for betas in ([], [0.0, 0.5], [0.5, 1.1], [1.0, 0.5], [float("nan")], [[0.5]]):
        with pytest.raises(ValueError, match="betas"):
            Schedule.from_betas(torch.tensor(betas))


def test_learned_range_runs_between_the_two_fixed_variances() -> None:
    schedule, t = _schedule(), torch.tensor([5, 300])
    xt, prediction = _randn(2, 1, seed=1), _randn(2, 1, seed=2)

    def log_variance(v: float) -> Tensor:
        output = torch.cat([prediction, torch.full((2, 1), v)], 1)
        return p_mean_variance(
            schedule, output, xt, t, prediction_type="epsilon", variance_type="learned_range"
        ).log_variance

    small, large = schedule.log_variance_small[t, None], schedule.log_variance_large[t, None]
    torch.testing.assert_close(log_variance(-1).double(), small, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_variance(1).double(), large, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_variance(0).double(), (small + large) / 2, rtol=1e-6, atol=0)


def test_simple_loss_of_the_exact_and_of_the_zero_model() -> None:
    schedule = _schedule()
    x0, eps = _randn(64, 8, seed=1), _randn(64, 8, seed=2)
    t = torch.randint(0, T, (64,), generator=_generator(3))
    assert float(simple_loss(schedule, lambda xt, t: eps, x0, t, eps)) == 0
    zero = simple_loss(schedule, lambda xt, t: torch.zeros_like(xt), x0, t, eps)
    torch.testing.assert_close(zero, eps.square().mean())


def test_the_model_gets_the_schedules_own_timesteps() -> None:
    seen: list[int] = []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return torch.zeros_like(xt)

    schedule = Schedule.from_betas(torch.tensor([0.1, 0.2]), timesteps=torch.tensor([3, 999]))
    p_sample_loop(schedule, model, _randn(1, 2), generator=_generator(), prediction_type="epsilon")
    assert seen == [999, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_coefficients_follow_the_sample_but_are_never_narrower_than_float32(
    dtype: torch.dtype,
) -> None:
    schedule, t = _schedule(), torch.tensor([0, 999])
    xt, output = _randn(2, 4, seed=1).to(dtype), _randn(2, 4, seed=2).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert q_sample(schedule, xt, t, output).dtype == wide
    for prediction_type in DDPM_TYPES:
        reverse = p_mean_variance(schedule, output, xt, t, prediction_type=prediction_type)
        assert {x.dtype for x in reverse} == {wide}
        eps = predict_eps(schedule, output, xt, t, prediction_type=prediction_type)
        assert eps.dtype == wide
    assert randn_like(xt, generator=_generator()).dtype == wide


def test_moving_a_schedule_changes_device_and_dtype_but_not_timesteps() -> None:
    schedule = _schedule()
    moved = schedule.to("cpu", dtype=torch.float32)
    assert moved.betas.dtype == torch.float32
    assert moved.timesteps.dtype == torch.int64
    torch.testing.assert_close(moved.alphas_cumprod.double(), schedule.alphas_cumprod)
    assert schedule.to("meta").betas.dtype == torch.float64
    assert schedule.to("meta").timesteps.device.type == "meta"


def test_no_float64_is_sent_to_a_device_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.dtype] = []
    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "mps" in map(str, [*args, *kwargs.values()]):
            sent.append(self.dtype)
            return self
        return move(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    schedule = _schedule().to("mps")
    assert sorted(map(str, set(sent))) == ["torch.float32", "torch.int64"]
    assert schedule.betas.dtype == torch.float32


def test_a_timestep_outside_the_chain_is_an_error() -> None:
    x = _randn(1, 2)
    for t in (-1, T):
        with pytest.raises((IndexError, RuntimeError)):
            q_sample(_schedule(), x, torch.tensor([t]), x)


def test_each_samples_generator_is_its_own() -> None:
    schedule = Schedule.from_betas(make_betas("linear", 10, beta_end=0.3))

    def model(xt: Tensor, t: Tensor) -> Tensor:
        return 0.5 * xt

    def sample(seeds: list[int]) -> Tensor:
        start = torch.cat([_randn(1, 3, seed=s) for s in seeds])
        generators = [_generator(s + 100) for s in seeds]
        return p_sample_loop(
            schedule, model, start, generator=generators, prediction_type="epsilon"
        )

    together = sample([1, 2, 3])
    torch.testing.assert_close(together[1:2], sample([2]), rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])
    with pytest.raises(ValueError, match="2 generators for 3"):
        randn_like(_randn(3, 2), generator=[_generator(), _generator()])


@pytest.mark.parametrize("prediction_type", DDPM_TYPES)
def test_ancestral_samples_of_gaussian_data_have_its_moments(prediction_type: str) -> None:
    """Data N(0.6, 0.5^2): with the exact denoiser the chain gives it back, at 4 sigma."""
    m, s, n = 0.6, 0.5, 20_000
    schedule = Schedule.from_betas(make_betas("linear", 100, beta_start=1e-3, beta_end=0.15))

    def model(xt: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t, None]
        gain = abar.sqrt() * s**2 / (abar * s**2 + 1 - abar)
        x0 = m + gain * (xt - abar.sqrt() * m)
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
        return {"epsilon": eps, "sample": x0, "v_prediction": v}[prediction_type]

    xt = _randn(n, 1, seed=1, dtype=torch.float64)
    x0 = p_sample_loop(
        schedule,
        model,
        xt,
        generator=_generator(2),
        prediction_type=prediction_type,
        variance_type="fixed_large",
    )
    assert abs(float(x0.mean()) - m) < 4 * s / n**0.5
    # beta_t is not quite the true reverse variance, and the last step adds no noise: 2 % of slack
    assert abs(float(x0.std()) - s) < 4 * s / (2 * n) ** 0.5 + 0.02 * s
