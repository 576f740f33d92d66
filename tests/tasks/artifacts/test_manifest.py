"""Laws of the manifest: what comes from outside is checked before it is used."""

import json
import re
from typing import Any

import pytest

from tasks.artifacts.manifest import TOMBSTONE, FileRecord, Manifest, NestedPart, manifest_json, parse_manifest
from tasks.settings import ServiceError, is_transient

GOOD: dict[str, Any] = {
    "format_version": 1,
    "family": "nano",
    "version": "1",
    "files": [{"path": "s/config.json", "size": 2, "sha256": "0" * 64}],
    "metadata": {},
}


def with_file(**fields: Any) -> dict[str, Any]:
    return {**GOOD, "files": [{**GOOD["files"][0], **fields}]}


def with_paths(*paths: str) -> dict[str, Any]:
    return {**GOOD, "files": [{**GOOD["files"][0], "path": path} for path in paths]}


def with_nested(**fields: Any) -> dict[str, Any]:
    return {**GOOD, "nested": [{"name": "s", "files": GOOD["files"], **fields}]}


HOSTILE: dict[str, tuple[Any, str]] = {
    "absolute": (with_paths("/etc/passwd"), "is absolute or has an empty"),
    "parent": (with_paths("s/../../x"), "'..' component"),
    "parent-at-end": (with_paths("s/.."), "'..' component"),
    "dot": (with_paths("s/./x"), "'.' or"),
    "empty-component": (with_paths("s//x"), "has an empty"),
    "empty": (with_paths(""), "has an empty"),
    "trailing-slash": (with_paths("s/x/"), "has an empty"),
    "backslash": (with_paths("s\\..\\x"), "has a backslash"),
    "drive": (with_paths("C:/x"), "a drive letter"),
    "nul": (with_paths("s/x\0"), "control character"),
    "newline": (with_paths("s/x\ny"), "control character"),
    "lone-surrogate": (with_paths("s/\ud800"), "control character"),
    "too-long": (with_paths("s/" + "x" * 1000), "is over 900 bytes"),
    "too-deep": (with_paths("/".join("s" * 100)), "16 levels"),
    "twice": (with_paths("s/x", "s/x"), "appears twice"),
    "twice-on-a-mac": (with_paths("s/X", "s/x"), "appears twice"),
    "twice-in-unicode": (with_paths("s/\u00e9", "s/e\u0301"), "appears twice"),
    "file-and-directory": (with_paths("s/x", "s/x/y"), "is a file and a directory"),
    "path-not-text": (with_file(path=7), "is not a string"),
    "size-negative": (with_file(size=-1), "it must be 0 to"),
    "size-bool": (with_file(size=True), "it must be 0 to"),
    "size-float": (with_file(size=2.0), "it must be 0 to"),
    "size-huge": (with_file(size=10**30), "it must be 0 to"),
    "digest-short": (with_file(sha256="0" * 63), "64 lower-case hex digits"),
    "digest-upper": (with_file(sha256="A" * 64), "64 lower-case hex digits"),
    "digest-missing": ({**GOOD, "files": [{"path": "s/x", "size": 1}]}, "exactly path, size and sha256"),
    "file-extra-field": (with_file(url="http://evil"), "exactly path, size and sha256"),
    "files-empty": ({**GOOD, "files": []}, "a list of 1 to"),
    "files-object": ({**GOOD, "files": {}}, "a list of 1 to"),
    "files-too-many": ({**GOOD, "files": [GOOD["files"][0]] * 20_000}, "a list of 1 to"),
    "metadata-list": ({**GOOD, "metadata": []}, "it must be an object"),
    "field-missing": ({key: value for key, value in GOOD.items() if key != "metadata"}, "its fields must be"),
    "field-extra": ({**GOOD, "run": "rm -rf"}, "its fields must be"),
    "format-future": ({**GOOD, "format_version": 2, "anything": 1}, "upgrade elastic-family"),
    "format-text": ({**GOOD, "format_version": "1"}, "upgrade elastic-family"),
    "format-true": ({**GOOD, "format_version": True}, "upgrade elastic-family"),
    "family-path": ({**GOOD, "family": "../x"}, "is not a name"),
    "version-number": ({**GOOD, "version": 1}, "is not a name"),
    "not-an-object": ([1], "no format_version"),
    "not-json": (b"{", "malformed JSON"),
    "not-text": (b"\xff\xfe", "malformed JSON"),
    "nested-deep": (b"[" * 100_000, "malformed JSON"),
    "number-endless": (b'{"format_version": ' + b"9" * 10_000 + b"}", "malformed JSON"),
    "key-twice": (json.dumps(GOOD).replace('"metadata"', '"family"').encode(), "a key appears twice"),
    "nothing": (b"", "malformed JSON"),
    "number-not-finite": (json.dumps({**GOOD, "metadata": {"loss": float("nan")}}).encode(), "NaN is not JSON"),
    "nested-empty": ({**GOOD, "nested": []}, "a list of at least one part"),
    "nested-object": ({**GOOD, "nested": {"s": []}}, "a list of at least one part"),
    "nested-part-text": ({**GOOD, "nested": ["s"]}, "exactly name and files"),
    "nested-part-extra": (with_nested(over="http://evil"), "exactly name and files"),
    "nested-name-path": (with_nested(name="../s"), "nested part '../s' is not a name"),
    "nested-name-number": (with_nested(name=1), "nested part 1 is not a name"),
    "nested-name-twice": ({**GOOD, "nested": with_nested()["nested"] * 2}, "each name once"),
    "nested-file-parent": (with_nested(files=[{**GOOD["files"][0], "path": "../x"}]), "'..' component"),
    "nested-file-absolute": (with_nested(files=[{**GOOD["files"][0], "path": "/x"}]), "is absolute"),
    "nested-file-twice": (with_nested(files=GOOD["files"] * 2), "appears twice"),
    "nested-file-digest": (with_nested(files=[{**GOOD["files"][0], "sha256": ""}]), "64 lower-case hex digits"),
    "nested-files-empty": (with_nested(files=[]), "a list of 1 to"),
    "signature-number": ({**GOOD, "signature": 7}, "64 bytes in base64"),
    "signature-empty": ({**GOOD, "signature": ""}, "64 bytes in base64"),
    "signature-short": ({**GOOD, "signature": "AAAA"}, "64 bytes in base64"),
    "signature-list": ({**GOOD, "signature": ["A" * 86 + "=="]}, "64 bytes in base64"),
    "tombstone": (TOMBSTONE, "no format_version"),
}


def test_the_table_of_hostile_manifests_starts_from_a_good_one() -> None:
    assert parse_manifest(json.dumps(GOOD).encode(), "here").files[0].path == "s/config.json"


@pytest.mark.parametrize(("document", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_refused_in_one_line_with_its_reason(document: Any, reason: str) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(ServiceError, match=f"^s3://b/k.*{re.escape(reason)}") as caught:
        parse_manifest(body, "s3://b/k")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not is_transient(caught.value)


def test_a_manifest_is_read_as_it_was_written() -> None:
    file = FileRecord(path="s/x", size=1, sha256="a" * 64)
    manifest = Manifest(
        family="nano",
        version="1",
        files=(file,),
        metadata={"loss": 0.1, "text": "é"},
        nested=(NestedPart(name="s", files=(file,)), NestedPart(name="m", files=(file,))),
        signature="A" * 86 + "==",
    )
    assert parse_manifest(manifest_json(manifest), "here") == manifest
    assert [part.name for part in manifest.up_to("m")] == ["s", "m"] and manifest.up_to("x") == ()
