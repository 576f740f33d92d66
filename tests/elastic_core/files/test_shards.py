import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from elastic_core.files import shards
from elastic_core.files.shards import (
    CheckpointError,
    TensorInfo,
    is_finite,
    read_header,
    read_json,
    read_tensors,
    regular_file,
    select,
    write_shards,
    write_tensors,
)


def example_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "single": torch.randn(4, 1, 3, generator=generator),
        "double": torch.randn(2, generator=generator).double(),
        "short": torch.randn(7, generator=generator).half(),
        "indices": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


def plan_of(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(directory: Path, tensors: dict[str, Tensor], **options: object) -> dict[str, str]:
    return write_shards(directory, plan_of(tensors), lambda name: [tensors[name]], **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many pieces":
        monkeypatch.setattr(shards, "CHUNK_BYTES", 100)
        monkeypatch.setattr(shards, "BLOCK_BYTES", 300)


# The format, against the safetensors library


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", example_tensors())
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), example_tensors())


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    safetensors.torch.save_file(example_tensors(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_same(read_tensors(tmp_path / "x.safetensors"), example_tensors())


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", example_tensors())
    for tensor in read_header(tmp_path / "x.safetensors").values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_non_contiguous_and_grad_carrying_tensors_are_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(12.0, requires_grad=True).view(3, 4).T[1:, :2]
    write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    assert_same(read_tensors(tmp_path / "x.safetensors"), {"x": tensor.detach()})


# Shards


def test_shards_hold_what_one_file_holds_and_none_is_too_large(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 8, generator=torch.Generator().manual_seed(i)) for i in range(9)}
    digests = write(tmp_path, tensors, max_shard_bytes=600)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert list(digests) == [f"model-{i:05d}-of-{len(digests):05d}.safetensors" for i in range(1, len(digests) + 1)]
    found = {}
    for name in digests:
        part = read_tensors(tmp_path / name)
        assert all(index["weight_map"][key] == name for key in part)
        assert sum(tensor.nbytes for tensor in part.values()) <= 600
        found |= part
    assert len(digests) > 2
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same(found, tensors)


@pytest.mark.usefixtures("pieces")
def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    digests = write(tmp_path, example_tensors(), max_shard_bytes=40)
    assert digests.keys() == {path.name for path in tmp_path.glob("*.safetensors")}
    for name, digest in digests.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


@pytest.mark.usefixtures("pieces")
def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tensors = example_tensors()
    write(tmp_path, tensors, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_the_writer_is_a_few_chunks_behind_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More would be held in memory at once."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", 40)
    made, behind = 0, []

    def blocks(name: str) -> Iterator[Tensor]:
        nonlocal made
        for _ in range(50):
            made += 40
            yield torch.ones(10)

    write_shards(
        tmp_path,
        {"x": TensorInfo(dtype=torch.float32, shape=(500,))},
        blocks,
        progress=lambda done, total: behind.append(made - done),
    )
    assert len(behind) == 50
    assert max(behind) <= 40 * (shards.CHUNKS_AHEAD + 1)


def test_a_failure_of_any_part_is_raised_and_no_thread_stays(tmp_path: Path) -> None:
    before = threading.active_count()

    def blocks(name: str) -> Iterator[Tensor]:
        yield torch.ones(10)
        raise CheckpointError("bad tensor")

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    plan = {"x": TensorInfo(dtype=torch.float32, shape=(20,))}
    with pytest.raises(CheckpointError, match="bad tensor"):
        write_shards(tmp_path, plan, blocks)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, plan, blocks, progress=progress)
    assert threading.active_count() == before


# Selections, in bounded pieces


SELECTIONS: dict[str, Callable[[torch.Generator], Tensor | None]] = {
    "all": lambda g: None,
    "prefix": lambda g: torch.arange(11),
    "run": lambda g: torch.arange(3, 17),
    "one": lambda g: torch.tensor([13]),
    "groups": lambda g: torch.cat([torch.arange(0, 5), torch.arange(9, 12), torch.arange(16, 20)]),
    "permutation": lambda g: torch.randperm(20, generator=g),
    "sample": lambda g: torch.randperm(20, generator=g)[:7],
}


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("rows", SELECTIONS)
@pytest.mark.parametrize("columns", SELECTIONS)
def test_blocks_of_a_selection_make_the_selection(tmp_path: Path, rows: str, columns: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(20, 20, 2, generator=generator).to(torch.bfloat16)
    write_tensors(tmp_path / "x.safetensors", {"before": torch.zeros(3), "x": tensor})
    stored = read_header(tmp_path / "x.safetensors")["x"]
    indices = (SELECTIONS[rows](generator), SELECTIONS[columns](generator), None)
    expected = tensor if indices[0] is None else tensor[indices[0]]
    expected = expected if indices[1] is None else expected[:, indices[1]]
    assert torch.equal(torch.cat(list(stored.blocks(*indices))), expected)
    assert torch.equal(select(tensor, indices), expected)
    assert torch.equal(stored.read(), tensor)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read of a tensor's data."""
    counts: list[int] = []
    readv = os.readv

    def watched(descriptor: int, buffers: Sequence[memoryview]) -> int:
        counts.append(readv(descriptor, buffers))
        return counts[-1]

    monkeypatch.setattr(os, "readv", watched)
    return counts


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("rows", SELECTIONS)
def test_rows_that_are_not_selected_are_not_read(tmp_path: Path, rows: str, reads: list[int]) -> None:
    write_tensors(tmp_path / "x.safetensors", {"x": torch.randn(20, 5)})
    selected = SELECTIONS[rows](torch.Generator().manual_seed(0))
    list(read_header(tmp_path / "x.safetensors")["x"].blocks(selected, None))
    assert sum(reads) == (20 if selected is None else len(selected)) * 20


def test_no_block_and_no_read_exceeds_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 128)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 512)
    write_tensors(tmp_path / "x.safetensors", {"x": torch.randn(100, 8)})
    stored = read_header(tmp_path / "x.safetensors")["x"]
    for rows, bound in ((None, 128), (torch.randperm(100, generator=torch.Generator().manual_seed(0)), 512)):
        reads.clear()
        assert max(block.nbytes for block in stored.blocks(rows, None)) <= 128
        assert max(reads) <= bound


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("most", [1, 7, 60])
def test_reads_that_return_less_than_was_asked_for_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As those of network file systems may."""
    tensor = torch.randn(20, 3)
    write_tensors(tmp_path / "x.safetensors", {"before": torch.zeros(3), "x": tensor})
    readv = os.readv
    monkeypatch.setattr(os, "readv", lambda descriptor, buffers: readv(descriptor, [buffers[0][:most]]))
    stored = read_header(tmp_path / "x.safetensors")["x"]
    for rows in (None, torch.randperm(20, generator=torch.Generator().manual_seed(0))):
        expected = tensor if rows is None else tensor[rows]
        assert torch.equal(torch.cat(list(stored.blocks(rows, None))), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_nan_or_infinity_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(1000, dtype=dtype)
    tensor[137] = torch.finfo(dtype).max
    assert is_finite(tensor)
    for position in (0, 500, 999):
        tensor = torch.zeros(1000, dtype=dtype)
        tensor[position] = bad
        assert not is_finite(tensor)


# Files that lie


def header_and_data(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Replace the header by what `change` returns, or by the header after it."""
    header, data = header_and_data(path)
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def set_entry(**fields: object) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda header: header["x"].update(fields))


def overlap(path: Path) -> None:
    def change(header: dict) -> None:
        header["y"]["data_offsets"] = [0, 8]

    rewrite(path, change)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda p: p.write_bytes(b""), "is truncated: 0 bytes"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:20]), "is truncated: 20 bytes"),
    "cut in its data": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "is truncated: [0-9]+ bytes, its header"),
    "more data": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "has trailing bytes"),
    "absurd header size": (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()), "claims a header of [0-9]+ bytes"),
    "header no JSON": (lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "is not valid JSON"),
    "header no UTF-8": (lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{\xff\xff}"), "is not valid JSON"),
    "header a list": (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), "holds a JSON list"),
    "header too deep": (
        lambda p: p.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
        "is not valid JSON",
    ),
    "key twice": (
        lambda p: p.write_bytes((15).to_bytes(8, "little") + b'{"x":1, "x": 2}'),
        "the key 'x' occurs twice",
    ),
    "metadata a number": (lambda p: rewrite(p, lambda h: h.update(__metadata__=3)), "__metadata__ is 3"),
    "entry a number": (lambda p: rewrite(p, lambda h: h.update(x=3)), "x: is 3; expected dtype"),
    "entry without offsets": (lambda p: rewrite(p, lambda h: h["x"].pop("data_offsets") and None), "x: is {"),
    "dtype unknown": (set_entry(dtype="F8_E4M3"), "x: has dtype 'F8_E4M3'; expected one of F64, F32"),
    "dtype a list": (set_entry(dtype=[]), r"x: has dtype \[\]"),
    "dtype wider": (set_entry(dtype="F64"), "x: has data_offsets .* takes 48 bytes"),
    "shape negative": (set_entry(shape=[-2, -3]), "x: has shape .* expected whole numbers"),
    "shape a fraction": (set_entry(shape=[2.0, 3]), "x: has shape .* expected whole numbers"),
    "shape true": (set_entry(shape=[True, 6]), "x: has shape .* expected whole numbers"),
    "shape enormous": (set_entry(shape=[10**30, 10**30]), "x: has data_offsets"),
    "offsets three": (set_entry(data_offsets=[0, 24, 24]), "x: has shape .* expected whole numbers"),
    "offsets reversed": (set_entry(data_offsets=[24, 0]), "x: has data_offsets"),
    "offsets outside": (set_entry(data_offsets=[1000, 1024]), "begins at byte"),
    "overlap": (overlap, "begins at byte"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(2, 3), "y": torch.ones(2)})
    break_it, message = BAD_FILES[case]
    break_it(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(200, 3)})
    stored = read_header(path)["x"]
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="became shorter"):
        stored.read()


def test_json_files_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "is not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("3", "holds a JSON int"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    path.write_text('{"a": [1, {"b": null}]}')
    assert read_json(path) == {"a": [1, {"b": None}]}


def test_only_plain_names_of_real_files_are_followed(tmp_path: Path) -> None:
    home = tmp_path / "checkpoint"
    (home / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (home / "file").write_text("f")
    (home / "alias").symlink_to("file")
    (home / "leak").symlink_to(tmp_path / "secret")
    assert regular_file(home, "file") == home / "file"
    assert regular_file(home, "alias") == home / "alias"
    for name in ("../secret", "/etc/passwd", str(tmp_path / "secret"), "inner/../file", "..\\secret"):
        with pytest.raises(CheckpointError, match="is not a plain file name"):
            regular_file(home, name)
    for name in ("nothing", "inner", "..", ""):
        with pytest.raises(CheckpointError, match="there is no such file"):
            regular_file(home, name)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        regular_file(home, "leak")


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text("weights")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    assert regular_file(snapshot, "config.json").read_text() == "weights"


# A disk that is full


def test_too_little_space_is_noticed_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match=r"disk full: [0-9]+ bytes to write, 10 free") as caught:
        write(tmp_path, example_tensors())
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="disk full; free some space and run again") as caught:
        write(tmp_path, example_tensors())
    assert caught.value.errno == errno.ENOSPC


def test_blocks_that_contradict_the_plan_are_refused(tmp_path: Path) -> None:
    plan = {"x": TensorInfo(dtype=torch.float32, shape=(3,))}

    def written(*tensors: Tensor) -> Callable[[str], Iterator[Tensor]]:
        return lambda name: iter(tensors)

    with pytest.raises(AssertionError, match="x has 8 bytes, planned 12"):
        write_shards(tmp_path, plan, written(torch.ones(2)))
    with pytest.raises(AssertionError, match=r"x is torch\.float64"):
        write_shards(tmp_path, plan, written(torch.ones(3, dtype=torch.float64)))
