"""The picture that `fineserve-jax quality --plot` draws, with matplotlib."""

from pathlib import Path

from fineserve_jax.engine.quality import Quality
from fineserve_jax.errors import ConfigError


def draw_quality(found: Quality, path: Path) -> None:
    """Draws the rise of perplexity and the KL divergence of each format over its bits a value, with their intervals;
    "auto / 2" is `auto` under a pressure of 2.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "drawing needs matplotlib, which is not installed; pip install 'fineserve-jax[plot]', or leave out --plot"
        ) from None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = (*found.formats, *found.under_pressure)
    bits = [row.bits_per_value for row in rows]
    panels = (
        ("rise of perplexity, %", [tuple(100 * part for part in row.rise) for row in rows]),
        ("KL divergence, nats a token", [tuple(row.kl) for row in rows]),
    )
    for axes, (label, estimates) in zip(figure.subplots(1, 2), panels, strict=True):
        values = [value for value, _, _ in estimates]
        below, above = ([abs(row[i] - row[0]) for row in estimates] for i in (1, 2))
        axes.errorbar(bits, values, yerr=[below, above], fmt="o", capsize=3)
        for x, y, row in zip(bits, values, rows, strict=True):
            name = row.kv_precision if row.pressure is None else f"{row.kv_precision} / {row.pressure:g}"
            axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points")
        axes.set(xlabel="bits a value", ylabel=label, ylim=(min(0.0, *(low for _, low, _ in estimates)), None))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{found.model} in {found.weights}, {found.windows} windows of {found.window} tokens")
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from None
