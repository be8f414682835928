"""The tab that shows training runs live: choose one, watch it, make images with its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from latentdiff.app.create_tab import CreateTab
from latentdiff.app.page_html import status_html
from latentdiff.app.run_view import fingerprint, run_html
from latentdiff.app.web_session import WebSession
from latentdiff.models.model_path import EXPORT

REFRESH_S = 2.0
NO_RUNS = (
    "No training runs here. Start the page with a run folder, or with --runs DIR for all that are "
    "in a folder; a run that begins later appears by itself."
)


class RunsTab:
    """The tab's components, connected to the runs of the session's library."""

    def __init__(self, session: WebSession, tabs: gr.Tabs, create: CreateTab) -> None:
        self.session, self.tabs, self.create = session, tabs, create

    def lay_out(self, tab: gr.Tab) -> None:
        """Lay out and connect the tab."""
        names = self._names()
        with gr.Row(elem_id="run-row"):
            self.run = gr.Dropdown(names, value=next(iter(names), None), label="Run", elem_id="run")
            self.use = gr.Button("Make images with its model", elem_id="use-run", size="sm")
        self.view = gr.HTML(status_html("Reading the run ..."), elem_id="run-view")
        self.seen, self.timer = gr.State(None), gr.Timer(REFRESH_S, active=False)
        shown = [self.run, self.view, self.seen]
        options: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        tab.select(lambda: gr.Timer(active=True), None, self.timer, **options)
        tab.select(self.refresh, [self.run, self.seen], shown, **options)
        self.timer.tick(self.refresh, [self.run, self.seen], shown, **options)
        self.run.input(lambda name: self.refresh(name, None), self.run, shown, **options)
        ui = self.create.ui
        model = ui.controls["model"]
        opened = self.use.click(self.use_model, self.run, [model, self.tabs, self.view], **options)
        opened.success(self.create.open_model, model, [*ui.of_model(), ui.status], **options)

    def stop_watching(self) -> Any:
        """Stop the timer, as another tab is looked at."""
        return gr.Timer(active=False)

    def refresh(self, name: str | None, seen: Any) -> dict[Any, Any]:
        """Show a run as it is now; nothing where nothing has changed."""
        runs = self.session.library.runs()
        name = name if name in runs else next(iter(runs), None)
        if name is None:
            return {self.view: status_html(NO_RUNS), self.seen: None}
        now = (name, *runs, *fingerprint(runs[name]))
        if seen is not None and tuple(seen) == now:
            return {self.seen: gr.skip()}
        html = run_html(runs[name], name)
        choices = gr.update(choices=list(runs), value=name)
        return {self.run: choices, self.view: html, self.seen: now}

    def use_model(self, name: str | None) -> dict[Any, Any]:
        """Choose a run's model and go to the tab that makes images."""
        folder = self.session.library.runs().get(name or "")
        models = self.session.library.models()
        for model, path in models.items():
            if folder is not None and Path(path) in (folder, folder / EXPORT):
                return {
                    self.create.ui.controls["model"]: gr.update(choices=list(models), value=model),
                    self.tabs: gr.Tabs(selected="create"),
                }
        raise gr.Error("This run has no model yet; it is written when the run ends", duration=8)

    def _names(self) -> list[str]:
        return list(self.session.library.runs())
