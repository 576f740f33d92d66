"""Signed manifests: an Ed25519 signature over everything else that a manifest says.

The keys are PEM files, as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them.
"""

import base64
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from tasks.artifacts.manifest import Manifest, manifest_json
from tasks.settings import SIGNING_KEY, VERIFICATION_KEY, ServiceError, Settings


def sign(manifest: Manifest, key_file: Path) -> Manifest:
    """The manifest with a signature by the private key in `key_file`; the same each time."""
    key = _signing_key(key_file)
    return replace(manifest, signature=base64.b64encode(key.sign(_signed(manifest))).decode())


def verify(manifest: Manifest, key_file: Path, where: str) -> None:
    """Raise a ServiceError about `where` unless the manifest is signed by the key with this public half."""
    key = _verification_key(key_file)
    if not manifest.signature:
        raise ServiceError(f"{where} is not signed, and {VERIFICATION_KEY} asks for a signature: do not use it")
    try:
        key.verify(base64.b64decode(manifest.signature), _signed(manifest))
    except InvalidSignature:
        raise ServiceError(f"{where} is not signed by the key of {VERIFICATION_KEY}, or was changed since") from None


def _signed(manifest: Manifest) -> bytes:
    return manifest_json(replace(manifest, signature=""))


def check_keys(settings: Settings) -> None:
    """ValueError, naming the variable, for a key of the settings that cannot be used."""
    if settings.signing_key is not None:
        _signing_key(settings.signing_key)
    if settings.verification_key is not None:
        _verification_key(settings.verification_key)


def _signing_key(file: Path) -> Ed25519PrivateKey:
    key = _load(file, SIGNING_KEY)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{SIGNING_KEY}={file} holds another key than a private Ed25519 one")
    return key


def _verification_key(file: Path) -> Ed25519PublicKey:
    key = _load(file, VERIFICATION_KEY)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{VERIFICATION_KEY}={file} holds another key than a public Ed25519 one")
    return key


def _load(path: Path, variable: str) -> object:
    """The key in a PEM file; a ValueError that says nothing of its content where there is none."""
    load = load_pem_public_key if variable == VERIFICATION_KEY else _load_private
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{variable}={path} cannot be read ({error.strerror}); correct its path") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{variable}={path} is not a PEM key without a password; make one with openssl") from None


def _load_private(content: bytes) -> object:
    return load_pem_private_key(content, password=None)
