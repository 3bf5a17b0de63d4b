"""The Space's program: the demo of ssd-cache, as the command `ssd-cache app` serves it.

A Space sets the address and the port in GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
"""

from ssd_cache.cli import app

app(["app", "--seconds", "120"])
