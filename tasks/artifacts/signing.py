"""Signed manifests: an Ed25519 signature over everything else that a manifest says.

The keys are PEM files, as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them. A file of public
keys may hold several, one after the other: a key is replaced while what the one before has signed is still believed.
"""

import base64
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from tasks.artifacts.manifest import Manifest, manifest_json
from tasks.settings import SIGNING_KEY, VERIFICATION_KEY, ServiceError, Settings

PEM_START = b"-----BEGIN "


def sign(manifest: Manifest, key_file: Path) -> Manifest:
    """The manifest with a signature by the private key in `key_file`; the same each time."""
    key = _signing_key(key_file)
    return replace(manifest, signature=base64.b64encode(key.sign(_signed(manifest))).decode())


def verify(manifest: Manifest, key_file: Path, where: str) -> None:
    """Raise a ServiceError about `where` unless the manifest is signed by a key whose public half is in the file."""
    keys = _verification_keys(key_file)
    if not manifest.signature:
        raise ServiceError(f"{where} is not signed, and {VERIFICATION_KEY} asks for a signature: do not use it")
    signature, signed = base64.b64decode(manifest.signature), _signed(manifest)
    if not any(_has_signed(key, signature, signed) for key in keys):
        raise ServiceError(f"{where} is not signed by the key of {VERIFICATION_KEY}, or was changed since")


def _has_signed(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _signed(manifest: Manifest) -> bytes:
    return manifest_json(replace(manifest, signature=""))


def check_keys(settings: Settings) -> None:
    """ValueError, naming the variable, for a key of the settings that cannot be used."""
    if settings.signing_key is not None:
        _signing_key(settings.signing_key)
    if settings.verification_key is not None:
        _verification_keys(settings.verification_key)


def _signing_key(file: Path) -> Ed25519PrivateKey:
    key = _load(partial(load_pem_private_key, password=None), _read(file, SIGNING_KEY), f"{SIGNING_KEY}={file}")
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{SIGNING_KEY}={file} holds another key than a private Ed25519 one")
    return key


def _verification_keys(file: Path) -> list[Ed25519PublicKey]:
    first, *rest = _read(file, VERIFICATION_KEY).split(PEM_START)
    blocks = [PEM_START + block for block in rest] or [first]
    keys = [_load(load_pem_public_key, block, f"{VERIFICATION_KEY}={file}") for block in blocks]
    if not all(isinstance(key, Ed25519PublicKey) for key in keys):
        raise ValueError(f"{VERIFICATION_KEY}={file} holds another key than a public Ed25519 one")
    return [key for key in keys if isinstance(key, Ed25519PublicKey)]


def _read(file: Path, variable: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{variable}={file} cannot be read ({error.strerror}); correct its path") from None


def _load(load: Callable[[bytes], object], content: bytes, where: str) -> object:
    """The key in a block of PEM; a ValueError that says nothing of its content where there is none."""
    try:
        return load(content)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{where} is not a PEM key without a password; make one with openssl") from None
