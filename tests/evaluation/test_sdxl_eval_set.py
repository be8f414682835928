"""An evaluation gives SDXL's U-Net the conditioning that its images are sampled with."""

from pathlib import Path

import torch
from fakes_sdxl import stock_sdxl

from latentdiff.config.options import EvalModelOptions
from latentdiff.data.shapes import write_shapes
from latentdiff.evaluation.eval_set import open_eval_model
from latentdiff.evaluation.metrics.vlb import unet_model


def test_conditioning_is_that_of_stock_s_call_with_zeros_as_the_null_prompt(tmp_path: Path) -> None:
    stock = stock_sdxl()
    stock.save_pretrained(tmp_path / "model")
    write_shapes(tmp_path / "data", num_train=1, num_test=2, size_px=32)
    options = EvalModelOptions(data=str(tmp_path / "data"), batch_size=4, device="cpu")
    eval_model = open_eval_model(str(tmp_path / "model"), options)
    latents, t = eval_model.latents, torch.tensor([10, 700])
    with torch.no_grad():
        embeds, _, pooled, _ = stock.encode_prompt(list(latents.captions), device="cpu")
        for given, texts in (
            (latents.conditioning, (embeds, pooled)),
            (latents.null_conditioning, (embeds * 0, pooled * 0)),
        ):
            found = unet_model(eval_model.components.unet, given, num_outputs=4)(latents.z0, t)
            time_ids = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
            added = {"text_embeds": texts[1], "time_ids": time_ids}
            expected = stock.unet(latents.z0, t, texts[0], added_cond_kwargs=added).sample
            torch.testing.assert_close(found, expected)
