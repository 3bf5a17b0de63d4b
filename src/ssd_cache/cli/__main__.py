"""`python -m ssd_cache.cli`: the same as the console script, for environments without the script.

It only calls the app of `ssd_cache.cli`.
"""

from ssd_cache.cli import app

app()
