"""Configuration keys: their types and ranges are checked first, and what nothing read is refused at the end."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fineserve_jax.errors import ModelLoadError

Schema = TypeVar("Schema", bound="CheckedKeys")
_SHOWN_CHARACTERS = 80  # of a value in an error


class CheckedKeys(BaseModel):
    """Base of the schemas: no conversions between types, no NaN or infinity; unknown keys are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


def check_keys(schema: type[Schema], values: Mapping[str, Any], where: str) -> Schema:
    """`values` as `schema`; raises ModelLoadError naming every key that does not fit, its value and the limit.

    where: file, and prefix of the keys, for the error.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ModelLoadError("; ".join(_clause(item, where) for item in error.errors(include_url=False))) from None


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, escaped, not longer than a line."""
    text = ascii(value) if not isinstance(value, list) else ascii(value[:8])
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


class KeyReader(Mapping[str, Any]):
    """A mapping that records which keys were looked up, so that the others can be refused.

    values: keys and values as checked. where: file, and prefix of the keys, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = dict(values), where
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def refuse_unread(self, harmless: Collection[str], neutral: Mapping[str, Collection[Any]]) -> None:
        """Raises ModelLoadError for a key that nothing read.

        harmless: keys that change no number of the model, whatever their value.
        neutral: keys with the values at which they change nothing. A null always stands for the default.
        """
        left = []
        for key, value in self._values.items():
            if key in self._read or key in harmless or value is None:
                continue
            if not any(_same(value, allowed) for allowed in neutral.get(key, ())):
                left.append(f"{_plain(key)} = {shown(value)}")
        if left:
            raise ModelLoadError(
                f"{self._where}{'; '.join(sorted(left)[:8])}: this loader does not know what to do with "
                f"{'it' if len(left) == 1 else f'these {len(left)} keys'}, and ignoring a key may give wrong text; "
                "use a model without it, or remove the key if the model computes the same without it"
            )


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and of one type: False is not 0. Integers and floats compare as numbers."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, allowed))
    return (numbers or type(value) is type(allowed)) and bool(value == allowed)


def _clause(item: Any, where: str) -> str:
    key = ".".join(_plain(str(part)) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}{key} is {shown(item['input'])}: {message[:1].lower()}{message[1:]}"


def _plain(text: str) -> str:
    return ascii(text)[1:-1]
