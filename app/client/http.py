"""The HTTP client of every command: where the server is, the key, and one sentence for whatever goes wrong.

Knows no endpoint. httpx2 takes long to import, so it is imported by the first request.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from app.config import Settings, env_name, is_loopback, load_settings, local_url
from app.errors import MalformedError, ManifoldError, SettingsError, UnavailableError

if TYPE_CHECKING:
    import httpx2

_TIMEOUT_S = 60.0


class MisuseError(ManifoldError):
    """The command or the settings cannot work as they were given."""


class AnsweredError(ManifoldError):
    """The server answered with an error; its sentence is ours."""

    def __init__(self, sentence: str, status: int) -> None:
        self.status = status
        super().__init__(sentence)


def settings_of(overrides: Mapping[str, object]) -> Settings:
    """Raises MisuseError."""
    try:
        return load_settings(overrides)
    except SettingsError as error:
        raise MisuseError(str(error)) from error


def add_client_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser)
    parser.add_argument("--json", action="store_true", help="print the server's answer as it came")


def add_server_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--url", help="where the server is; default: this machine, at the port of the settings")
    parser.add_argument("--key", metavar="TOKEN", help=f"the bearer token; better in {env_name('key')}")


def task_path(task: str, *parts: str | int) -> str:
    """/v1/tasks/TASK and what is below it."""
    named = quote(task, safe="", errors="replace")
    return "/".join(["/v1/tasks", named, *map(str, parts)])


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = _TIMEOUT_S

    @classmethod
    def of(cls, options: argparse.Namespace) -> Server:
        settings = settings_of({})
        stored = settings.key.get_secret_value() if settings.key is not None else None
        key = (options.key or stored or "").strip()
        if not key.isascii() or not key.isprintable():
            raise MisuseError(f"the key (--key, {env_name('key')}) holds characters that no key has")
        return cls((options.url or local_url(settings)).rstrip("/"), key or None)

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        parameters: Mapping[str, str | int] | None = None,
        if_match: int | None = None,
    ) -> Any:
        """The answer as JSON, None where it has no content. Raises ManifoldError with a sentence for anything else."""
        headers = {"content-type": "application/json"}
        if if_match is not None:
            headers["if-match"] = f'"{if_match}"'
        content = None if body is None else _encode(body)
        return self._decode(self._send(method, path, content=content, params=parameters, headers=headers))

    def read(self, path: str) -> str:
        """The answer as text. Raises ManifoldError with a sentence where it is an error."""
        return self._get(path).text

    def download(self, path: str) -> bytes:
        """The answer as it came. Raises ManifoldError with a sentence where it is an error."""
        return self._get(path).content

    def _get(self, path: str) -> httpx2.Response:
        response = self._send("GET", path, headers={})
        if not response.is_success:
            self._decode(response)  # raises, unless what answers there is not Manifold
        return response

    def upload(self, path: str, files: Mapping[str, bytes], fields: Mapping[str, str]) -> tuple[Any, bool]:
        """Files and fields of a form; the answer, and whether it says that something was made."""
        parts = [("files", (name, content, "application/octet-stream")) for name, content in files.items()]
        response = self._send("POST", path, files=parts, data=dict(fields), headers={})
        return self._decode(response), response.status_code == 201

    def _send(self, method: str, path: str, *, headers: dict[str, str], **content: Any) -> httpx2.Response:
        import httpx2

        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        # A proxy from the environment is not meant for a server on this machine.
        try:
            with httpx2.Client(timeout=self.timeout_s, trust_env=not _is_local(self.url)) as client:
                return client.request(method, self.url + path, headers=headers, **content)
        except UnicodeEncodeError as error:
            raise MalformedError("the text is not valid UTF-8") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise MalformedError(f"{self.url} is not an address of a server: {error}") from error
        except httpx2.ConnectError as error:
            raise UnavailableError(
                f"nothing answers at {self.url}: start a server with `manifold serve`, or say with --url where it is"
            ) from error
        except httpx2.HTTPError as error:
            told = str(error) or type(error).__name__
            raise UnavailableError(f"the connection to {self.url} failed: {told}") from error

    def _decode(self, response: httpx2.Response) -> Any:
        if response.status_code == 204:
            return None
        try:
            answer = response.json()
        except ValueError as error:
            status = response.status_code
            raise UnavailableError(f"what answers at {self.url} is not Manifold (status {status})") from error
        if response.is_success:
            return answer
        told = answer.get("error") if isinstance(answer, dict) else None
        sentence = str(told) if told else f"the server answered with status {response.status_code}"
        if response.status_code == 401 and self.key is None:
            sentence = f"this server asks for a key: give it with --key or {env_name('key')}"
        raise AnsweredError(sentence, response.status_code)


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MalformedError("the text is not valid UTF-8") from error


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
