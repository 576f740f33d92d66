"""What `elastic serve` serves, with a real store and a real registry: which sizes, which pairs, and for how long."""

import os
from pathlib import Path

import pytest
from objects import make

from flows.commands.garbage import collect
from flows.commands.serve import registered_sizes
from flows.endpoint.protocol import Refused
from flows.endpoint.thinking import Pair, read_pair
from tasks import tracking
from tasks.artifacts import Store, manifest_uri, publish
from tasks.settings import Settings


def register(
    settings: Settings, store: Store, source: Path, version: str, tokenizer: bytes, family: str = "pairs"
) -> None:
    """Publish and register a version of a family, of which the two sizes have this tokenizer."""
    files = {"config.json": b"{}", "tokenizer.json": tokenizer}
    directories = {budget: make(source / version / budget, {**files, "of": budget.encode()}) for budget in "ls"}
    publish(store, family=family, version=version, directories=directories, metadata={})
    uri = manifest_uri(store.bucket, family, version)
    members = [
        tracking.Member(budget=budget, source=f"{uri.rpartition('/')[0]}/{budget}", metrics={}, tags={})
        for budget in directories
    ]
    tracking.register_family(
        settings.registry, family=family, version=version, manifest_uri=uri, run_id="", members=members
    )


def test_sizes_of_two_versions_make_a_pair_where_their_tokenizers_are_the_same(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    for version, tokenizer in (("one", b"{}"), ("two", b"{}"), ("three", b'{"of": "another text"}')):
        register(settings, store, tmp_path, version, tokenizer)
    with registered_sizes(["pairs-s:1", "pairs-l:2"]) as (sizes, named):
        assert named == ["pairs-s", "pairs-l"] == list(sizes)
        assert read_pair("pairs?think=s&answer=l", sizes) == Pair(thinks="pairs-s", answers="pairs-l")
    said = r"^pairs-s and pairs-l have different tokenizers; serve versions .* together$"
    with registered_sizes(["pairs-s:1", "pairs-l:3"]) as (sizes, _), pytest.raises(Refused, match=said):
        read_pair("pairs?think=s&answer=l", sizes)
    with registered_sizes(["pairs-s:3"]) as (sizes, _):  # and with it the size that was registered with it
        assert read_pair("pairs?think=s&answer=l", sizes)


def test_what_was_pulled_to_be_served_goes_by_its_age_and_not_while_it_is_served(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    register(settings, store, tmp_path, "one", b"{}", family="aged")

    def gc(older_than_days: float) -> None:
        def never(question: str) -> bool:
            raise AssertionError(f"asked: {question}")

        collect(settings, older_than_days=older_than_days, max_bytes=None, delete=True, confirm=never)

    place = settings.home / "served" / "aged-s-1"
    with registered_sizes(["aged-s:1"]):
        os.utime(place, (1.0, 1.0))  # it has been served since then
        left = make(settings.home / "served" / ".aged-l-1.partial", {"half": b"a"})  # of a pull that was killed
        gc(older_than_days=-1)
        assert (place / "config.json").exists() and not left.exists()
    gc(older_than_days=7)
    assert place.exists(), "it was used just now"
    gc(older_than_days=-1)
    assert not place.exists()
    with registered_sizes(["aged-s:1"]):
        assert (place / "config.json").exists()
