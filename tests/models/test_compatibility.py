"""Whether components fit together, by their configs."""

from pathlib import Path

import pytest
from fakes_models import make_unet
from transformers import CLIPTokenizer

from latentdiff.models.compatibility import check_compatible, read_configs, size_in_reach
from latentdiff.models.components import Components


def test_fitting_configs_pass_and_image_sizes_are_multiples_of_both_factors(
    sd_folder: Path,
) -> None:
    configs = read_configs(sd_folder)
    check_compatible(configs)
    check_compatible(configs, image_size=32)
    check_compatible(configs, image_size=(24, 40))
    for wrong in (36, 0, -8, (32, 20)):
        with pytest.raises(ValueError, match=r"multiples of 8 .VAE factor 4 x U-Net factor 2"):
            check_compatible(configs, image_size=wrong)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "unet",
            {"in_channels": 6},
            "takes 6 channels .*latents have 4, expected 4, .*9 for inpain",
        ),
        ("unet", {"out_channels": 3}, "gives 3 channels .*8 with learned variance"),
        ("unet", {"cross_attention_dim": [16, 24]}, "width 16, 24"),
        ("unet", {"encoder_hid_dim": 20}, "width 20 .*hidden_size. is 16"),
        ("vae", {"shift_factor": 0.1}, "shift_factor is 0.1 .*fold_normalisation"),
        ("tokenizer", {"model_max_length": 77}, "model_max_length is 77 .*16 positions"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    sd_folder: Path, name: str, changes: dict[str, object], message: str
) -> None:
    configs = read_configs(sd_folder)
    configs[name] |= changes
    with pytest.raises(ValueError, match=message):
        check_compatible(configs)


def test_incomplete_configs_are_named(sd_folder: Path) -> None:
    configs = read_configs(sd_folder)
    del configs["unet"]["cross_attention_dim"]
    with pytest.raises(ValueError, match="config of the unet has no cross_attention_dim"):
        check_compatible(configs)


@pytest.mark.parametrize("changes", [{"in_channels": 9}, {"out_channels": 8}])
def test_inpainting_and_learned_variance_fit(sd_folder: Path, changes: dict[str, object]) -> None:
    configs = read_configs(sd_folder)
    configs["unet"] |= changes
    check_compatible(configs)


def test_components_refuse_parts_that_do_not_fit(components: Components) -> None:
    with pytest.raises(ValueError, match="cross_attention_dim"):
        Components(**components.as_dict() | {"unet": make_unet(cross_attention_dim=24)})
    more = CLIPTokenizer(
        vocab={str(index): index for index in range(700)}, merges=[], model_max_length=16
    )
    with pytest.raises(ValueError, match=r"tokenizer has 70\d tokens .* vocab_size is 572"):
        Components(**components.as_dict() | {"tokenizer": more})


def test_size_in_reach_keeps_the_shape_and_the_trained_area() -> None:
    def at_512(height: int, width: int) -> tuple[int, int] | None:
        return size_in_reach(height, width, trained=(512, 512), multiple=64)

    assert at_512(512, 512) is at_512(640, 768) is at_512(64, 64) is None
    assert at_512(1024, 1024) == (512, 512)
    assert at_512(1536, 768) == (704, 384)
    assert at_512(4096, 64) is None  # no more pixels than it was trained at
    assert size_in_reach(512, 512, trained=(64, 64), multiple=16) == (64, 64)
    assert size_in_reach(4096, 16, trained=(64, 64), multiple=16) == (1024, 16)
