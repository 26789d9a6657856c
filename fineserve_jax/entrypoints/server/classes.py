"""Classes of service: who may ask, as which tenant, in which precisions, how urgently, and for how much at once.

classes:
  gold:
    keys: [sk-..., "sha256:9f86d0..."]
    tenant: alice
    kv_precisions: [bf16, int8]
    ttft_slo_s: 0.5
    quota: {guaranteed: 0.5}
admin_keys: ["sha256:2c26b4..."]
"""

import hashlib
import hmac
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from fineserve_jax.engine.engine_config import AUTO, read_settings
from fineserve_jax.entrypoints.server.errors import ApiError
from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.quotas import Quota
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.validation import Validated, shown

HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class ServiceClass(Validated):
    """What requests with certain keys get. Targets and priority are what they get if they say nothing of it, and the
    most urgent that they may ask for.

    Attributes:
        keys: API keys, each as it is sent, or as "sha256:" and the SHA-256 of that in hexadecimal digits.
        tenant: whose all requests are; "": nobody's in particular, and they may not say otherwise.
        kv_precisions: what they may ask for, as `kv_precision` or `min_kv_precision`; the first is what those get that
            say nothing. None: anything.
        ttft_slo_s, tpot_slo_s, priority, drop_when_late: see `RequestOptions`.
        max_requests: most requests at once, their samples not counted; None: any number.
        quota: of the tenant's memory; see `Quota`.
    """

    REFUSED: ClassVar[str] = "not_in_class"

    keys: tuple[str, ...] = Field(min_length=1)
    tenant: str = ""
    kv_precisions: tuple[str, ...] | None = Field(default=None, min_length=1)
    ttft_slo_s: float | None = Field(default=None, gt=0)
    tpot_slo_s: float | None = Field(default=None, gt=0)
    priority: int = 0
    drop_when_late: bool = False
    max_requests: int | None = Field(default=None, ge=1)
    quota: Quota | None = None

    @field_validator("keys")
    @classmethod
    def _no_empty_key(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(key.strip() for key in value):
            raise ValueError("a key must not be empty; give each some text that nobody guesses")
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.quota is not None and not self.tenant:
            raise ValueError("a quota is a tenant's; give tenant, too")
        RequestOptions(priority=self.priority, ttft_slo_s=self.ttft_slo_s, drop_when_late=self.drop_when_late)
        return self

    def apply(self, options: RequestOptions) -> RequestOptions:
        """The options of a request as this class has them. Raises `ApiError` for what it may not ask."""
        given = options.model_dump(exclude_unset=True)
        if options.tenant not in ("", self.tenant):
            raise self._refusal(f"tenant={shown(options.tenant)} is not this key's; leave it out")
        if options.priority < self.priority and "priority" in given:
            raise self._refusal(f"priority={options.priority} is more urgent than this key's {self.priority}")
        for name in ("ttft_slo_s", "tpot_slo_s"):
            own, least = getattr(options, name), getattr(self, name)
            if own is not None and least is not None and own < least:
                raise self._refusal(f"{name}={own:g} is less than this key's {least:g}")
        allowed = self.kv_precisions
        for name in ("kv_precision", "min_kv_precision"):
            wanted = getattr(options, name)
            if allowed is not None and wanted is not None and wanted not in allowed:
                raise self._refusal(f"{name}={shown(wanted)} is not this key's; choose among {', '.join(allowed)}")
        own_values: dict[str, Any] = {"tenant": self.tenant, "priority": self.priority}
        own_values |= {"ttft_slo_s": self.ttft_slo_s, "tpot_slo_s": self.tpot_slo_s}
        own_values["kv_precision"] = None if allowed is None else allowed[0]
        if self.drop_when_late and (options.ttft_slo_s or self.ttft_slo_s):
            own_values["drop_when_late"] = True
        return RequestOptions(**{**own_values, **{name: value for name, value in given.items() if name != "tenant"}})

    def _refusal(self, message: str) -> ApiError:
        return ApiError(message, self.REFUSED, 403)


class ServiceClasses:
    """Classes by key. Without any, everybody is served as they ask.

    Args:
        classes: by name.
        admin_keys: of who may load and unload models, and is served no answers for that; as `ServiceClass.keys`.

    Raises:
        ConfigError: a key of two classes, or an empty one.
    """

    def __init__(self, classes: Mapping[str, ServiceClass], admin_keys: Sequence[str] = ()) -> None:
        self.classes = dict(classes)
        if not all(key.strip() for key in admin_keys):
            raise ConfigError("admin_keys has an empty key; give each some text that nobody guesses")
        self._admin_digests = list(map(_digest_of, admin_keys))
        self._digests: list[tuple[bytes, str]] = []
        for name, service_class in self.classes.items():
            for key in service_class.keys:
                digest = _digest_of(key)
                if digest in self._admin_digests:
                    raise ConfigError(f"class {name!r} has a key of admin_keys; give each its own")
                if other := [other for known, other in self._digests if known == digest]:
                    raise ConfigError(f"the classes {other[0]!r} and {name!r} have a key in common; give each its own")
                self._digests.append((digest, name))

    @property
    def quotas(self) -> dict[str, Quota]:
        """Quotas of memory as `EngineConfig` has them."""
        quotas: dict[str, Quota] = {}
        for name, service_class in self.classes.items():
            tenant, quota = service_class.tenant, service_class.quota
            if quota is not None and quotas.setdefault(f"tenant:{tenant}", quota) != quota:
                raise ConfigError(f"class {name!r} gives the tenant {tenant!r} a second quota; give it one")
        return quotas

    @property
    def kv_precisions(self) -> tuple[str, ...]:
        """What the classes name, each once."""
        return tuple(dict.fromkeys(name for one in self.classes.values() for name in one.kv_precisions or ()))

    def check_formats(self, served: Collection[str]) -> None:
        """Raises `ConfigError` for a precision that the engine does not serve."""
        for name, service_class in self.classes.items():
            for precision in service_class.kv_precisions or ():
                if precision not in served and precision != AUTO:
                    known = ", ".join(served)
                    raise ConfigError(f"class {name!r} allows {precision!r}, which is not served; choose among {known}")

    def of(self, authorization: str | None) -> tuple[str, ServiceClass | None]:
        """Name and class of whoever sends that header; "" and None where there are no classes.

        Comparing takes the same time whatever the key has in common with known ones.

        Raises:
            ApiError: no key, or one of no class.
        """
        if not self.classes:
            return "", None
        digest, found = _sent_digest(authorization), None
        for known, name in self._digests:
            if hmac.compare_digest(digest, known):
                found = name
        if found is None:
            raise _unknown_key("the API key")
        return found, self.classes[found]

    @property
    def has_admin(self) -> bool:
        """Whether there is somebody who may load and unload models."""
        return bool(self._admin_digests)

    def check_admin(self, authorization: str | None) -> None:
        """Raises `ApiError` unless that header has an admin key; compared as keys of classes are."""
        if not self.has_admin:
            message = "nobody may load and unload models here; start the server with --classes and admin_keys in it"
            raise ApiError(message, "not_found", 404)
        digest = _sent_digest(authorization)
        found = [known for known in self._admin_digests if hmac.compare_digest(digest, known)]  # all are compared
        if not found:
            raise _unknown_key("the admin key")


def read_classes(path: Path | None) -> ServiceClasses:
    """The classes in a YAML file. Raises `ConfigError` for one that cannot be read, or that holds anything else."""
    if path is None:
        return ServiceClasses({})
    settings = read_settings(path)
    listed, admin_keys = settings.get("classes", {}), settings.get("admin_keys", [])
    is_known = set(settings) in ({"classes"}, {"admin_keys"}, {"classes", "admin_keys"})
    if not is_known or not isinstance(listed, dict) or not (listed or admin_keys):
        raise ConfigError(
            f"{path} must hold `classes`, a table of classes by name, `admin_keys`, a list, or both, and nothing else"
        )
    if not isinstance(admin_keys, list) or not all(isinstance(key, str) for key in admin_keys):
        raise ConfigError(f"admin_keys in {path} must be a list of keys, each a text in quotes")
    classes = {}
    for name, values in listed.items():
        if not isinstance(values, dict):
            raise ConfigError(f"class {name!r} in {path} is no table; give it `keys` at least")
        try:
            classes[str(name)] = ServiceClass(**{str(key): value for key, value in values.items()})
        except ConfigError as error:
            raise ConfigError(f"class {name!r} in {path}: {error}") from None
    return ServiceClasses(classes, admin_keys)


def _unknown_key(what: str) -> ApiError:
    message = f"{what} is missing or unknown; send the header Authorization: Bearer KEY"
    return ApiError(message, "invalid_api_key", 401, {"WWW-Authenticate": "Bearer"})


def _sent_digest(authorization: str | None) -> bytes:
    """Of the key in a header; without such a key one that no key has."""
    scheme, _, key = (authorization or "").partition(" ")
    return _digest(key.strip().encode(errors="replace")) if scheme.lower() == "bearer" else b""


def _digest_of(key: str) -> bytes:
    """Of a key in a configuration, which may be given by its digest."""
    return bytes.fromhex(found[1]) if (found := HASHED.fullmatch(key)) else _digest(key.encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
