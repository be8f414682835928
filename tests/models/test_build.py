"""Fresh components and the scheduler of an export."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from fakes_models import make_text_encoder, make_unet, make_vae

from latentdiff.diffusion.schedules import Schedule, make_betas, rescale_zero_terminal_snr
from latentdiff.models.build import build_text_encoder, build_unet, make_ddpm_scheduler, schedule_of
from latentdiff.models.weights import weights_hash


def test_unet_attends_where_stable_diffusions_does() -> None:
    unet = build_unet(
        sample_size=8, in_channels=4, block_out_channels=(8, 8, 16, 16), cross_attention_dim=12,
        layers_per_block=1, head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    kinds = [type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks)]
    cross, plain = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
    assert kinds == [*cross, "DownBlock2D", "UpBlock2D", *plain]
    attention = unet.down_blocks[2].attentions[0].transformer_blocks[0].attn1
    assert (attention.heads, attention.to_q.in_features) == (4, 16)
    assert unet(torch.randn(1, 4, 8, 8), 0, torch.randn(1, 3, 12)).sample.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 6}, "multiples of head_dim, which is 6"),
        ({"norm_num_groups": 5}, "multiples of norm_num_groups"),
        ({"attention_levels": (True,)}, "attention_levels has 1"),
    ],
)
def test_unets_that_cannot_be_built_are_refused(changes: dict[str, object], message: str) -> None:
    settings = {
        "sample_size": 8, "in_channels": 4, "block_out_channels": (8, 16),
        "cross_attention_dim": 16, "head_dim": 8, "norm_num_groups": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        build_unet(**settings | changes)


def test_text_encoder_takes_vocabulary_and_length_from_the_tokenizer(tokenizer) -> None:
    encoder = build_text_encoder(tokenizer, width=16, num_layers=1, num_heads=2)
    assert encoder.config.vocab_size == len(tokenizer)
    assert encoder.config.max_position_embeddings == tokenizer.model_max_length
    assert encoder.config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="multiple of num_heads"):
        build_text_encoder(tokenizer, width=16, num_layers=1, num_heads=3)


def test_building_is_a_function_of_the_seed(tokenizer) -> None:
    def build() -> list[str]:
        torch.manual_seed(3)
        return [weights_hash(m) for m in (make_unet(), make_vae(), make_text_encoder(tokenizer))]

    assert build() == build()


# --- schedulers ---


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_scheduler_of_an_export_has_our_schedule(name: str, zero_terminal_snr: bool) -> None:
    kind = "v_prediction" if zero_terminal_snr else "epsilon"
    scheduler = make_ddpm_scheduler(
        beta_schedule=name, prediction_type=kind, zero_terminal_snr=zero_terminal_snr
    )
    betas = make_betas(name)
    betas = rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas
    expected = Schedule.from_betas(betas).alphas_cumprod
    torch.testing.assert_close(schedule_of(scheduler).alphas_cumprod, expected, atol=1e-5, rtol=0)
    assert scheduler.config.steps_offset == 1
    assert not scheduler.config.clip_sample
    assert not scheduler.config.set_alpha_to_one
    assert scheduler.config.timestep_spacing == ("trailing" if zero_terminal_snr else "leading")
    again = DDIMScheduler.from_config(scheduler.config)
    assert torch.equal(again.betas, scheduler.betas)


def test_zero_terminal_snr_with_epsilon_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        make_ddpm_scheduler(prediction_type="epsilon", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="prediction_type"):
        make_ddpm_scheduler(prediction_type="noise")
    with pytest.raises(ValueError, match="schedule"):
        make_ddpm_scheduler(beta_schedule="straight")


def test_schedule_of_a_scheduler_has_its_tables_and_others_are_refused() -> None:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)
    schedule = schedule_of(scheduler)
    assert schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        schedule_of(diffusers.FlowMatchEulerDiscreteScheduler())
