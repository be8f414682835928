"""The kinds of images, their tabs and the mask that is painted."""

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
def test_what_a_kind_fills_in_it_reads_back(kind):
    image, mask = Image.new("RGB", (8, 4), "red"), Image.new("L", (8, 4))
    mask.paste(255, (0, 0, 2, 4))
    fields = {"image": image, "strength": 0.4} | ({"mask_image": mask} if kind == INPAINT else {})
    request = request_of(kind=kind, **fields)
    found = KINDS[kind].read(KINDS[kind].fill(request))
    assert found["strength"] == 0.4
    assert np.array_equal(np.asarray(found["image"].convert("RGB")), np.asarray(image))
    if kind == INPAINT:
        assert painting_of(image, None)["layers"][0].getextrema()[3] == (0, 0)
        assert np.array_equal(np.asarray(found["mask_image"]), np.asarray(mask))
