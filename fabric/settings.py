"""Settings: flags, then ``PARALLAX_*`` variables, then one TOML file, then defaults.

The file is ``./parallax.toml`` or, where there is none,
``~/.config/parallax/config.toml``. One file serves schedulers, nodes and
clients: each takes the keys it knows, and a key that none of them knows is an
error. Limits stand in a table of their own (``[limits]``, or
``PARALLAX_LIMITS__CONNECT_S``).
"""

from __future__ import annotations

import logging
import os
import platform
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from parallax.fabric.errors import BadSetting
from parallax.fabric.hosts import ANYWHERE, host_of, is_loopback
from parallax.fabric.limits import Limits
from parallax.fabric.names import unseen

PREFIX = "PARALLAX_"
HTTP_PORT = 3001
ENROL_PORT = 3002

log = logging.getLogger(__name__)

Port = Annotated[int, Field(ge=0, le=65535)]
Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
]
Memory = Annotated[ByteSize, Field(gt=0)]  # "8GB" is 8e9 bytes, "8GiB" 8 x 2**30


def _seen(value: str) -> str:
    if unseen(value):
        raise ValueError("it has characters that cannot be seen")
    return value


Name = Annotated[str, Field(min_length=1, max_length=63), AfterValidator(_seen)]


def _listed(value: object) -> object:
    """Lists in variables are written "a, b"."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _origin(value: str) -> str:
    scheme, separator, rest = value.lower().partition("://")
    if scheme not in ("http", "https") or not separator or host_of(rest) is None:
        raise ValueError("an origin is written http://HOST or https://HOST, with :PORT if need be")
    return f"{scheme}://{rest}"


def _host_name(value: str) -> str:
    host = host_of(value)
    if host is None or host != value.lower().rstrip("."):
        raise ValueError("it is no name of a host; it is written without scheme and port")
    return host


Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_listed)
]
HostNames = Annotated[
    tuple[Annotated[str, AfterValidator(_host_name)], ...], NoDecode, BeforeValidator(_listed)
]


def host_name() -> str:
    """This machine's name, as people say it."""
    return platform.node().removesuffix(".local").removesuffix(".lan")[:63] or "node"


class Settings(BaseSettings):
    """What schedulers, nodes and clients have in common."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    host: str = "127.0.0.1"  # where HTTP listens
    port: Port = HTTP_PORT
    grpc_port: Port = 0
    state_dir: Folder = Path("~/.parallax").expanduser()
    log_level: LogLevel = "warning"
    loopback_only: bool = False
    limits: Limits = Limits()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, variables, the file, in this order."""
        path = config_file()
        values = _read(path) if path else {}
        mine = {key: value for key, value in values.items() if key in settings_cls.model_fields}
        return init_settings, env_settings, InitSettingsSource(settings_cls, mine)


class SchedulerSettings(Settings):
    """A scheduler: ``parallax run``."""

    grpc_port: Port = ENROL_PORT
    model: str | None = None
    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    speculation: bool = True  # drafts for a lone answer, which never change it
    open: bool = False  # every node is let in, whoever runs it
    journal: Folder | None = None  # file or folder; None: no journal is written
    journal_tokens: bool = False  # the tokens of answers too, not only their checksum

    # Whether HTTP asks for API keys; "auto": as soon as it listens beyond loopback.
    keys: Literal["auto", "required", "off"] = "auto"
    tls_cert: Folder | None = None
    tls_key: Folder | None = None
    cors_origin: Origins = ()  # whose pages may ask, besides our own
    allowed_host: HostNames = ()  # names of this server, besides the machine's own

    @property
    def beyond_loopback(self) -> bool:
        """Whether HTTP can be reached from other machines."""
        return not is_loopback(self.host)

    @property
    def keys_required(self) -> bool:
        """Whether HTTP asks for API keys."""
        return self.keys == "required" or (self.keys == "auto" and self.beyond_loopback)

    @model_validator(mode="after")
    def _ports_differ(self) -> SchedulerSettings:
        if self.port == self.grpc_port != 0:
            raise ValueError("port and grpc_port must differ")
        return self

    @model_validator(mode="after")
    def _tls_whole(self) -> SchedulerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both, or none")
        return self


class NodeSettings(Settings):
    """A node: ``parallax join``."""

    scheduler: str | None = None  # PEER_ID, host:port or PEER_ID@host:port; None: look around
    token: SecretStr | None = None  # lets this node in the first time
    memory: Memory | None = None  # the most it may hold
    cache_bytes: Memory | None = None  # the most that fetched models may take on the disk
    name: Name = Field(default_factory=host_name)


class ClientSettings(Settings):
    """A client of a running cluster: ``parallax chat``, ``status`` and the like."""

    url: str | None = None
    api_key: SecretStr | None = None  # None: what a scheduler of this state directory wrote
    ca_file: Folder | None = None  # PEM certificates to trust besides the system's

    @property
    def base_url(self) -> str:
        """Where the cluster's HTTP is, without a slash at the end."""
        if self.url:
            return self.url.rstrip("/")
        host = ANYWHERE.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


KINDS: tuple[type[Settings], ...] = (SchedulerSettings, NodeSettings, ClientSettings)
KNOWN = frozenset(key for kind in KINDS for key in kind.model_fields)

SECRET = frozenset(
    key
    for kind in KINDS
    for key, field in kind.model_fields.items()
    if SecretStr in (field.annotation, *get_args(field.annotation))
)

S = TypeVar("S", bound=Settings)


def load(kind: type[S], flags: Mapping[str, object]) -> S:
    """The settings of one kind of process. Flags that are None were not given.

    Raises:
        BadSetting: a value is wrong or a key unknown; it names the key and where it stands.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    for variable in unknown_variables(os.environ):
        log.warning("%s is no setting of Parallax; it changes nothing", variable)
    try:
        return kind(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise _explained(error, given) from None


def config_file() -> Path | None:
    """The TOML file that counts, if there is one."""
    candidates = (Path("parallax.toml"), Path("~/.config/parallax/config.toml").expanduser())
    return next((path for path in candidates if path.is_file()), None)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """The ``PARALLAX_*`` variables that no setting has."""
    return sorted(
        name
        for name in environment
        if name.upper().startswith(PREFIX)
        and name.upper().removeprefix(PREFIX).lower().split("__")[0] not in KNOWN
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(
            f"The settings file {path} cannot be read", str(error), "Correct or remove it"
        ) from None
    for key in values:
        if key not in KNOWN:
            raise BadSetting(
                f"{path} has an unknown key '{key}'",
                "A misspelt setting would otherwise be ignored",
                f"Remove it, or use one of: {', '.join(sorted(KNOWN))}",
                setting=key,
            )
    return values


def _explained(error: ValidationError, flags: Mapping[str, object]) -> BadSetting:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"].startswith("byte_size"):
        reason = "It is no size such as 8GB, 512MB or a number of bytes"
    if not place:
        return BadSetting("The settings contradict each other", reason, "Change one of them")
    key = ".".join(place)
    found = _source(place, flags)
    shown = "(not shown)" if place[0] in SECRET else repr(first["input"])
    return BadSetting(
        f"The setting '{key}' has a wrong value: {shown} ({found})",
        reason,
        "Correct it there; --help says what it can be",
        setting=key,
    )


def _source(place: list[str], flags: Mapping[str, object]) -> str:
    """Where a value came from, in people's words."""
    if place[0] in flags:
        return f"from --{place[0].replace('_', '-')}"
    wanted = PREFIX + "__".join(place).upper()
    for name in (wanted, PREFIX + place[0].upper()):
        if any(variable.upper() == name for variable in os.environ):
            return f"from the variable {name}"
    path = config_file()
    return f"from {path}" if path else "from the defaults"
