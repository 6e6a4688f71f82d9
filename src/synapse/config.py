"""Settings, from `SYNAPSE_*` environment variables, then `synapse.toml` in the home folder, then the defaults here.

Everything Synapse writes lives under one home folder: `SYNAPSE_HOME`, or the platform's data folder.

Read without pydantic-settings, whose import alone takes longer than a command that computes nothing may.
"""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from synapse.errors import InvalidInput, Unavailable

PREFIX = "SYNAPSE_"
FILE = "synapse.toml"
NOT_SETTINGS = frozenset({"DEBUG", "FORCE_PYTHON", "KERNEL_PATH", "PEER_PYTHON", "TEST_HOME"})
"""What other parts of Synapse, its tests and benchmarks read from the environment themselves, after the prefix."""
NESTED = "__"
"""Between a table of settings and a setting in it, in the name of a variable."""
NEAR = 0.6
"""How much alike two names are (`difflib`) when one is a typing mistake of the other."""
PRIVATE_FOLDER = 0o700
PASSWORD = re.compile(r"//[^@/]*@")
"""Name and password in a URL; an error shows neither."""

NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
DURATION = re.compile(rf"({NUMBER.pattern})(ms|s|m|h)", re.ASCII)
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
"""Seconds of what a duration is given in."""


def default_home() -> Path:
    """The folder used when `SYNAPSE_HOME` is not set."""
    return Path(platformdirs.user_data_dir("synapse", appauthor=False))


class DaemonSettings(BaseModel):
    """How models are run: `SYNAPSE_DAEMON__POOL` and so on in the environment, under `[daemon]` in `synapse.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool: str = Field(
        "auto",
        pattern="^(auto|process|here)$",
        description="where models run: process (workers of their own), here (in the process that asks), or auto:"
        " workers for the server, and here for a single command",
    )
    workers: int = Field(1, ge=1, le=64, description="worker processes of each model")
    worker_bytes: int = Field(
        0,
        ge=0,
        description="memory a worker may take before it is ended; 0 means what its model, caches and layers may need",
    )


class Settings(BaseModel):
    """What a user may change. Each field is `SYNAPSE_<FIELD>` in the environment and `<field>` in `synapse.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(default_factory=default_home, description="where models, layers and the database live")
    database_url: str = Field("", description="SQLAlchemy URL; empty means SQLite in the home folder")
    events: str = Field(
        "embedded",
        pattern=r"^(embedded|memory|(valkeys?|rediss?|unix)://.+)$",
        description="where events are kept: embedded (a file in the home folder), memory, or a valkey:// URL",
    )
    default_model: str = Field("smollm2-135m", description="the base model of a new persona")
    default_encoder: str = Field("all-minilm-l6-v2", description="the model that makes vectors of texts")
    encoder_precision: str = Field("float32", description="weights of encoders: float32, or int8, which has a kernel")

    host: str = Field("127.0.0.1", description="address the server binds to; only loopback until an API key exists")
    port: int = Field(8377, ge=0, le=65535, description="port the server listens on; 0 picks a free one")
    max_request_bytes: int = Field(2**20, ge=1024, description="largest HTTP request body, in bytes")
    max_concurrent_requests: int = Field(
        64, ge=1, description="answers generated at once, each choice of a request counted, before 429 is answered"
    )
    request_timeout: float = Field(600.0, gt=0, description="seconds one generation may take")

    backend: str = Field("auto", description="engine: auto, reference or native")
    quantisation: str = Field(
        "auto",
        pattern="^(auto|int8|4bit)$",
        description="weights of the native engine: auto (as in the file), int8 or 4bit",
    )
    layer_precision: str = Field(
        "int8",
        pattern="^(float16|int8)$",
        description="LoRA layers of the native engine: int8, or float16 in twice the memory",
    )
    threads: int = Field(
        0, ge=0, description="threads that compute; 0 means one per core (one per core but one for the reference)"
    )
    max_context: int = Field(8192, ge=16, description="longest sequence, in tokens; never more than the model's own")
    max_batch: int = Field(16, ge=1, description="sequences that share one step")
    kv_cache_tokens: int = Field(
        0, ge=0, description="tokens the KV cache holds; 0 means as kv_cache_bytes has room for"
    )
    kv_cache_bytes: int = Field(
        2**30,
        ge=2**20,
        description="memory the KV cache may fill per model; never more than an eighth of the machine's",
    )
    keep_alive: float = Field(
        "5m",
        validate_default=True,
        description="how long a model stays in memory when nobody uses it: 30s, 5m, 2h; 0 is not at all, -1 for ever",
    )
    max_model_bytes: int = Field(
        0, ge=0, description="bytes that all models may take together; 0 means three quarters of the machine's memory"
    )
    max_layers: int = Field(20, ge=1, description="LoRA layers kept in memory per model")
    max_layer_bytes: int = Field(
        500 * 2**20,
        ge=2**20,
        description="bytes of LoRA layers kept in memory per model; never more than an eighth of the machine's",
    )
    daemon: DaemonSettings = Field(default_factory=DaemonSettings, description="how models are run")

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("keep_alive", mode="before")
    @classmethod
    def _seconds(cls, duration: object) -> float:
        return seconds_of(duration)

    @property
    def database(self) -> str:
        """The SQLAlchemy URL that is really used."""
        return self.database_url or f"sqlite+aiosqlite:///{self.home / 'synapse.db'}"

    def folder(self, name: str) -> Path:
        """A private folder inside the home, created (with the home itself) on first use.

        Raises:
            Unavailable: the folder cannot be created or written.
        """
        path = self.home / name if name else self.home
        try:
            self.home.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
            path.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        except OSError as error:
            hint = "set SYNAPSE_HOME to a folder you can write to"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = "make room on that disk, or set SYNAPSE_HOME to a folder on another one"
            raise Unavailable(f"cannot create the folder {path}: {error.strerror}", hint=hint) from error
        return path


def seconds_of(duration: object) -> float:
    """The seconds of a duration: a number of them, or text such as `30s`, `5m`, `1h30m`; below zero means for ever.

    Raises:
        ValueError: it is none.
    """
    text = str(duration).strip().lower()
    sign, parts = text.removeprefix("-"), DURATION.findall(text)
    if isinstance(duration, bool) or not (sign == "".join(map("".join, parts)) or NUMBER.fullmatch(sign)) or not sign:
        raise ValueError("expected a duration such as 30s, 5m or 2h, 0 for not at all, or -1 for ever")
    if text.startswith("-"):
        return math.inf
    return float(sign) if NUMBER.fullmatch(sign) else sum(float(count) * UNITS[unit] for count, unit in parts)


def load_settings() -> Settings:
    """Read the settings.

    Raises:
        InvalidInput: a variable or a line of `synapse.toml` has a value that does not fit, or a name that is no
            setting's.
        Unavailable: `synapse.toml` is there and cannot be read.
    """
    given = _from_environment(os.environ)
    home = Path(given.get("home") or default_home()).expanduser()
    try:
        return Settings.model_validate(_merged(_from_file(home / FILE), given))
    except ValidationError as error:
        raise _refusal(error) from error


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """The `SYNAPSE_…` variables that mean nothing here, sorted."""
    known = NOT_SETTINGS | set(_variables())
    names = (name for name in environment if name.upper().startswith(PREFIX))
    return sorted(name for name in names if name.upper().removeprefix(PREFIX) not in known)


def _variables() -> dict[str, tuple[str, ...]]:
    """Where the value of each variable belongs, by its name without the prefix: a field, or a field and one of its."""
    found: dict[str, tuple[str, ...]] = {}
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= {f"{name}{NESTED}{inner}".upper(): (name, inner) for inner in kind.model_fields}
        else:
            found[name.upper()] = (name,)
    return found


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings among the variables. One that is nearly a setting is refused; others may be another program's."""
    known = _variables()
    for name in unknown_variables(environment):
        near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), known, n=1, cutoff=NEAR)
        if near:
            raise InvalidInput(f"there is no setting {name}", hint=f"did you mean {PREFIX}{near[0]}? Mend or unset it")
    variables = {name.upper(): value for name, value in environment.items()}
    found: dict[str, Any] = {}
    for name, place in known.items():
        value = variables.get(PREFIX + name)
        if value is None or (place == ("home",) and not value):
            continue
        if len(place) == 1:
            found[place[0]] = value
        else:
            found.setdefault(place[0], {})[place[1]] = value
    return found


def _from_file(path: Path) -> dict[str, Any]:
    """The settings of `synapse.toml`; none when there is no such file."""
    try:
        with path.open("rb") as file:
            import tomllib  # noqa: PLC0415 (most homes have no such file)

            found = tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}", hint="see who may read it") from error
    except ValueError as error:  # TOMLDecodeError is one, and so is what comes of bytes that are no UTF-8
        raise InvalidInput(f"{path} cannot be read: {error}", hint="see docs/guide/settings.md for its form") from error
    for name in found:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name.lower(), Settings.model_fields, n=1, cutoff=NEAR)
            hint = f"did you mean `{near[0]}`?" if near else f"the settings are {', '.join(Settings.model_fields)}"
            raise InvalidInput(f"there is no setting {name!r}, which stands in {path}", hint=hint)
    return found


def _merged(file: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The settings of both; where both have one, that of the environment."""
    both = file | environment
    for name, table in environment.items():
        if isinstance(table, dict) and isinstance(of_file := file.get(name), dict):
            both[name] = of_file | table
    return both


def _refusal(error: ValidationError) -> InvalidInput:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    field = ".".join(place)
    found, wrong = PASSWORD.sub("//***@", repr(first["input"])), first["msg"]
    hint = f"mend {PREFIX}{NESTED.join(place).upper()} or `{field}` in {FILE}"
    if first["type"] == "value_error":
        wrong = str(first["ctx"]["error"])
    elif first["type"] == "string_pattern_mismatch":
        fields = DaemonSettings.model_fields if place[0] == "daemon" else Settings.model_fields
        wrong, hint = "none of its values", f"`{field}` is {fields[place[-1]].description}; {hint}"
    return InvalidInput(f"the setting {field} is {found}: {wrong}", hint=hint)
