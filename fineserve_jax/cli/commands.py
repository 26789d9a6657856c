"""The list of commands."""

from collections.abc import Callable

import tyro

from fineserve_jax.cli.batch import batch
from fineserve_jax.cli.generate import generate
from fineserve_jax.cli.models import convert, fetch
from fineserve_jax.cli.perplexity import perplexity
from fineserve_jax.cli.place import place
from fineserve_jax.cli.simulate import simulate
from fineserve_jax.cli.slabs import slabs


def app() -> tyro.extras.SubcommandApp:
    """All commands, with one style: shared options bear their own names, and None is no word to type."""
    commands = tyro.extras.SubcommandApp()
    style = tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    functions: list[Callable[..., None]] = [batch, generate, perplexity, slabs, simulate, place, convert, fetch]
    for function in functions:
        commands.command(style(function))
    return commands
