"""The page's style sheet and theme: system fonts, nothing fetched, one column on a phone.

Images are shown at whole multiples of their pixels: --w is an image's width, --n how many there
are, and `round` cuts the column's width to a multiple. Where an image is wider than its column it
is shrunk.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

STYLE = """
.gradio-container .main.app { max-width: 1240px; padding: 8px 20px; margin: 0 auto }
#head { align-items: end; gap: 12px }
#head h1 { font-size: 1.35rem; margin: 0 }
.facts p { margin: 0 0 4px }
.facts dl { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; font-size: .85rem }
.facts div { display: flex; gap: 6px } .facts dt { opacity: .7 } .facts dd { margin: 0 }

#create { display: grid; gap: 16px 24px; align-items: start;
  grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); grid-template-rows: auto 1fr;
  grid-template-areas: "ask result" "settings result" }
#ask { grid-area: ask } #result { grid-area: result } #settings { grid-area: settings }
#create > .column { min-width: 0 !important }

.status { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; min-height: 2rem;
  overflow-wrap: anywhere }
.bar { flex: 1 1 120px; height: 8px; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary) }
.bar i { display: block; height: 100%; background: var(--button-primary-background-fill) }
.status.error { border-left: 4px solid #c62828; padding: 6px 10px;
  background: color-mix(in srgb, #c62828 10%, transparent) }
.note { margin: 0; font-size: .85rem; overflow-wrap: anywhere }
.note.warning { border-left: 4px solid #b26a00; padding: 4px 10px;
  background: color-mix(in srgb, #b26a00 10%, transparent) }

.images { container-type: inline-size; display: flex; flex-wrap: wrap; gap: 12px;
  justify-content: center; background: var(--background-fill-secondary); padding: 12px 0;
  border-radius: 6px; --columns: min(var(--n, 1), 2) }
.images figure { margin: 0;
  --room: calc((100cqi - 12px * (var(--columns) - 1)) / var(--columns));
  --most: min(var(--room), 576px);
  width: max(round(down, var(--most), var(--w)), min(var(--w), var(--room))) }
.images:has(figure:nth-child(3)) figure { --most: min(var(--room), max(128px, 45dvh - 150px)) }
.images img { display: block; width: 100%; height: auto }
.images img.pixels { image-rendering: pixelated }
.images figcaption { font-size: .8rem; padding-top: 4px; opacity: .85 }
.images.empty { min-height: 280px; align-items: center } .images.empty p { opacity: .6 }
#model input, #scheduler input, #lora input { text-overflow: ellipsis; padding-right: 1.5rem }
#swap, #refresh, #use-run, #take-edges { width: fit-content; min-width: 0; align-self: end }
#size-note:not(:has(.note)), #png-note:not(:has(.note)) { display: none }
#kind-text { padding: 0 }
#history .grid-wrap { max-height: 320px; min-height: 0; height: auto; overflow-y: auto }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)) !important;
  height: auto; gap: 6px; padding-top: 26px }
#history .gallery-item { height: auto; align-self: start }
#history .thumbnail-item.selected { --ring-color: transparent; border-color: transparent }
#history .thumbnail-item { width: auto; height: auto; aspect-ratio: 1 }


@media (max-width: 768px) {
  #create { grid-template-columns: minmax(0, 1fr); grid-template-areas: "ask" "result" "settings";
    grid-template-rows: auto }
  #go { position: fixed; bottom: 0; left: 0; right: 0; z-index: 50; padding: 8px 12px;
    flex-wrap: nowrap; background: var(--background-fill-primary);
    border-top: 1px solid var(--border-color-primary) }
  .gradio-container .main.app { padding: 8px 12px 72px }
  .images.empty { min-height: 120px }
  #kinds button { padding: 4px 8px }
  #settings input[type="number"] { width: 56px }
  #settings .reset-button { display: none }
  #head { flex-direction: column; align-items: stretch; gap: 4px }
}
"""

# Before gradio's own handler, which generates on Shift + Enter where a field has several lines.
ENTER_GENERATES = """
for (const kind of ["keydown", "keypress"]) document.addEventListener(kind, event => {
  if (event.key !== "Enter" || event.isComposing || !event.target.closest("#prompt, #negative"))
    return
  event.stopPropagation()
  if (event.shiftKey) return
  event.preventDefault()
  if (kind === "keydown") document.querySelector("#generate").click()
}, true)
"""


def make_theme() -> Any:
    """Return gradio's plain theme with the fonts of the system."""
    fonts: list[Any] = ["system-ui", "sans-serif"]
    return gr.themes.Default(
        primary_hue="indigo",
        font=fonts,
        font_mono=["ui-monospace", "monospace"],
        spacing_size="sm",
        radius_size="sm",
    )
