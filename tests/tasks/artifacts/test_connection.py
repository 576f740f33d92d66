"""Laws of the connection to S3: addresses, access, and what errors say."""

import socket
from dataclasses import replace
from typing import Any

import pytest
from forward import http_proxy

from tasks.artifacts import check_bucket, open_store, parse_uri
from tasks.settings import ServiceError, Settings, is_transient

SECRET = "not-the-secret"


BAD_URIS = {
    "empty": ("", "not an S3 URI"),
    "relative": ("models/x", "not an S3 URI"),
    "http": ("http://bucket/x", "not an S3 URI"),
    "file": ("file:///etc/passwd", "not an S3 URI"),
    "no-bucket": ("s3://", "not an S3 URI"),
    "no-bucket-but-a-key": ("s3:///x", "not an S3 URI"),
    "no-scheme": ("S3//x", "not an S3 URI"),
    "upper-scheme": ("S3://bucket/x", "not an S3 URI"),
    "password": ("s3://user:hunter2@bucket/x", "not an S3 URI"),
    "port": ("s3://bucket:9000/x", "not an S3 URI"),
    "bucket-of-dots": ("s3://../x", "not an S3 URI"),
    "bucket-with-space": ("s3://a b/x", "not an S3 URI"),
    "bucket-query": ("s3://bucket?x=1/y", "not an S3 URI"),
    "bucket-too-long": (f"s3://{'b' * 300}/x", "not an S3 URI"),
    "parent": ("s3://bucket/families/../x", "'..' component"),
    "parent-at-end": ("s3://bucket/families/..", "'..' component"),
    "dot": ("s3://bucket/./x", "'.' or"),
    "empty-component": ("s3://bucket/a//b", "an empty"),
    "absolute": ("s3://bucket//etc/passwd", "an empty"),
    "newline": ("s3://bucket/a\nb", "control character"),
    "nul": ("s3://bucket/a\0", "control character"),
}


@pytest.mark.parametrize(("uri", "reason"), BAD_URIS.values(), ids=BAD_URIS.keys())
def test_a_hostile_uri_is_refused_in_one_line_with_its_reason(uri: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_uri(uri)
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


def test_an_s3_uri_is_a_bucket_and_a_key() -> None:
    assert parse_uri("s3://bucket/a/b c@d") == ("bucket", "a/b c@d")
    assert parse_uri("s3://bucket") == parse_uri("s3://bucket/") == ("bucket", "")
    assert parse_uri("s3://bucket/a/") == ("bucket", "a/")


# Access


def test_a_usable_bucket_passes_the_check_and_stays_empty(settings: Settings) -> None:
    check_bucket(settings)
    assert open_store(settings).client.list_objects_v2(Bucket=settings.bucket)["KeyCount"] == 0


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BAD_ACCESS: dict[str, tuple[dict[str, str], dict[str, str], str, bool]] = {
    "wrong-secret": ({"AWS_SECRET_ACCESS_KEY": SECRET}, {}, "rejects the key", False),
    "unknown-key": ({"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": SECRET}, {}, "rejects the key", False),
    "no-profile": ({"AWS_PROFILE": "none-such"}, {}, "no S3 credentials", False),
    "may-only-read": (
        {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"},
        {},
        "to PutObject; this key may not",
        False,
    ),
    "no-bucket": ({}, {"bucket": "no-such-bucket"}, "bucket does not exist", False),
    "closed-port": ({}, {"endpoint_url": "http://user:hunter2@127.0.0.1:{port}"}, "cannot reach S3", True),
    "no-tls": ({}, {"endpoint_url": "https://127.0.0.1:{live}"}, "TLS fails", False),
}


@pytest.mark.parametrize(("variables", "changes", "says", "transient"), BAD_ACCESS.values(), ids=BAD_ACCESS.keys())
def test_bad_access_is_one_line_that_holds_no_secret(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    changes: dict[str, str],
    says: str,
    transient: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    live = (settings.endpoint_url or "").rpartition(":")[2]
    filled = {key: value.format(port=closed_port(), live=live) for key, value in changes.items()}
    with pytest.raises(ServiceError, match=says) as caught:
        check_bucket(replace(settings, **filled))
    line = str(caught.value)
    assert "\n" not in line and SECRET not in line and "hunter2" not in line and "Signature=" not in line
    assert is_transient(caught.value) == transient


def test_s3_is_reached_through_the_proxy_of_the_environment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "")
    with http_proxy() as (proxy, asked):
        monkeypatch.setenv("http_proxy", proxy)
        check_bucket(settings)
        assert asked and all(url.startswith(str(settings.endpoint_url)) for url in asked)
        before = len(asked)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        check_bucket(settings)
        assert len(asked) == before


def test_a_proxy_that_is_away_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ServiceError, match="through the proxy that the environment names; check HTTPS_PROXY") as caught:
        check_bucket(settings)
    assert is_transient(caught.value)


def test_a_server_that_overwrites_is_found_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_store(settings)

    def forget(params: dict[str, Any], **_: Any) -> None:
        params.pop("IfNoneMatch", None)

    real.client.meta.events.register("before-parameter-build.s3.PutObject", forget)
    monkeypatch.setattr("tasks.artifacts.connection.open_store", lambda *_, **__: real)
    with pytest.raises(ServiceError, match="ignores If-None-Match"):
        check_bucket(settings)
