"""The guidance embedding: added without effect, read as diffusers reads it, folded exactly."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from fakes_pipeline import tiny_pipeline
from torch import Tensor

from latentdiff.models.unet.guidance_embedding import (
    add_guidance_embedding,
    fold_guidance,
    guidance_features,
    has_guidance_embedding,
)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_pipeline().unet.float().eval()


def predict(unet: UNet2DConditionModel, scale: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    x = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    features = None if scale is None else guidance_features(unet, scale, num=2)
    with torch.no_grad():
        output: Tensor = unet(x, torch.tensor([999, 20]), text, timestep_cond=features).sample
    return output


def trained(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net whose guidance embedding is not zero any more."""
    student = add_guidance_embedding(unet).eval()
    generator = torch.Generator().manual_seed(1)
    weight = student.time_embedding.cond_proj.weight
    weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return student


def test_a_new_embedding_changes_nothing(unet: UNet2DConditionModel) -> None:
    student = add_guidance_embedding(unet).eval()
    assert has_guidance_embedding(student)
    assert not has_guidance_embedding(unet)
    assert torch.equal(predict(student, scale=5.0), predict(unet))


def test_a_copy_keeps_an_embedding_that_is_there(unet: UNet2DConditionModel) -> None:
    student = trained(unet)
    again = add_guidance_embedding(student).eval()
    assert torch.equal(predict(again, scale=3.0), predict(student, scale=3.0))
    assert not torch.equal(predict(again, scale=3.0), predict(again, scale=4.0))


def test_the_features_are_those_of_diffusers_pipelines(unet: UNet2DConditionModel) -> None:
    student = trained(unet)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None,  # type: ignore[arg-type]  # it reads nothing of the pipeline
        torch.tensor([2.0, 6.5]),
        embedding_dim=256,
    )
    ours = guidance_features(student, torch.tensor([3.0, 7.5]), num=2)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # sines of up to 6,500


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0])
def test_folding_fixes_one_scale_exactly(unet: UNet2DConditionModel, scale: float) -> None:
    student = trained(unet)
    folded = fold_guidance(student, scale).eval()
    assert not has_guidance_embedding(folded)
    torch.testing.assert_close(predict(folded), predict(student, scale=scale), atol=2e-6, rtol=1e-5)
    assert (predict(folded) - predict(student, scale=scale + 2)).abs().max() > 1e-4


def test_a_plain_unet_has_no_features(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="time_cond_proj_dim is null"):
        guidance_features(unet, 3.0, num=1)
