"""From what a request says of its KV precision to the format it starts in and the one it may be narrowed to."""

from typing import NamedTuple

from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.errors import RequestError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.pallas_kernels.formats import get_format

WIDEST_OF_AUTO = "bf16"
MOST_BITS_OF_AUTO = get_format(WIDEST_OF_AUTO).value_bits


class Precision(NamedTuple):
    """How a request's keys and values are kept.

    Attributes:
        start: KV format of its newest tokens, and of all until memory is short.
        floor: narrowest format its older tokens may be narrowed to; None: they stay as they are.
    """

    start: str
    floor: str | None


def resolve_precision(
    kv: KVManager,
    model: str,
    formats: tuple[str, ...],
    kv_precision: str,
    min_kv_precision: str | None,
    num_tokens: int,
) -> Precision:
    """The precision of a request.

    Args:
        kv: knows how long pages are, and what fits.
        formats: what is served.
        kv_precision: a format, a recipe, or "auto".
        min_kv_precision: a format; None: none but with "auto", which then goes down to the narrowest.
        num_tokens: greatest length of the request. With "auto" it starts in the widest format in which that fits.

    Raises:
        RequestError: a format that is not served, or a floor that is wider than where it starts.
    """
    for name, value in (("kv_precision", kv_precision), ("min_kv_precision", min_kv_precision)):
        if value is not None and value not in formats and (name, value) != ("kv_precision", AUTO):
            choices = ", ".join((*formats, AUTO) if name == "kv_precision" else formats)
            raise RequestError(f"{name}={value!r} is not served; choose one of {choices}, or name it in kv_formats")
    classes = {name: kv.class_of(model, name) for name in formats}
    if kv_precision != AUTO:
        floor = min_kv_precision
        if floor is not None and not classes[kv_precision].holds_at_least(classes[floor]):
            raise RequestError(
                f"min_kv_precision={floor!r} is wider than kv_precision={kv_precision!r}; give a narrower one, or none"
            )
        return Precision(kv_precision, None if floor == kv_precision else floor)
    floor = min_kv_precision or min(formats, key=lambda name: classes[name].bytes_of_groups)
    steps = _steps(classes, floor)
    start = next((name for name in steps if kv.fits_alone(model, name, num_tokens)), floor)
    return Precision(start, None if floor == start else floor)


def _steps(classes: dict[str, PageClass], floor: str) -> list[str]:
    """Formats from the widest of at most 16 bits a value down to the floor, which may be a recipe; ties go to bf16."""
    between = [
        name
        for name, own in classes.items()
        if (own.recipe is None or name == floor)
        and own.holds_at_least(classes[floor])
        and _value_bits(own) <= MOST_BITS_OF_AUTO
    ]
    return sorted(between, key=lambda name: (-classes[name].bytes_of_groups, name != WIDEST_OF_AUTO))


def _value_bits(page_class: PageClass) -> float:
    """Bits of a stored value, scales not counted, in the layers that keep most."""
    return max(get_format(group.kv_format).value_bits for group in page_class.groups)
