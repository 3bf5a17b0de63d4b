"""The demo in the browser: two images of one prompt side by side, with a full cache and with that of a policy.

`generation.py` generates both row by row, `limits.py` bounds what a visitor can use, and `page.py` is the page. Only
`page.py` imports Gradio, which the extra `app` installs.
"""
