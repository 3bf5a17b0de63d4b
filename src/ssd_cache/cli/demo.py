"""`ssd-cache app`: serve the demo in the browser.

Options only. The page and its limits are in `ssd_cache.app`; the name `app` of this package is the command line itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from ssd_cache.app.limits import Limits
from ssd_cache.app.models import DemoModel, offered_policies
from ssd_cache.cli import options
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import option
from ssd_cache.models import BUNDLED_MODELS, resolve_device, resolve_dtype

DEFAULTS = Limits()
SERVER, LIMITS = "Server", "Limits"


def app(
    model: Annotated[
        str | None,
        option("A further model: a folder or a Hub id.", "NAME", options.MODEL, default="none"),
    ] = None,
    grid: options.Grid = None,
    head_map: options.HeadMapName = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    host: Annotated[
        str | None,
        option("Address to listen on; 0.0.0.0 for other machines too.", "ADDRESS", SERVER, default="127.0.0.1"),
    ] = None,
    port: Annotated[
        int | None, option("Port to listen on.", "N", SERVER, default="the first free one from 7860", least=1)
    ] = None,
    prompt_characters: Annotated[int, option("Longest prompt.", "N", LIMITS)] = DEFAULTS.prompt_characters,
    seconds: Annotated[float, option("Longest run; it is stopped then.", "X", LIMITS)] = DEFAULTS.seconds,
    waiting: Annotated[int, option("Runs that may wait for the one at work.", "N", LIMITS)] = DEFAULTS.waiting,
) -> None:
    """Serve a page that generates an image with a full and a compressed cache.

    Both images grow side by side, with the bytes and the speed of each cache, and
    the tokens that the heads hold. Offers the bundled models, and --model. Needs
    the extra app. Ctrl-C ends it.
    """
    if find_spec("gradio") is None:
        raise WrongUse("the demo needs gradio, not installed here: pip install -e '.[app]' in a clone of ssd-cache")
    if model is None and (grid is not None or head_map is not None):
        raise WrongUse("--grid and --head-map are for --model: give it too")
    names = dict.fromkeys([*([] if model is None else [model]), *BUNDLED_MODELS])
    with refusing():
        limits = Limits(prompt_characters, seconds, waiting)
        place = resolve_device(device)
        kind = resolve_dtype(dtype, place)
        found = {name: find_model(name, grid if name == model else None) for name in names}
        offered = {name: offered_policies(found[name], head_map if name == model else None) for name in names}
    models = {name: DemoModel(load_generator(found[name], kind, place), *offered[name]) for name in names}
    from ssd_cache.app.page import serve

    serve(models, limits, host, port, lambda address: typer.echo(f"serving {address} until Ctrl-C"))
