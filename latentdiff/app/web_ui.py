"""The web UI: a page that makes images and shows training runs, served on this machine.

Needs gradio (the extra `ui`). Served on 127.0.0.1 by default, never shared; sizes, queue and
uploads are bounded. The page fetches nothing from elsewhere.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from latentdiff.app.create_layout import lay_out
from latentdiff.app.create_tab import CreateTab
from latentdiff.app.few_steps.tab import FewStepsTab
from latentdiff.app.library import Library
from latentdiff.app.page_html import facts_html
from latentdiff.app.page_style import ENTER_GENERATES, STYLE, make_theme
from latentdiff.app.run_view import STYLE as RUN_STYLE
from latentdiff.app.runs_tab import RunsTab
from latentdiff.app.web_session import WebSession
from latentdiff.config.options import WebUIOptions
from latentdiff.models.components import load_vae

MAX_UPLOAD = "20mb"
CACHE_S = (3600, 24 * 3600)  # uploads: how often is looked, how old are deleted; all at the end


def serve(
    models: Sequence[str], options: WebUIOptions, *, on_ready: Callable[[str], object]
) -> None:
    """Open the first model, and serve the page until interrupted. on_ready: gets its address."""
    session = open_session(models, options)
    page = build_page(session)
    where: dict[str, Any] = {"server_name": options.host}
    where["server_port"] = options.port or _free_port()  # gradio cannot take 0
    page.launch(**where, **launch_options(session), quiet=True, prevent_thread_lock=True)
    on_ready(str(page.local_url))
    page.block_thread()


def _free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def open_session(models: Sequence[str], options: WebUIOptions) -> WebSession:
    """Return a session with the first model open; FileNotFoundError or ValueError for a bad one."""
    runs, loras = (path and Path(path).expanduser() for path in (options.runs, options.lora_dir))
    small, nets = options.preview_vae, options.controlnet or ()
    session = WebSession(
        Library(
            tuple(models),
            runs_dir=runs or None,
            lora_dir=loras or None,
            given_controlnets=[nets] if isinstance(nets, str) else nets,
        ),
        preview_vae=None if small is None else load_vae(small),
        max_px=options.max_side_px,
        device=options.device,
        dtype=options.dtype,
        safety_checker=options.safety_checker,
    )
    session.open(next(iter(session.library.models())))
    return session


def launch_options(session: WebSession) -> dict[str, Any]:
    """Return how gradio serves the page: to nobody else, with its own looks, without telemetry."""
    return {
        "share": False,
        "max_file_size": MAX_UPLOAD,
        "footer_links": [],
        "theme": make_theme(),
        # gradio rewrites the selectors of its "css"
        "head": f"<style>{STYLE}{RUN_STYLE}</style><script>{ENTER_GENERATES}</script>",
        "allowed_paths": [str(session.history.folder)],
        "enable_monitoring": False,
        "ssr_mode": False,
    }


def build_page(session: WebSession) -> gr.Blocks:
    """Return the page: which model, and a tab a thing to do.

    A new kind of image is an entry of kinds.py; another thing to do is a tab here, in a module of
    its own.
    """
    facts = session.facts
    names, name = list(session.library.models()), facts.name if facts else None
    with gr.Blocks(title="LatentDiff", analytics_enabled=False, delete_cache=CACHE_S) as page:
        with gr.Row(elem_id="head"):
            gr.HTML("<h1>LatentDiff</h1>")
            model = gr.Dropdown(names, value=name, label="Model", elem_id="model")
        about = gr.HTML(facts_html(facts) if facts else "", elem_id="about")
        with gr.Tabs(elem_id="tabs", selected="create") as tabs:
            with gr.Tab("Create", id="create") as create_tab:
                ui = lay_out(model, about)
                create = CreateTab(session, page, ui)
            with gr.Tab("Few steps", id="few-steps", elem_id="few-steps") as few_steps_tab:
                FewStepsTab(session).lay_out(few_steps_tab)
            with gr.Tab("Training runs", id="runs", elem_id="runs") as runs_tab:
                runs = RunsTab(session, tabs, create)
                runs.lay_out(runs_tab)
        for tab in (create_tab, few_steps_tab):
            tab.select(runs.stop_watching, None, runs.timer, show_progress="hidden")
    return page
