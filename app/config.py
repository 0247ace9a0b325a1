"""Settings: the only reader of the environment. One name in three forms: option, MANIFOLD_* variable, `.env` line.

Knows what each setting means and which values can work; nothing of who uses them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import SettingsError

ENV_PREFIX = "MANIFOLD_"
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_CREDENTIALS = re.compile(r"//[^/@\s]*@")  # of a URL, which errors quote
SHORTEST_KEY = 16
LEAST_WINDOW = 200  # texts before anything is said of their drift
SHIPPED_PREFIXES = Path(__file__).resolve().parents[1] / "prefixes"


def _split_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]


class Settings(BaseSettings):
    """Everything that can be set. Descriptions and defaults here are what `manifold serve --help` prints."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", allow_inf_nan=False
    )

    model: str = Field("embedded", description="the backbone: a folder, a Hugging Face id, or embedded (MiniLM)")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto, float32, bfloat16 or float16; auto takes bfloat16 where it is fast and exact enough"
    )
    prefixes: Path = Field(SHIPPED_PREFIXES, description="the folder of artifacts that an empty index begins with")

    home: Path = Field(Path(".manifold"), description="the folder of the embedded index, artifacts and last good state")
    redis_url: str | None = Field(
        None, description="the index: redis://, rediss:// or unix://; unset starts a redis-server of our own"
    )
    artifacts_url: str | None = Field(
        None, description="the artifact store: file://, s3:// or another fsspec URL; unset keeps it in home"
    )
    index_poll_ms: float = Field(1000.0, ge=10, le=600_000, description="how often the index is asked, hints or not")
    index_hints: bool = Field(True, description="hear of changes at once over pub/sub; polling goes on beside it")
    artifact_limit_bytes: int = Field(64_000_000, ge=1, description="bytes of one published artifact; more is a 413")
    cache_limit_bytes: int = Field(2_000_000_000, ge=0, description="bytes of fetched artifacts that are kept on disk")
    pinned_versions: int = Field(32, ge=1, description="versions kept resident because a caller pinned them")
    feedback_window_s: float = Field(86_400.0, gt=0, description="how long compared answers wait for feedback")
    admin_key: SecretStr | None = Field(None, description="a bearer token with the role admin, beside the index's keys")
    key: SecretStr | None = Field(None, description="the bearer token that commands send")
    separate_approval: bool | None = Field(
        None, description="whether nobody approves what they published; unset: yes where there are keys"
    )

    host: str = Field("127.0.0.1", description="the address to listen on; without keys loopback only")
    port: int = Field(8080, ge=0, le=65535, description="the port to listen on; 0 takes a free one")
    allow_remote: bool = Field(False, description="listen on any address although no keys protect the server")
    cors_allow_origins: CommaSeparated = Field((), description="origins that browsers may call from, comma-separated")

    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="rows x (tokens + prefix) that one batch may hold; unset is 16384 on a CPU, 131072 on CUDA",
    )
    max_batch_rows: int | None = Field(
        None, ge=1, description="rows that one batch may hold; unset is 512 on a CPU, 4096 on CUDA"
    )
    max_queue_delay_ms: float = Field(0.0, ge=0, le=1000, description="how long a batch waits to be filled")
    max_concurrent_requests: int = Field(512, ge=1, description="requests at work at once; more are answered 429")
    max_client_batch_size: int = Field(32, ge=1, description="inputs of one request; more are answered 413")
    payload_limit_bytes: int = Field(2_000_000, ge=1, description="bytes of one body; more are answered 413")
    deadline_ms: float = Field(30_000.0, gt=0, description="time for one request; past it the answer is 504")
    answer_cache_bytes: int = Field(
        64_000_000, ge=0, description="bytes of answers kept in memory: a text seen before costs no pass; 0 keeps none"
    )
    tokenization_workers: int = Field(2, ge=1, le=256, description="threads that tokenize")
    threads: int | None = Field(None, ge=1, le=4096, description="threads of one operator on CPU; unset leaves torch's")

    drift_window: int = Field(
        2000,
        ge=0,
        le=1_000_000,
        description="a version's last texts that are compared with its baseline; 0 watches neither drift nor scores",
    )
    log_format: Literal["text", "json"] = Field("text", description="text or json, a line an event")
    log_requests: bool = Field(True, description="a line in the log for each request; never a text")
    otlp_endpoint: str | None = Field(
        None, description="where traces go: the http:// or https:// URL of an OTLP receiver; unset records none"
    )
    otlp_headers: SecretStr | None = Field(
        None, description="what is sent along to it: name=value, comma-separated, such as authorization=Bearer%20KEY"
    )
    trace_sample: float = Field(
        1.0, ge=0, le=1, description="the share of requests that is traced where no traceparent says it"
    )
    prediction_log: str | None = Field(
        None, description="where answers are kept for audits: a folder or an fsspec URL; unset keeps none"
    )
    prediction_log_format: Literal["jsonl", "parquet"] = Field("jsonl", description="jsonl or parquet")
    prediction_log_sample: float = Field(1.0, ge=0, le=1, description="the share of requests that it keeps")
    prediction_log_texts: bool = Field(False, description="keep texts too; without, only their sha256")
    prediction_log_part_bytes: int = Field(
        64_000_000, ge=1, description="bytes of the file it writes, before rows are made"
    )
    prediction_log_part_s: float = Field(3600.0, ge=1, description="after this time it begins another file")
    prediction_log_limit_bytes: int = Field(
        10_000_000_000, ge=1, description="bytes of this server's files that are kept; the oldest go first"
    )
    prediction_log_limit_days: float | None = Field(
        None, gt=0, description="days after its last row a file of this server goes; unset asks for bytes alone"
    )
    drain_grace_s: float = Field(3.0, ge=0, description="after SIGTERM, how long the listener stays open at least")
    drain_timeout_s: float = Field(30.0, ge=0, description="after SIGTERM, how long requests in flight may take")

    @field_validator("drift_window")
    @classmethod
    def _enough_to_compare(cls, value: int) -> int:
        if 0 < value < LEAST_WINDOW:
            raise ValueError(f"it must be {LEAST_WINDOW} at least, which can be compared, or 0")
        return value

    @field_validator("admin_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < SHORTEST_KEY:
            raise ValueError(f"it must have {SHORTEST_KEY} characters at least")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _over_http(cls, value: str | None) -> str | None:
        if value is not None and not _is_http(value):
            raise ValueError("it must be a URL such as http://collector:4318")
        return value

    @field_validator("otlp_headers")
    @classmethod
    def _are_headers(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            to_headers(value.get_secret_value())
        return value


def load_settings(overrides: Mapping[str, object] | None = None) -> Settings:
    """Settings from overrides, the environment, `.env` and defaults, in this order. Raises SettingsError."""
    try:
        return Settings(**dict(overrides or {}))  # type: ignore[arg-type]  # what the mapping holds is validated
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(detail) for detail in error.errors())) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read: {error}") from error


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        has_place = bool(parts.hostname) and parts.port != 0
        is_plain = not (parts.query or parts.fragment or re.search(r"\s", url))
        return parts.scheme in ("http", "https") and has_place and is_plain
    except ValueError:  # of the port
        return False


def to_headers(text: str) -> dict[str, str]:
    """name=value, comma-separated and percent-encoded, as OpenTelemetry's exporters read them. Raises ValueError."""
    headers = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, encoded = part.partition("=")
        value = unquote(encoded.strip())
        if not _HEADER_NAME.fullmatch(name.strip()) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError("it must be name=value, comma-separated, with plain characters, and %2C for a comma")
        headers[name.strip().lower()] = value
    return headers


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def env_name(field: str) -> str:
    return ENV_PREFIX + field.upper()


def local_url(settings: Settings) -> str:
    """Where a client on this machine finds a server with the same settings."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    host = everywhere.get(settings.host) or (f"[{settings.host}]" if ":" in settings.host else settings.host)
    return f"http://{host}:{settings.port}"


def _sentence(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    field = str(detail["loc"][0])
    known = Settings.model_fields.get(field)
    is_secret = known is not None and SecretStr in get_args(known.annotation)
    given = "'…'" if is_secret else _CREDENTIALS.sub("//…@", repr(detail["input"]))
    sentence = f"{field} ({option_name(field)}, {env_name(field)}) is {given}: {_lower_first(message)}"
    if field == "port" and str(detail["input"]).startswith("tcp://"):
        sentence += "; Kubernetes sets it so for a service named manifold: set enableServiceLinks to false"
    return sentence


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
