"""Less memory, the same image: slicing, tiling, offloading, dtypes."""

import numpy as np
import pytest
import torch
from fakes_pipeline import tiny_pipeline
from PIL import Image

CALL = {"prompt": ["a cat", "a red heart"], "seed": 1, "num_inference_steps": 2}
CALL |= {"output_type": "np"}


@pytest.fixture(scope="module")
def expected():
    return tiny_pipeline()(**CALL).images


def test_slicing_gives_the_same_image(expected):
    pipe = tiny_pipeline()
    pipe.vae.enable_slicing()
    pipe.enable_attention_slicing()
    assert np.abs(pipe(**CALL).images - expected).max() <= 1 / 255


def test_tiling_gives_large_images(expected):
    pipe = tiny_pipeline()
    pipe.vae.enable_tiling()
    assert np.abs(pipe(**CALL).images - expected).max() <= 1 / 255
    large = pipe("a cat", height=80, width=64, num_inference_steps=1, output_type="np").images
    assert large.shape == (1, 80, 64, 3)
    assert np.isfinite(large).all()


def test_offloading_gives_the_same_image(expected):
    pipe = tiny_pipeline()
    photo = Image.effect_noise((32, 32), 60).convert("RGB")
    inpainting = CALL | {"image": photo, "mask_image": photo.convert("L")}
    painted = pipe(**inpainting).images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.abs(pipe(**CALL).images - expected).max() <= 1 / 255
    assert np.abs(pipe(**inpainting).images - painted).max() <= 1 / 255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype, expected):
    images = tiny_pipeline().to(dtype)(**CALL).images
    assert np.abs(images - expected).mean() < 0.02


def test_dtype_moves_there_and_back(expected):
    pipe = tiny_pipeline().to(torch.float64).to(torch.float32)
    assert pipe.dtype == torch.float32
    assert np.abs(pipe(**CALL).images - expected).max() <= 1 / 255


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_a_gpu(name, expected):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pipe = tiny_pipeline()
    getattr(pipe, name)()
    assert np.abs(pipe(**CALL).images - expected).max() <= 2 / 255
