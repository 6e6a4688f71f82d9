"""Settings, from `SYNAPSE_*` environment variables, then `synapse.toml` in the home folder, then the defaults here.

Everything Synapse writes lives under one home folder: `SYNAPSE_HOME`, or the platform's data folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from synapse.errors import InvalidInput, Unavailable

PRIVATE_FOLDER = 0o700
PASSWORD = re.compile(r"//[^@/]*@")
"""Name and password in a URL; an error shows neither."""


def default_home() -> Path:
    """The folder used when `SYNAPSE_HOME` is not set."""
    return Path(platformdirs.user_data_dir("synapse", appauthor=False))


class Settings(BaseSettings):
    """What a user may change. Each field is `SYNAPSE_<FIELD>` in the environment and `<field>` in `synapse.toml`."""

    model_config = SettingsConfigDict(env_prefix="SYNAPSE_", extra="ignore", frozen=True)

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
    max_layers: int = Field(20, ge=1, description="LoRA layers kept in memory per model")
    max_layer_bytes: int = Field(500 * 2**20, ge=2**20, description="bytes of LoRA layers kept in memory per model")

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        home = Path(os.environ.get("SYNAPSE_HOME") or default_home())
        toml = TomlConfigSettingsSource(settings_cls, toml_file=home.expanduser() / "synapse.toml")
        return init_settings, env_settings, toml

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
            raise Unavailable(
                f"cannot create the folder {path}: {error.strerror}",
                hint="set SYNAPSE_HOME to a folder you can write to",
            ) from error
        return path


def load_settings() -> Settings:
    """Read the settings.

    Raises:
        InvalidInput: a variable or a line of `synapse.toml` has a value that does not fit.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        found, wrong = PASSWORD.sub("//***@", repr(first["input"])), first["msg"]
        hint = f"mend SYNAPSE_{field.upper()} or `{field}` in synapse.toml"
        if first["type"] == "string_pattern_mismatch":
            wrong, hint = "none of its values", f"`{field}` is {Settings.model_fields[field].description}; {hint}"
        raise InvalidInput(f"the setting {field} is {found}: {wrong}", hint=hint) from error
    except ValueError as error:  # tomllib.TOMLDecodeError is one
        raise InvalidInput(
            f"synapse.toml cannot be read: {error}", hint="see docs/guide/settings.md for its form"
        ) from error
