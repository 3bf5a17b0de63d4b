"""`python -m ssd_cache.cli`: the same as the console script, for where no script is installed.

Nothing else is decided here.
"""

from ssd_cache.cli import app

app()
