"""The page in a real browser: one server and one browser for all tests here."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes_app import (
    EXAMPLES,
    add_metrics_line,
    open_tiny,
    save_tiny_model,
    slow_unet,
    write_run,
)
from fakes_pipeline import SIZE, lora_weights
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("gradio", reason="the page needs the extra ui")

from latentdiff.app.web_ui import build_page, launch_options
from latentdiff.pipeline.png_metadata import read_settings

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright's client")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]
LOCAL = ("http://127.0.0.1:", "data:", "blob:")
UNNAMED = """() => [...document.querySelectorAll('button, input, textarea, select, img, a')]
  .filter(e => e.checkVisibility() && !e.closest('#painting, #start-image, #condition, #png'))
  .filter(e => !(e.labels?.length && e.labels[0].innerText.trim()) && !e.ariaLabel
    && !e.innerText.trim() && !e.title && !e.alt && !e.closest('button[aria-label]')
    && !e.closest('label, [role=radiogroup]')?.innerText.trim())
  .map(e => e.outerHTML.slice(0, 160))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A page that is served: its address, session and folders."""
    if CHROMIUM is None:
        pytest.skip("needs a Chromium browser")
    root = tmp_path_factory.mktemp("page")
    (root / "loras").mkdir()
    run = write_run(root / "runs" / "flowers", {10: 0.9, 20: 0.7})
    session = open_tiny(
        save_tiny_model(root / "tiny"), lora_dir=root / "loras", runs_dir=root / "runs"
    )
    page = build_page(session)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = launch_options(session) | {"server_name": "127.0.0.1", "server_port": port}
    page.launch(prevent_thread_lock=True, quiet=True, **options)
    yield SimpleNamespace(
        url=f"http://127.0.0.1:{port}", session=session, loras=root / "loras", run=run, root=root
    )
    page.close(verbose=False)


@pytest.fixture(scope="module")
def tab(server):
    """A browser's tab that reaches nothing but this machine."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(60_000)
        tab.elsewhere = []
        tab.on("request", lambda sent: tab.elsewhere.append(sent.url))
        yield tab
        browser.close()
        assert [url for url in tab.elsewhere if not url.startswith(LOCAL)] == []


@pytest.fixture
def page(server, tab):
    """The page, opened anew at a desktop's width."""
    tab.set_viewport_size({"width": 1280, "height": 1000})
    tab.goto(server.url)
    tab.wait_for_selector("#examples button")
    tab.fill("#num_inference_steps input[type=number]", "3")
    return tab


def field(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first


def generate(page, *, until="#status:has-text('1 image in')"):
    """Press Generate and wait for another image than the one that is shown."""
    shown = page.locator("#images a")
    before = shown.first.get_attribute("href") if shown.count() else None
    page.click("#generate")
    page.wait_for_function(
        "old => { const link = document.querySelector('#images a');"
        " return link && link.getAttribute('href') !== old }",
        arg=before,
    )
    page.wait_for_selector(until)


def shown_image(page, tmp_path):
    """Return the file that the link under the image gives, and its settings."""
    path = tmp_path / "shown.png"
    path.write_bytes(
        page.request.get(page.locator("#images a").first.evaluate("a => a.href")).body()
    )
    return np.asarray(Image.open(path)), read_settings(path)


def test_an_example_becomes_an_image_at_a_whole_multiple_of_its_pixels(page, tmp_path):
    assert "Hearts and apples at 32 px" in page.inner_text("#about")
    assert page.locator("#of-sdxl >> visible=true").count() == 0
    page.click(f"#examples button:has-text('{EXAMPLES[1]}')")
    page.wait_for_function(
        "text => document.querySelector('#prompt textarea').value === text", arg=EXAMPLES[1]
    )
    generate(page)
    image = page.locator("#images img").first
    width, height, look = image.evaluate(
        "i => { const box = i.getBoundingClientRect();"
        " return [box.width, box.height, getComputedStyle(i).imageRendering] }"
    )
    assert (width % SIZE, width, look) == (0, height, "pixelated")
    assert width > 8 * SIZE
    assert shown_image(page, tmp_path)[1]["call"]["prompt"] == EXAMPLES[1]


def test_use_again_puts_every_setting_back(page, tmp_path):
    for name, value in (("prompt", "a red heart"), ("negative", "a cat"), ("seed", "5")):
        field(page, name).fill(value)
    page.fill("#guidance_scale input[type=number]", "3.5")
    page.fill("#width input[type=number]", "40")
    page.keyboard.press("Tab")
    generate(page)
    first, settings = shown_image(page, tmp_path)
    assert settings["call"]["width"] == 40
    page.reload()
    page.wait_for_selector("#history button.thumbnail-item")
    field(page, "prompt").fill("blue sea")
    generate(page)
    page.click("#history button.thumbnail-item >> nth=1")
    page.wait_for_selector("#images figcaption:has-text('seed 5, 40 x 32')")
    page.click("#use-again")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red heart'")
    assert (field(page, "negative").input_value(), field(page, "seed").input_value()) == (
        "a cat",
        "5",
    )
    assert page.input_value("#guidance_scale input[type=number]") == "3.5"
    assert page.input_value("#num_inference_steps input[type=number]") == "3"
    generate(page)
    assert np.array_equal(shown_image(page, tmp_path)[0], first)


def test_stop_is_answered_and_a_preview_was_seen(page, server):
    field(page, "prompt").fill("a cat")
    page.fill("#num_inference_steps input[type=number]", "100")
    with slow_unet(server.session, 0.3):
        page.click("#generate")
        page.wait_for_selector("#images figcaption:has-text('preview')")
        page.wait_for_selector("#status [role=progressbar]")
        page.click("#stop")
        page.wait_for_selector("#status >> text=/Stopped at step \\d+ of 100/")
    page.click("#stop")
    page.wait_for_selector("#status:has-text('Nothing is running')")


def test_enter_generates_and_shift_enter_starts_a_line(page):
    prompt = field(page, "prompt")
    prompt.fill("a red")
    prompt.press("Shift+Enter")
    page.keyboard.type("heart")
    assert prompt.input_value() == "a red\nheart"
    assert page.inner_text("#status") == "Ready"
    prompt.press("Enter")
    page.wait_for_selector("#status:has-text('1 image in')")
    assert prompt.input_value() == "a red\nheart"


def test_four_images_are_in_sight_at_once(page):
    page.set_viewport_size({"width": 1280, "height": 900})
    field(page, "prompt").fill("a cat")
    page.fill("#num_images_per_prompt input[type=number]", "4")
    page.keyboard.press("Tab")
    page.click("#generate")
    page.wait_for_selector("#status:has-text('4 images in')")
    page.wait_for_selector("#images figure >> nth=3")
    page.evaluate("window.scrollTo(0, 0)")
    boxes = [one.bounding_box() for one in page.locator("#images figure").all()]
    assert all(box["y"] + box["height"] <= 900 for box in boxes)


def test_what_is_wrong_is_said_next_to_its_field_and_in_the_status(page):
    field(page, "prompt").fill("(red:99) <b>apple</b>")
    field(page, "seed").fill("<i>x</i>")
    page.click("#generate")
    page.wait_for_selector("#seed :text(\"got '<i>x</i>'\")")
    page.wait_for_selector("#prompt :text(\"weighs 'red' by 99\")")
    page.wait_for_selector("#status [role=alert]:has-text('Seed: expected a whole number')")
    assert "Traceback" not in page.inner_text("body")


def test_an_image_is_changed_and_a_painted_part_is_replaced(page, server, tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((160, 80), 60).convert("RGB").save(photo)
    field(page, "prompt").fill("a cat")
    page.click("role=tab[name='Image to image']")
    page.click("#generate")
    page.wait_for_selector("#start-image :text('upload an image')")
    page.set_input_files("#start-image input[type=file]", photo)
    page.wait_for_function("document.querySelector('#width input[type=number]').value === '44'")
    generate(page)
    assert shown_image(page, tmp_path)[1]["call"]["strength"] == 0.8
    page.click("#to-inpaint")
    page.wait_for_selector("#painting canvas >> visible=true")
    for _ in range(100):  # the editor says nowhere when it has the image
        page.wait_for_timeout(500)
        page.click("#generate")
        if page.locator("#painting :text('paint over the part')").count():
            break
    page.wait_for_selector("#painting :text('paint over the part')")
    page.locator("#painting").scroll_into_view_if_needed()
    box = page.locator("#painting canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=2)
    page.mouse.up()
    page.wait_for_timeout(300)
    generate(page)
    settings = shown_image(page, tmp_path)[1]
    assert {"image", "mask_image"} == set(settings["inputs"])
    assert settings["call"]["padding_mask_crop"] == 44  # all of it: other pixels are kept
    assert server.session.history.entries()[0].request.kind == "inpaint"


def test_a_lora_that_was_just_written_can_be_chosen(page, server):
    save_file(lora_weights(), server.loras / "ink.safetensors")
    field(page, "prompt").fill("a cat")
    page.click("#lora input")
    page.click("#lora ~ * li:has-text('ink'), li:has-text('ink')")
    page.fill("#lora_scale input[type=number]", "0.5")
    page.keyboard.press("Tab")
    generate(page)
    request = server.session.history.entries()[0].request
    assert (request.lora, request.lora_scale) == ("ink", 0.5)


def test_a_png_file_fills_its_settings_in(page, server):
    field(page, "prompt").fill("a yellow cat")
    field(page, "seed").fill("11")
    generate(page)
    file = server.session.history.entries()[0].path
    page.reload()
    page.click("#from-png button")
    page.set_input_files("#png input[type=file]", file)
    page.wait_for_selector("#png-note:has-text('Settings taken from the file')")
    assert (field(page, "prompt").input_value(), field(page, "seed").input_value()) == (
        "a yellow cat",
        "11",
    )


def test_two_models_are_set_next_to_each_other(page):
    page.click("role=tab[name='Few steps']")
    field(page, "few-prompt").fill("a cat")
    page.fill("#few-steps-0 input[type=number]", "3")
    page.fill("#few-steps-1 input[type=number]", "1")
    field(page, "few-guidance").fill("high")
    page.click("#compare")
    page.wait_for_selector("#few-status [role=alert]:has-text(\"got 'high'\")")
    field(page, "few-guidance").fill("3")
    page.click("#compare")
    page.wait_for_selector("#few-status:has-text('times as fast as tiny')")
    captions = page.locator("#few-images figcaption").all_inner_texts()
    assert [one.split(" passes")[0] for one in captions] == ["tiny: 3 steps, 6", "tiny: 1 step, 2"]


def test_a_wide_image_is_made_in_windows_and_used_again(page, tmp_path):
    longest = "most => document.querySelector('#width input[type=range]').max === most"
    width = "value => document.querySelector('#width input[type=number]').value === value"
    field(page, "prompt").fill("a cat")
    page.check("#windows input")
    page.wait_for_function(longest, arg=str(8 * SIZE))
    page.fill("#width input[type=number]", str(3 * SIZE))
    page.keyboard.press("Tab")
    page.wait_for_selector(f"#size-note:has-text('5 windows of {SIZE} px')")
    generate(page)
    assert shown_image(page, tmp_path)[1]["call"]["window_size"] == SIZE
    page.uncheck("#windows input")
    page.wait_for_function(longest, arg=str(2 * SIZE))
    page.wait_for_function(width, arg=str(2 * SIZE))
    page.click("#use-again")
    page.wait_for_function(width, arg=str(3 * SIZE))
    assert page.is_checked("#windows input")


def test_a_run_is_shown_and_grows_as_it_is_written(page, server):
    page.click("role=tab[name='Training runs']")
    page.wait_for_selector("#run-view:has-text('Stopped after step 20')")
    assert page.locator("#run-view svg").count() > 1
    assert page.locator("#run-view .slider img").count() == 1
    add_metrics_line(server.run, 30, 0.6)
    page.wait_for_selector("#run-view:has-text('Stopped after step 30')")
    page.click("#use-run")
    page.wait_for_selector("text=This run has no model yet")


def test_a_phone_s_width_needs_no_scrolling_sideways_and_names_every_control(page, tmp_path):
    page.set_viewport_size({"width": 390, "height": 844})
    for name in (
        "Image to image",
        "Inpaint",
        "Condition",
        "Text to image",
        "Few steps",
        "Training runs",
    ):
        page.click(f"role=tab[name='{name}']")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(UNNAMED) == []
    page.click("role=tab[name='Create']")
    for button in ("#generate", "#stop"):
        box = page.locator(button).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844
        assert box["height"] >= 36


def test_the_page_stays_on_this_machine_and_is_bounded(server):
    options = launch_options(server.session)
    assert (options["share"], options["max_file_size"]) == (False, "20mb")
    assert options["allowed_paths"] == [str(server.session.history.folder)]
    assert Path(options["allowed_paths"][0]).name.startswith("latentdiff-app-")
