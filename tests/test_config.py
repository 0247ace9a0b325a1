"""What an operator meets when setting things: three forms of one name, and a sentence for what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config import SHIPPED_PREFIXES, Settings, is_loopback, load_settings, local_url, to_headers
from app.errors import SettingsError
from app.main import check_host


def test_defaults_serve_the_shipped_tasks_on_this_machine_alone() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8080, "embedded")
    assert settings.prefixes == SHIPPED_PREFIXES
    assert settings.prefixes.is_dir()


def test_an_option_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".env"
    file.write_text("MANIFOLD_PORT=1\nMANIFOLD_MODEL=from-file\nMANIFOLD_THREADS=3\nOTHER=x\n")
    monkeypatch.setitem(Settings.model_config, "env_file", file)
    monkeypatch.setenv("MANIFOLD_PORT", "2")
    monkeypatch.setenv("MANIFOLD_MODEL", "from-environment")
    settings = load_settings({"port": "3"})
    assert (settings.port, settings.model, settings.threads) == (3, "from-environment", 3)


def test_an_empty_variable_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANIFOLD_THREADS", "")
    assert load_settings().threads is None


def test_origins_are_a_list_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANIFOLD_CORS_ALLOW_ORIGINS", "https://a.example, https://b.example,")
    assert load_settings().cors_allow_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("port", "eighty", "port (--port, MANIFOLD_PORT) is 'eighty': input should be a valid integer"),
        ("port", "70000", "less than or equal to 65535"),
        ("port", "tcp://10.0.0.7:8080", "enableServiceLinks"),
        ("max_batch_tokens", "0", "max_batch_tokens (--max-batch-tokens, MANIFOLD_MAX_BATCH_TOKENS) is '0'"),
        ("dtype", "int8", "'float32'"),
        ("deadline_ms", "nan", "deadline_ms"),
        ("drain_grace_s", "inf", "drain_grace_s"),
        ("allow_remote", "perhaps", "allow_remote"),
        ("tokenization_workers", "-1", "tokenization_workers"),
        (
            "otlp_endpoint",
            "collector:4318",
            "otlp_endpoint (--otlp-endpoint, MANIFOLD_OTLP_ENDPOINT) is 'collector:4318': "
            "it must be a URL such as http://collector:4318",
        ),
        ("otlp_endpoint", "http://", "such as http://collector:4318"),
        ("otlp_endpoint", "http://a collector:4318", "such as http://collector:4318"),
        ("otlp_endpoint", "http://collector:4318/#a", "such as http://collector:4318"),
        ("otlp_endpoint", "http://user:word@collector:99999", "is 'http://…@collector:99999'"),
        ("otlp_endpoint", "http://collector:otlp", "such as http://collector:4318"),
        ("otlp_endpoint", "grpc://collector:4317", "such as http://collector:4318"),
        (
            "otlp_headers",
            "Bearer abc",
            "otlp_headers (--otlp-headers, MANIFOLD_OTLP_HEADERS) is '…': it must be name=value",
        ),
        ("otlp_headers", "a=b%0d%0aevil: 1", "is '…': it must be name=value"),
        ("admin_key", "short", "admin_key (--admin-key, MANIFOLD_ADMIN_KEY) is '…': it must have"),
        ("trace_sample", "1.5", "less than or equal to 1"),
    ],
)
def test_a_value_that_cannot_work_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    for load in (lambda: load_settings({name: value}), lambda: load_settings()):
        with pytest.raises(SettingsError) as raised:
            monkeypatch.setenv(f"MANIFOLD_{name.upper()}", value)
            load()
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_headers_are_read_as_exporters_read_them() -> None:
    assert to_headers("") == {}
    assert to_headers(" Authorization=Bearer%20a%2Cb , x-team = ml,") == {"authorization": "Bearer a,b", "x-team": "ml"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "manifold.example"])
def test_another_host_than_this_machine_must_be_asked_for_in_so_many_words(host: str) -> None:
    with pytest.raises(SettingsError, match="--allow-remote"):
        check_host(load_settings({"host": host}), has_keys=False)
    check_host(load_settings({"host": host, "allow_remote": "true"}), has_keys=False)
    check_host(load_settings({"host": host}), has_keys=True)
    check_host(load_settings({"host": host, "admin_key": "sixteen letters!"}), has_keys=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert is_loopback(host)
    assert load_settings({"host": host}).host == host


def test_a_file_that_is_not_text_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_bytes(b"MANIFOLD_PORT=\xff\xfe")
    monkeypatch.setitem(Settings.model_config, "env_file", tmp_path / ".env")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings()


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:9"), ("0.0.0.0", "http://127.0.0.1:9"), ("::1", "http://[::1]:9")]
)
def test_clients_on_this_machine_find_the_server(host: str, url: str) -> None:
    assert local_url(load_settings({"host": host, "port": 9, "allow_remote": True})) == url
