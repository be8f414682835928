"""HTML pages: every text is escaped and printable, Markup is kept, images are inlined."""

import base64
import io

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from latentdiff.html import figure, grid, inline_image, page, render_template, table

EVIL = "<b onload=x>&'\"\x1b"
SAFE = "&lt;b onload=x&gt;&amp;&#39;&#34;\\x1b"


def test_texts_are_escaped_and_control_characters_are_shown():
    assert render_template("{{ text }}", text=EVIL) == SAFE
    assert SAFE in figure(Markup("<i>"), label=EVIL, note=EVIL)
    assert (
        table([EVIL], [[EVIL]])
        == f"<table><tr><th>{SAFE}</th></tr><tr><td>{SAFE}</td></tr></table>"
    )
    assert f"<title>{SAFE}</title>" in page(EVIL, body=Markup("<p>x</p>"))


def test_markup_goes_into_tables_figures_and_grids_as_it_is():
    bold = Markup("<b>x</b>")
    assert "<td>2</td>" in table(["n"], [[2]])
    assert '<td class="n"><b>x</b></td><td>y</td>' in table(
        ["n", "m"], [[bold, "y"]], classes=("n", "")
    )
    shown = figure(bold, note="n")
    assert shown == (
        '<figure><b>x</b><figcaption><span class="soft">n</span></figcaption></figure>'
    )
    assert grid([shown, shown]) == f'<div class="grid">{shown}{shown}</div>'


def test_an_image_is_inlined_with_its_size():
    image = Image.new("RGB", (3, 2), (9, 8, 7))
    tag = inline_image(image, kind="plot")
    assert tag.startswith(
        '<img class="plot" alt="" width="3" height="2" src="data:image/png;base64,'
    )
    data = base64.b64decode(tag.split("base64,")[1].removesuffix('">'))
    assert list(Image.open(io.BytesIO(data)).getdata()) == [(9, 8, 7)] * 6
    assert "data:image/jpeg;base64," in inline_image(image, format="JPEG")


def test_a_page_forbids_scripts_and_has_its_style():
    text = page("t", body=Markup("<p>x</p>"), style="td.z > b { color: red }")
    assert "default-src 'none'" in text
    assert "td.z > b { color: red }" in text
    assert text.endswith("<body><p>x</p></body></html>")


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError):
        render_template("{{ absent }}")
