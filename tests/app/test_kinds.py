"""The kinds of images, their tabs and the mask that is painted."""

from dataclasses import replace

import numpy as np
import pytest
from fakes_app import request_of
from PIL import Image

pytest.importorskip("gradio", reason="the page needs the extra ui")

from latentdiff.app.image_request import IMAGE, INPAINT
from latentdiff.app.kinds import KINDS, painted_mask, painting_of


def test_what_is_painted_over_is_the_mask():
    photo = Image.new("RGBA", (8, 4), "red")
    clear, stroke = Image.new("RGBA", (8, 4)), Image.new("RGBA", (8, 4))
    stroke.paste((0, 0, 0, 255), (0, 0, 2, 4))
    assert painted_mask(None) == (None, None)
    assert painted_mask({"background": None, "layers": [clear]}) == (None, None)
    assert painted_mask({"background": photo, "layers": [clear]}) == (photo, None)
    _, mask = painted_mask({"background": photo, "layers": [clear, stroke]})
    assert np.array_equal(np.asarray(mask) > 0, np.asarray(stroke)[..., 3] > 0)


@pytest.mark.parametrize("kind", [IMAGE, INPAINT])
def test_what_a_kind_fills_in_it_reads_back(session, kind):
    image, mask = Image.effect_noise((8, 4), 90).convert("RGB"), Image.new("L", (8, 4))
    mask.paste(255, (0, 0, 2, 4))
    fields = {"image": image, "strength": 0.4} | ({"mask_image": mask} if kind == INPAINT else {})
    request = request_of(kind=kind, **fields)
    found = KINDS[kind].read(KINDS[kind].fill(request))
    assert found["strength"] == 0.4
    call = replace(request, width=8, height=4, **found).arguments(session.facts)
    assert np.array_equal(np.asarray(call["image"].convert("RGB")), np.asarray(image))
    if kind == INPAINT:
        assert np.array_equal(np.asarray(call["mask_image"]), np.asarray(mask))


def test_a_small_image_is_enlarged_for_the_brush_and_a_large_one_is_not():
    assert painting_of(Image.new("RGB", (64, 48)), None)["background"].size == (512, 384)
    large = painting_of(Image.new("RGB", (600, 800)), None)
    assert large["background"].size == (600, 800)
    assert large["layers"][0].getextrema()[3] == (0, 0)
