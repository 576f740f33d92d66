"""Laws of signed manifests: what is not signed by the right key is not read."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from objects import contents, make, publish_one, uri_of

from tasks.artifacts import Store, fetch, open_store
from tasks.artifacts.manifest import FileRecord, Manifest, manifest_json
from tasks.artifacts.signing import sign, verify
from tasks.settings import SIGNING_KEY, VERIFICATION_KEY, ServiceError, Settings, is_transient

FILE = FileRecord(path="s/x", size=1, sha256="a" * 64)
MANIFEST = Manifest(family="nano", version="1", files=(FILE,), metadata={"step": 7, "loss": 0.1})


def write_keys(directory: Path, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
    """A private key and its public half, as openssl writes them."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    make(directory, {"private.pem": private, "public.pem": public})
    return directory / "private.pem", directory / "public.pem"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "keys", Ed25519PrivateKey.generate())


def test_a_signed_manifest_is_believed_and_signing_again_gives_the_same(keys: tuple[Path, Path]) -> None:
    signed = sign(MANIFEST, keys[0])
    verify(signed, keys[1], "here")
    assert sign(signed, keys[0]) == signed != MANIFEST


CHANGES: dict[str, Callable[[Manifest], Manifest]] = {
    "version": lambda m: dataclasses.replace(m, version="2"),
    "family": lambda m: dataclasses.replace(m, family="other"),
    "metadata": lambda m: dataclasses.replace(m, metadata={**m.metadata, "step": 8}),
    "digest": lambda m: dataclasses.replace(m, files=(dataclasses.replace(FILE, sha256="b" * 64),)),
    "file added": lambda m: dataclasses.replace(m, files=(FILE, dataclasses.replace(FILE, path="s/y"))),
    "signature": lambda m: dataclasses.replace(m, signature="A" * 86 + "=="),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_was_changed_after_signing_is_refused(keys: tuple[Path, Path], case: str) -> None:
    with pytest.raises(ServiceError, match=r"^here is not signed by the key of .*, or was changed") as caught:
        verify(CHANGES[case](sign(MANIFEST, keys[0])), keys[1], "here")
    assert not is_transient(caught.value)


def test_another_key_and_no_signature_are_refused(keys: tuple[Path, Path], tmp_path: Path) -> None:
    other, _ = write_keys(tmp_path / "other", Ed25519PrivateKey.generate())
    with pytest.raises(ServiceError, match="is not signed by the key"):
        verify(sign(MANIFEST, other), keys[1], "here")
    with pytest.raises(ServiceError, match="is not signed, and"):
        verify(MANIFEST, keys[1], "here")


def test_a_key_is_replaced_while_what_the_one_before_signed_is_still_believed(
    keys: tuple[Path, Path], tmp_path: Path
) -> None:
    new = write_keys(tmp_path / "new", Ed25519PrivateKey.generate())
    both = make(tmp_path, {"both.pem": new[1].read_bytes() + keys[1].read_bytes()}) / "both.pem"
    for private, _ in (keys, new):
        verify(sign(MANIFEST, private), both, "here")
    with pytest.raises(ServiceError, match="is not signed by the key"):
        verify(sign(MANIFEST, keys[0]), new[1], "here")
    spoiled = make(tmp_path, {"spoiled.pem": both.read_bytes()[:-40]}) / "spoiled.pem"
    with pytest.raises(ValueError, match=f"^{VERIFICATION_KEY}={spoiled} is not a PEM key"):
        verify(sign(MANIFEST, new[0]), spoiled, "here")


def test_a_bad_key_file_is_one_line_that_says_nothing_of_its_content(keys: tuple[Path, Path], tmp_path: Path) -> None:
    curve, _ = write_keys(tmp_path / "curve", ec.generate_private_key(ec.SECP256R1()))
    text = make(tmp_path, {"text.pem": b"hunter2"}) / "text.pem"
    bad = {tmp_path / "none": "cannot be read", text: "is not a PEM key", curve: "another key", keys[1]: "is not a PEM"}
    for path, reason in bad.items():
        with pytest.raises(ValueError, match=f"^{SIGNING_KEY}={path} .*{reason}") as caught:
            sign(MANIFEST, path)
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^{VERIFICATION_KEY}={keys[0]}"):
        verify(sign(MANIFEST, keys[0]), keys[0], "here")


def test_a_store_with_keys_publishes_signed_and_reads_nothing_else(
    settings: Settings, store: Store, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    source = make(tmp_path / "in", {"a": b"1"})
    publish_one(store, source, "unsigned")
    keyed = open_store(dataclasses.replace(settings, signing_key=keys[0], verification_key=keys[1]))
    signed = publish_one(keyed, source, "signed")
    assert publish_one(keyed, source, "signed") == signed
    fetch(keyed, uri_of(store, "signed"), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == {"a": b"1"}
    with pytest.raises(ServiceError, match=r"unsigned/manifest\.json is not signed, and"):
        fetch(keyed, uri_of(store, "unsigned"), "s", tmp_path / "refused")
    body = json.loads(manifest_json(signed)) | {"metadata": {"step": 8}}
    store.client.put_object(
        Bucket=store.bucket, Key="families/nano/signed/manifest.json", Body=json.dumps(body).encode()
    )
    with pytest.raises(ServiceError, match="or was changed since"):
        fetch(keyed, uri_of(store, "signed"), "s", tmp_path / "refused")
    fetch(store, uri_of(store, "signed"), "s", tmp_path / "unchecked")  # no key, no check
    assert not (tmp_path / "refused").exists()


def test_the_settings_name_the_key_files_and_no_text_shows_a_key(keys: tuple[Path, Path], settings: Settings) -> None:
    read = Settings.from_environment(
        {"MLFLOW_TRACKING_URI": "sqlite:///x.db", "ELASTIC_BUCKET": "models", SIGNING_KEY: str(keys[0])}
    )
    assert (read.signing_key, read.verification_key) == (keys[0], None)
    assert "PRIVATE" not in repr(read)
