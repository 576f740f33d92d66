"""Laws of nested storage, against a real S3 server: a family costs what its largest member does; nothing is lost."""

import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import LIMIT_SECONDS
from objects import bytes_of, contents, failing, make, requests_of, stored

from elastic_core.files.checkpoint import read_config, tensor_shapes, write_weights
from elastic_core.files.shards import read_tensors, write_tensors
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.geometry import FfnLayout, ModelConfig
from elastic_core.subnet import full_subnet
from tasks.artifacts import NotAsRecorded, Store, fetch, manifest_uri, nested, publish, read_manifest
from tasks.artifacts.manifest import FileRecord, Manifest, NestedPart, manifest_json
from tasks.settings import ServiceError, is_transient

# What a shell has beside its data, and a pull fetches beside the weights: headers, configs, the manifest.
OVERHEAD = 1.02

CONFIG = ModelConfig(
    hybrid_override_pattern="M-M*-M-",
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=12,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    vocab_size=1000,
)
MIDDLE = dataclasses.replace(full_subnet(CONFIG), hidden=224, ffn=(640, 512, 640), mamba_heads=(8, 8, 8))
SMALLEST = dataclasses.replace(
    MIDDLE, hidden=160, ffn=(640, 128, 384), mamba_head_dim=24, attention_heads=(4,), layers=(0, 1, 2, 3, 4, 6)
)
PARTS = {"s": SMALLEST, "m": MIDDLE, "l": full_subnet(CONFIG), "family": full_subnet(CONFIG)}


@dataclasses.dataclass(frozen=True)
class Family:
    """A published family: the directories that were published, by part, and where its manifest is."""

    directories: dict[str, Path]
    uri: str

    def files(self, part: str) -> dict[str, bytes]:
        return contents(self.directories[part])

    def size(self, part: str) -> int:
        return sum(map(len, self.files(part).values()))


def make_family(home: Path, *, ffn_layout: FfnLayout) -> dict[str, Path]:
    """The elastic checkpoint and its slices, all with a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(CONFIG).items()}
    for name in weights:
        if "mixer" in name and "weight" in name:
            weights[name] = weights[name].bfloat16()
    tokenizer = make(home / "tokenizer", {"tokenizer.json": os.urandom(20_000), "vocab.json": b"{}"})
    write_weights(home / "family", CONFIG, weights, source=tokenizer)
    slices = {name: home / name for name in ("s", "m", "l")}
    for name, directory in slices.items():
        slice_checkpoint(home / "family", PARTS[name], directory, ffn_layout=ffn_layout)
    make(home / "family", {"elastic.json": b"{}", "router.safetensors": os.urandom(2_000)})
    return {**slices, "family": home / "family"}


def shells_of(directories: dict[str, Path], scratch: Path) -> tuple[dict[str, Path], tuple[NestedPart, ...]]:
    scratch.mkdir()
    members = [nested.Member(name=name, directory=directories[name], subnet=PARTS[name]) for name in PARTS]
    return nested.store(members, CONFIG, scratch)


@pytest.fixture(scope="module", params=["list", "padded"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The family's directories, and what is stored of them."""
    home = tmp_path_factory.mktemp("family")
    directories = make_family(home, ffn_layout=request.param)
    return directories, *shells_of(directories, home / "shells")


@pytest.fixture
def family(made: Any, store: Store) -> Family:
    directories, shells, parts = made
    publish(store, family="nano", version="1", directories=shells, metadata={}, nested=parts)
    return Family(directories=directories, uri=manifest_uri(store.bucket, "nano", "1"))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_comes_back_byte_for_byte_for_its_own_size(
    store: Store, family: Family, tmp_path: Path, part: str
) -> None:
    seen: list[tuple[int, int]] = []
    with bytes_of(store) as fetched:
        fetch(store, family.uri, part, tmp_path / "out", progress=lambda done, of: seen.append((done, of)))
    assert contents(tmp_path / "out") == family.files(part)
    assert sum(fetched) <= OVERHEAD * family.size(part)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_take_the_place_of_others_come_back_in_their_place(made: Any, store: Store, tmp_path: Path) -> None:
    directories, _, _ = made
    others = {name: make(tmp_path / "others" / name, {"vocab.json": name.encode()}) / "vocab.json" for name in PARTS}
    members = [
        nested.Member(name=name, directory=directories[name], subnet=subnet, instead={"vocab.json": others[name]})
        for name, subnet in PARTS.items()
    ]
    (tmp_path / "shells").mkdir()
    shells, parts = nested.store(members, CONFIG, tmp_path / "shells")
    instead = {f"{name}/vocab.json": other for name, other in others.items()}
    publish(store, family="nano", version="1", directories=shells, instead=instead, metadata={}, nested=parts)
    for name in PARTS:  # each over the one before
        fetch(store, manifest_uri(store.bucket, "nano", "1"), name, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(directories[name]) | {"vocab.json": name.encode()}


def test_a_family_takes_the_storage_of_its_largest_member(store: Store, family: Family) -> None:
    assert sum(stored(store).values()) <= OVERHEAD * family.size("family")


def test_the_smallest_slice_is_stored_as_a_stock_checkpoint_unless_it_is_padded(store: Store, family: Family) -> None:
    manifest = read_manifest(store, family.uri)
    ragged = isinstance(read_config(family.directories["s"]).intermediate_size, tuple)
    assert (manifest.stored("s") == manifest.part("s")) == ragged
    for part in ("m", "l", "family"):  # from_pretrained must not take them for one
        assert not [file.path for file in manifest.stored(part) if file.path.startswith("model")]


@pytest.mark.parametrize(("small", "large"), [*itertools.combinations(PARTS, 2)])
def test_a_larger_size_over_a_smaller_one_fetches_only_what_it_adds(
    store: Store, family: Family, tmp_path: Path, small: str, large: str
) -> None:
    fetch(store, family.uri, small, tmp_path / "out")
    with bytes_of(store) as fetched, requests_of(store) as sent:
        fetch(store, family.uri, large, tmp_path / "out")
    assert contents(tmp_path / "out") == family.files(large)
    names = list(PARTS)
    added = names[names.index(small) + 1 : names.index(large) + 1]
    keys = {parameters["Key"].removeprefix("families/nano/1/") for name, parameters in sent if name == "GetObject"}
    assert {key.partition("/")[0] for key in keys - {"manifest.json"}} <= set(added)
    real = elements(family.directories[large]) - elements(family.directories[small])
    assert sum(fetched) <= real + (OVERHEAD - 1) * family.size(large)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_size_grows_in_place_by_a_relative_path_too(
    store: Store, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("s", "m", "l"):
        fetch(store, family.uri, part, Path("out"))
        assert contents(tmp_path / "out") == family.files(part)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def elements(directory: Path) -> int:
    """The bytes of a slice's weights without those that pad it."""
    tensors = (tensor for path in directory.glob("model*.safetensors") for tensor in read_tensors(path).values())
    return sum(int(tensor.count_nonzero()) * tensor.element_size() for tensor in tensors)


def test_a_smaller_size_over_a_larger_one_is_refused(store: Store, family: Family, tmp_path: Path) -> None:
    fetch(store, family.uri, "m", tmp_path / "out")
    with pytest.raises(ServiceError, match="is not 's' of"):
        fetch(store, family.uri, "s", tmp_path / "out")
    assert contents(tmp_path / "out") == family.files("m")


@pytest.mark.parametrize("change", [{"config.json": b"{}"}, {"notes.txt": b"mine"}], ids=["changed", "added"])
def test_a_smaller_size_that_someone_changed_is_not_replaced(
    store: Store, family: Family, tmp_path: Path, change: dict[str, bytes]
) -> None:
    fetch(store, family.uri, "s", tmp_path / "out")
    before = contents(make(tmp_path / "out", change))
    with pytest.raises(ServiceError, match="choose another directory"):
        fetch(store, family.uri, "m", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_storing_the_same_family_again_gives_the_same_objects(made: Any, tmp_path: Path) -> None:
    directories, shells, parts = made
    again, same_parts = shells_of(directories, tmp_path / "again")
    assert same_parts == parts
    assert {name: contents(path) for name, path in again.items()} == {
        name: contents(path) for name, path in shells.items()
    }


def test_what_cannot_be_had_back_is_not_stored(made: Any, tmp_path: Path) -> None:
    directories, _, _ = made
    other = make_family(tmp_path / "other", ffn_layout="list")
    write_tensors(
        other["m"] / "model.safetensors",
        {name: 2 * tensor for name, tensor in read_tensors(other["m"] / "model.safetensors").items()},
    )
    with pytest.raises(ServiceError, match=r"cannot be put together: its shells make another model\.safetensors"):
        shells_of({**directories, **other}, tmp_path / "shells")


# Interruptions

PULL = """
import os, signal, sys
from pathlib import Path
from tasks.artifacts import fetch, open_store
from tasks.settings import Settings

uri, part, directory, when = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total):
    if when.isdigit() and done * 100 >= int(when) * total:
        die()

def rename_unless_new(source, target, rename=os.rename):
    if when == "before the new" and Path(target) == Path(directory):
        die()
    rename(source, target)

os.rename = rename_unless_new
fetch(open_store(Settings.from_environment()), uri, part, Path(directory), progress=progress)
"""


@pytest.mark.services
@pytest.mark.parametrize("made", ["padded"], indirect=True)
@pytest.mark.parametrize("over", [None, "s"], ids=["new", "over s"])
@pytest.mark.parametrize("when", ["20", "60", "100", "before the new"])
def test_a_pull_that_is_killed_anywhere_leaves_nothing_half_made_and_goes_on(
    store: Store, family: Family, tmp_path: Path, when: str, over: str | None
) -> None:
    out = tmp_path / "out"
    if over:
        fetch(store, family.uri, over, out)
    command = [sys.executable, "-c", PULL, family.uri, "l", str(out), when]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(out) == (family.files(over) if over and when != "before the new" else {})
    had = sum(path.stat().st_size for path in (tmp_path / ".out.partial").rglob("*") if path.is_file())
    with bytes_of(store) as fetched:
        fetch(store, family.uri, "l", out)
    assert contents(out) == family.files("l")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if when == "20":
        assert 0 < sum(fetched) <= OVERHEAD * family.size("l") - had
    else:  # it was being put together: all but the manifest was there
        assert len(fetched) == 1


# What the manifest says and the bucket holds, from outside


def rewritten(store: Store, family: Family, change: Callable[[Manifest], Manifest]) -> None:
    body = manifest_json(change(read_manifest(store, family.uri)))
    store.client.put_object(Bucket=store.bucket, Key="families/nano/1/manifest.json", Body=body)


def with_object(store: Store, path: str, body: bytes) -> Callable[[Manifest], Manifest]:
    """Another object in a shell's place, with its own size and digest in the manifest."""
    store.client.put_object(Bucket=store.bucket, Key=f"families/nano/1/{path}", Body=body)
    record = FileRecord(path=path, size=len(body), sha256=hashlib.sha256(body).hexdigest())
    return lambda manifest: dataclasses.replace(
        manifest, files=(*(file for file in manifest.files if file.path != path), record)
    )


def with_part(name: str, change: Callable[[NestedPart], NestedPart]) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(
        manifest, nested=tuple(change(part) if part.name == name else part for part in manifest.nested)
    )


def promising(path: str) -> Callable[[Manifest], Manifest]:
    more = FileRecord(path=path, size=1, sha256="0" * 64)
    return with_part("m", lambda part: dataclasses.replace(part, files=(*part.files, more)))


def object_at(store: Store, key: str, body: bytes) -> None:
    store.client.put_object(Bucket=store.bucket, Key=f"families/nano/1/{key}", Body=body)


def body_of(store: Store, key: str) -> bytes:
    body: bytes = store.client.get_object(Bucket=store.bucket, Key=f"families/nano/1/{key}")["Body"].read()
    return body


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def shell_with(store: Store, **changes: Any) -> bytes:
    return json.dumps({**json.loads(body_of(store, "m/shell.json")), **changes}).encode()


Attack = Callable[[Store, Family], object]
ATTACKS: dict[str, tuple[Attack, str]] = {
    "a shell is changed": (
        lambda s, f: object_at(s, "m/shell.safetensors", flipped(body_of(s, "m/shell.safetensors"))),
        "m/shell.safetensors is corrupt: its SHA-256",
    ),
    "a shell is cut": (
        lambda s, f: object_at(s, "m/shell.safetensors", body_of(s, "m/shell.safetensors")[:-1]),
        "not the expected",
    ),
    "a shell is gone": (
        lambda s, f: s.client.delete_object(Bucket=s.bucket, Key="families/nano/1/m/shell.safetensors"),
        "m/shell.safetensors does not exist",
    ),
    "a shell is changed and listed so": (
        lambda s, f: rewritten(s, f, with_object(s, "m/shell.safetensors", flipped(body_of(s, "m/shell.safetensors")))),
        "its shells make another model.safetensors",
    ),
    "shell.json is another's": (
        lambda s, f: rewritten(s, f, with_object(s, "m/shell.json", body_of(s, "l/shell.json"))),
        "cannot be put together: .*shell.json",
    ),
    "shell.json is a pickle": (
        lambda s, f: rewritten(s, f, with_object(s, "m/shell.json", b"\x80\x04.")),
        "cannot be put together: .*not valid JSON",
    ),
    "shell.json has nothing below": (
        lambda s, f: rewritten(s, f, with_object(s, "m/shell.json", shell_with(s, below=None))),
        "cannot be put together: .*below is None",
    ),
    "shell.json is of the future": (
        lambda s, f: rewritten(s, f, with_object(s, "m/shell.json", shell_with(s, format_version=2))),
        "cannot be put together: .*format_version is 2",
    ),
    "a file is promised that is nowhere": (
        lambda s, f: rewritten(s, f, promising("tokenizer.model")),
        "m/tokenizer.model of 1 is not stored",
    ),
    "weights are promised that no shell makes": (
        lambda s, f: rewritten(s, f, promising("model-00007-of-00009.safetensors")),
        "make another model-00007",
    ),
    "a config of another shape": (
        lambda s, f: rewritten(
            s,
            f,
            with_part(
                "m",
                lambda part: dataclasses.replace(
                    part,
                    files=tuple(
                        next(file for file in read_manifest(s, f.uri).part("l") if file.path == "config.json")
                        if file.path == "config.json"
                        else file
                        for file in part.files
                    ),
                ),
            ),
        ),
        "cannot be put together",
    ),
    "an object that is not listed": (
        lambda s, f: object_at(s, "m/model.safetensors", b"mine"),
        "m/model.safetensors is not in the manifest",
    ),
    "a part that is no part": (
        lambda s, f: rewritten(
            s, f, lambda manifest: dataclasses.replace(manifest, nested=manifest.nested[:1] + manifest.nested[2:])
        ),
        "has no part 'm'; it has family, l, s",
    ),
}


@pytest.mark.parametrize("made", ["padded"], indirect=True)
@pytest.mark.parametrize("case", ATTACKS)
def test_a_nested_version_that_was_tampered_with_is_refused_with_the_reason(
    store: Store, family: Family, tmp_path: Path, case: str
) -> None:
    attack, reason = ATTACKS[case]
    attack(store, family)
    with pytest.raises(ServiceError, match=reason) as caught:
        fetch(store, family.uri, "m", tmp_path / "out")
    assert "\n" not in str(caught.value) and not is_transient(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", ["padded"], indirect=True)
def test_an_interrupted_pull_over_a_smaller_size_leaves_that_one(store: Store, family: Family, tmp_path: Path) -> None:
    fetch(store, family.uri, "s", tmp_path / "out")
    with failing(store, "GetObject", on_call=3), pytest.raises(ConnectionResetError):
        fetch(store, family.uri, "m", tmp_path / "out")
    assert contents(tmp_path / "out") == family.files("s")
    fetch(store, family.uri, "m", tmp_path / "out")
    assert contents(tmp_path / "out") == family.files("m")


@pytest.mark.parametrize("part", PARTS)
def test_shells_of_what_is_not_as_it_was_recorded_are_not_published(store: Store, made: Any, part: str) -> None:
    directories, shells, parts = made
    recorded = {
        name: {file: hashlib.sha256(content).hexdigest() for file, content in contents(directory).items()}
        for name, directory in directories.items()
    }
    recorded[part]["model.safetensors"] = "0" * 64
    told = f"{part}/model.safetensors is not as it was recorded; nothing is published"
    with pytest.raises(NotAsRecorded, match=told):
        publish(store, family="nano", version="1", directories=shells, metadata={}, nested=parts, recorded=recorded)
    assert not stored(store)
