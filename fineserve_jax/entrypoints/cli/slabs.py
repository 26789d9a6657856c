"""`fineserve-jax slabs`: what became of the memory in a recorded run, to look at."""

from pathlib import Path
from typing import Annotated

import tyro

from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.slab_page import write_page
from fineserve_jax.entrypoints.cli.slab_picture import draw_picture
from fineserve_jax.kv.recording import read_record


def slabs(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="NAME", help_behavior_hint="")] = None,
    page_only: Switch = False,
) -> None:
    """Draw a recorded run: a picture (PNG), and a page for the browser that needs no network (HTML).

    Both show how full the memory was by KV precision, reserved over needed bytes, what was done with pages, and the
    map of the arena. `fineserve-jax batch --record RUN` records one.

    Args:
        run: file that a run was recorded to.
        output: where to write, without .png and .html; RUN without its ending, if not given.
        page_only: no picture, which needs matplotlib.
    """
    header, entries = read_record(run)
    target = run.with_suffix("") if output is None else output
    page, picture = target.with_name(target.name + ".html"), target.with_name(target.name + ".png")
    if not page_only:
        draw_picture(header, entries, picture)
        print(picture)
    write_page(header, entries, page)
    print(page)
