"""The page of the demo in Gradio: settings, both images, live curves, the tokens held and the head map.

It shows what `generation.py` yields. What a visitor wrote, and messages that quote it, are shown in text fields, never
as HTML or Markdown. The page loads nothing from other hosts.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image
from starlette.middleware import Middleware

from ssd_cache.app.drawing import HEADS
from ssd_cache.app.generation import FULL, Frame, generate_side_by_side
from ssd_cache.app.history import POLICY, History
from ssd_cache.app.limits import Limits, Run, SmallBodies
from ssd_cache.app.models import DemoModel
from ssd_cache.app.request import check_request
from ssd_cache.head_map.card import plot_labels
from ssd_cache.io.showing import printable

INTRODUCTION = """# ssd-cache
One prompt and one seed, two KV caches. Left: K and V of every token. Right: a policy that keeps a budget of the visual
tokens in every head. The two images are generated in turn, a row each.
"""
EXPLANATION = "The brighter a place, the more heads hold its token after this row. Black: no head does."
SHARE, CACHE, MEMORY, SPEED = "% of the image", "cache", "MB of K and V", "tokens/s"
FONT = ["system-ui", "sans-serif"]  # Gradio's own fonts come from another host

MAX_SESSIONS = 100
"""Visitors whose last run stays in memory."""

KEPT_SECONDS = 600
"""Time that files of images stay on the disk, and the last run of a visitor in memory."""


class Page:
    """The page, `blocks`, and its handlers. One pair of images is generated at a time."""

    def __init__(self, models: Mapping[str, DemoModel], limits: Limits):
        self.models, self.limits = dict(models), limits
        self.runs: dict[str | None, Run] = {}
        name, first = next(iter(self.models.items()))
        narrow: dict[str, Any] = {"min_width": 140}  # two fit side by side on a phone
        with gr.Blocks(title="ssd-cache", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as self.blocks:
            gr.Markdown(INTRODUCTION)
            self.history = gr.State(time_to_live=KEPT_SECONDS)
            self.prompt = gr.Textbox(first.example, label="Prompt", lines=2, max_length=limits.prompt_characters)
            with gr.Row():
                self.model = gr.Dropdown(list(self.models), value=name, label="Model", **narrow)
                self.policy = gr.Dropdown(list(first.policies), label="Policy", **narrow)
                self.budget = gr.Slider(0.05, 1, 0.2, step=0.05, label="Budget", **narrow)
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, **narrow)
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", **narrow)
                stop = gr.Button("Stop", **narrow)
            self.status = gr.Textbox(label="Status", interactive=False, lines=4, max_lines=6, elem_id="status")
            with gr.Row():
                self.left = _image(FULL, elem_id="left", **narrow)
                self.right = _image(POLICY, elem_id="right", **narrow)
            with gr.Row():
                self.memory, self.speed = _plot(MEMORY, "memory"), _plot(SPEED, "speed")
            with gr.Row():
                with gr.Column(min_width=280):
                    self.held = _image("tokens held", elem_id="held")
                    gr.Markdown(EXPLANATION)
                    self.row = gr.Slider(1, first.head_map.grid[0], 1, step=1, label="After row")
                    self.heads = gr.Radio(list(HEADS), value=HEADS[0], show_label=False)
                with gr.Column(min_width=280):
                    labels = _in_own_file(plot_labels(first.head_map))
                    self.head_map = _image("head map", labels, show_label=False, elem_id="head_map")
            self._connect(generate, stop)

    def _connect(self, generate: gr.Button, stop: gr.Button) -> None:
        light: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        shown = [self.left, self.right, self.memory, self.speed, self.held, self.row, self.head_map]
        running = gr.on(
            [generate.click, self.prompt.submit],
            self.generate,
            [self.model, self.prompt, self.policy, self.budget, self.seed, self.heads],
            [self.status, self.history, *shown],
            concurrency_limit=1,
            trigger_mode="once",
            show_progress_on=self.status,
            api_visibility="private",
        )
        stopped = stop.click(self.leave, None, None, cancels=[running], **light)
        stopped.then(lambda: "stopped", None, self.status, **light)  # after frames that were under way
        self.blocks.unload(self.leave)
        chosen = [self.history, self.row, self.heads]
        gr.on([self.row.input, self.heads.input], self.show_held, chosen, self.held, **light)
        settings = [self.prompt, self.policy, self.row, self.head_map]
        self.model.input(self.choose_model, self.model, settings, **light)

    def generate(
        self, model: str, prompt: str, policy: str, budget: float, seed: int, heads: str, visitor: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """Generate both images, and yield what changes on the page after every row."""
        chosen = self.models[model]
        run = self.runs[visitor.session_hash] = Run(self.limits.seconds)
        try:
            settings = {"prompt": prompt, "policy": policy, "budget": budget, "seed": seed}
            request = check_request(chosen, self.limits, **settings)
            history = History(chosen.head_map.grid)
            yield {
                self.status: "",
                self.history: history,
                self.right: gr.Image(label=f"{request.policy}, {request.budget:.0%}"),
                self.head_map: _in_own_file(plot_labels(request.make_cache().head_map)),
            }
            for frame in generate_side_by_side(request, lambda: run.stop_reason is not None):
                history.add(frame)
                reason = "" if run.stop_reason is None else f"{run.stop_reason}; "
                words = "\n".join([reason + history.progress(), *request.notes])
                yield {self.status: words, **self._changed(history, frame, heads)}
        except (ValueError, torch.OutOfMemoryError) as error:
            yield {self.status: printable(str(error))}
        finally:
            if self.runs.get(visitor.session_hash) is run:
                del self.runs[visitor.session_hash]

    def _changed(self, history: History, frame: Frame, heads: str) -> dict[Any, Any]:
        """What the newest frame changes on the page, in addition to the status."""
        table = pd.DataFrame(history.points, columns=[SHARE, CACHE, MEMORY, SPEED])
        changed: dict[Any, Any] = {self.left if frame.name == FULL else self.right: _in_own_file(frame.image)}
        for plot, points in ((self.memory, table), (self.speed, table.dropna())):
            if points[CACHE].nunique() == 2:  # Gradio draws only the curves that were in the first table
                changed[plot] = points
        if frame.held is not None:
            row = min(len(history.held), history.grid[0])
            changed |= {self.held: _in_own_file(history.draw_held(row, heads)), self.row: row}
        return changed

    def leave(self, visitor: gr.Request) -> None:
        """Stop the visitor's run at its next token, if there is one; Gradio drops a run that waits."""
        run = self.runs.get(visitor.session_hash)
        if run is not None:
            run.stop()

    def show_held(self, history: History | None, row: float, heads: str) -> Image.Image | None:
        """The tokens held after another row, or by other heads."""
        return None if history is None else _in_own_file(history.draw_held(row, heads))

    def choose_model(self, name: str) -> list[Any]:
        """The prompt, the policies, the rows and the head map of another model."""
        model = self.models[name]
        rows, policies = model.head_map.grid[0], list(model.policies)
        picture = _in_own_file(plot_labels(model.head_map))
        return [model.example, gr.Dropdown(policies, value=policies[0]), gr.Slider(maximum=rows, value=1), picture]


def _in_own_file(image: Image.Image | None) -> Image.Image | None:
    """A copy that no other image shares a file with.

    Gradio names a file by its content, and writes it again for each equal image: the browser of another visitor, or the
    other image of the page, may just be loading it, and gets a part.
    """
    if image is None:
        return None
    own = image.copy()
    own.info["file"] = uuid.uuid4().hex  # Gradio stores it in the PNG
    return own


def _image(label: str, value: Image.Image | None = None, **layout: Any) -> gr.Image:
    return gr.Image(value, label=label, alt_text=label, format="png", interactive=False, buttons=["download"], **layout)


def _plot(column: str, name: str) -> gr.LinePlot:
    colors = {FULL: "#8a8a8a", POLICY: "#009E73"}
    layout = {"height": 240, "min_width": 280, "buttons": [], "elem_id": name}
    return gr.LinePlot(x=SHARE, y=column, color=CACHE, color_map=colors, x_lim=[0, 100], y_lim=[0, None], **layout)


def serve(
    models: Mapping[str, DemoModel],
    limits: Limits,
    host: str | None,
    port: int | None,
    announce: Callable[[str], object],
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        models: by name, in the order of the menu; the first one is chosen at the start.
        limits: of every visitor.
        host: the address to listen on; None is GRADIO_SERVER_NAME, or else 127.0.0.1.
        port: the port; None is GRADIO_SERVER_PORT, or else the first free one from 7860.
        announce: called with the address of the page once it is served.

    Raises:
        OSError: the port is taken.
    """
    page = Page(models, limits)
    page.blocks.queue(max_size=limits.waiting)
    _, address, _ = page.blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        app_kwargs={"middleware": [Middleware(SmallBodies)]},
        state_session_capacity=MAX_SESSIONS,
        theme=gr.themes.Default(font=FONT, font_mono=FONT),
        max_file_size=1,  # the page takes no files
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    announce(address)
    page.blocks.block_thread()
