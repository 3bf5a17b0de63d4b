"""Put what `make bench-gpu` measured into performance.md, and its JSON beside that page.

    python docs/fill_gpu.py RESULTS

It replaces what stands between the page's two markers, and makes no figure of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import typer

from ssd_cache.io.writing import write_files

BEGIN, END = "<!-- bench-gpu -->\n", "<!-- /bench-gpu -->\n"
HEADING = "## Measured on a GPU\n\n`make bench-gpu` filled this section in.\n"


def main(results: Path, docs: Path = Path(__file__).parent) -> None:
    """Fill DOCS/performance.md with the bench's outputs in the folders of RESULTS."""
    page = docs / "performance.md"
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise typer.BadParameter(f"{page} lacks the lines {BEGIN.strip()} and {END.strip()}, between which to write")
    found = sorted(path.parent for path in results.glob("*/bench.md"))
    if not found:
        raise typer.BadParameter(f"{results} holds no folder with a bench.md: run `make bench-gpu` first")
    files, sections = {}, [HEADING]
    for folder in found:
        name = f"bench-gpu-{folder.name}"
        files[docs / f"{name}.json"] = (folder / "bench.json").read_bytes()
        table = re.sub("^(#+ )", r"##\1", (folder / "bench.md").read_text("utf-8").strip(), flags=re.MULTILINE)
        sections.append(f"{table}\n\n[All of it as JSON]({name}.json)\n")
    # the page last, so that whatever it shows is there
    write_files({**files, page: (before + BEGIN + "\n".join(sections) + END + after).encode()})
    typer.echo(f"{page} holds the tables of {', '.join(folder.name for folder in found)}")


if __name__ == "__main__":
    typer.run(main)
