"""Previews are cheap, and the linear map stands in for the VAE."""

import numpy as np
import torch
from fakes_pipeline import tiny_vae

from latentdiff.app import live_preview
from latentdiff.app.live_preview import LivePreview, fit_linear_map, linear_images
from latentdiff.image_grid import to_pil


def test_a_linear_decoder_is_recovered():
    torch.manual_seed(0)
    z0, weight = torch.randn(2, 4, 6, 5), 0.05 * torch.randn(3, 4)
    pixels = torch.einsum("rc,bchw->brhw", weight, z0) + 0.1
    images = [to_pil(one) for one in pixels]
    found = fit_linear_map(z0, images)
    shown = linear_images(z0, found)
    assert [one.size for one in shown] == [(5, 6)] * 2
    for one, image in zip(shown, images, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(image)).max() <= 2


def test_the_vae_decodes_while_that_is_a_small_part_of_the_time(monkeypatch):
    now, decoded = [0.0], []
    monkeypatch.setattr(live_preview.time, "perf_counter", lambda: now[0])

    def decode(vae, z0):
        now[0] += 0.3
        decoded.append(now[0])
        return [to_pil(torch.zeros(3, 16, 16))]

    monkeypatch.setattr(live_preview, "preview_images", decode)
    preview, z0 = LivePreview(tiny_vae(), _started=0.0), torch.randn(1, 4, 8, 8)
    shown = []
    for _ in range(100):
        now[0] += 0.1
        images = preview.images(z0)
        shown.append(images and images[0].size)
    assert len(decoded) * 0.3 <= 0.15 * now[0] + 0.3
    assert {(16, 16), (8, 8), None} == set(shown)
