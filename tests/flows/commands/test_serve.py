"""What `elastic serve` serves, with a real store and a real registry: which sizes, and which of them make a pair."""

from pathlib import Path

import pytest
from objects import make

from flows.commands.serve import registered_sizes
from flows.endpoint.protocol import Refused
from flows.endpoint.thinking import Pair, read_pair
from tasks import tracking
from tasks.artifacts import Store, manifest_uri, publish
from tasks.settings import Settings


def register(settings: Settings, store: Store, source: Path, version: str, tokenizer: bytes) -> None:
    """Publish and register a version of the family pairs, of which the two sizes have this tokenizer."""
    files = {"config.json": b"{}", "tokenizer.json": tokenizer}
    directories = {budget: make(source / version / budget, {**files, "of": budget.encode()}) for budget in "ls"}
    publish(store, family="pairs", version=version, directories=directories, metadata={})
    uri = manifest_uri(store.bucket, "pairs", version)
    members = [
        tracking.Member(budget=budget, source=f"{uri.rpartition('/')[0]}/{budget}", metrics={}, tags={})
        for budget in directories
    ]
    tracking.register_family(
        settings.registry, family="pairs", version=version, manifest_uri=uri, run_id="", members=members
    )


def test_sizes_of_two_versions_make_a_pair_where_their_tokenizers_are_the_same(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    for version, tokenizer in (("one", b"{}"), ("two", b"{}"), ("three", b'{"of": "another text"}')):
        register(settings, store, tmp_path, version, tokenizer)
    sizes, named = registered_sizes(["pairs-s:1", "pairs-l:2"])
    assert named == ["pairs-s", "pairs-l"] == list(sizes)
    assert read_pair("pairs?think=s&answer=l", sizes) == Pair(thinks="pairs-s", answers="pairs-l")
    sizes, _ = registered_sizes(["pairs-s:1", "pairs-l:3"])
    with pytest.raises(Refused, match=r"^pairs-s and pairs-l have different tokenizers; serve versions .* together$"):
        read_pair("pairs?think=s&answer=l", sizes)
    sizes, _ = registered_sizes(["pairs-s:3"])  # and with it the size that was registered with it
    assert read_pair("pairs?think=s&answer=l", sizes)
