"""Laws of nested storage: shells hold a family once, and give back every slice to the byte."""

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes

from elastic_core.files import shards, shells
from elastic_core.files.checkpoint import CheckpointError, read_config, tensor_shapes, write_weights
from elastic_core.files.reorder import identity_order, write_order
from elastic_core.files.shards import read_tensors, write_tensors
from elastic_core.files.shells import SHELL_FILE, assemble, write_shell
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.geometry import FFN, FfnLayout, ModelConfig
from elastic_core.subnet import Subnet, full_subnet, within

FAMILIES = 25


def random_config(rng: random.Random) -> ModelConfig:
    groups, kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    pattern = "".join(rng.choice("M-*") for _ in range(rng.randint(2, 7)))
    ffn = tuple(rng.randint(3, 20) for _ in range(pattern.count(FFN)))
    return ModelConfig(
        hybrid_override_pattern=pattern,
        hidden_size=rng.randint(5, 24),
        intermediate_size=ffn if len(set(ffn)) > 1 else rng.randint(3, 20),
        num_attention_heads=kv_heads * rng.randint(1, 4),
        num_key_value_heads=kv_heads,
        head_dim=rng.randint(2, 5),
        mamba_num_heads=groups * rng.randint(1, 5),
        mamba_head_dim=rng.randint(1, 5),
        ssm_state_size=rng.randint(1, 4),
        n_groups=groups,
        vocab_size=rng.randint(7, 40),
        use_conv_bias=rng.random() < 0.5,
        chunk_size=4,
    )


def shrunk(subnet: Subnet, config: ModelConfig, rng: random.Random) -> Subnet:
    """A subnet within this one; each axis stays or shrinks, so that now and then nothing is added on it."""

    def smaller(size: int, step: int = 1) -> int:
        return size if rng.random() < 0.3 else step * rng.randint(1, size // step)

    def heads(sizes: tuple[int, ...], step: int) -> tuple[int, ...]:
        return (smaller(min(sizes), step),) * len(sizes) if sizes else ()

    layers = [layer for layer in subnet.layers if rng.random() < 0.8] or [subnet.layers[0]]
    return Subnet(
        hidden=smaller(subnet.hidden),
        ffn=tuple(smaller(width) for width in subnet.ffn),
        mamba_heads=heads(subnet.mamba_heads, config.n_groups),
        mamba_head_dim=smaller(subnet.mamba_head_dim),
        attention_heads=heads(subnet.attention_heads, config.num_key_value_heads),
        layers=tuple(layers),
    )


def write_random(directory: Path, config: ModelConfig, rng: random.Random) -> Path:
    """A checkpoint with weights of both precisions."""
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    weights = {
        name: torch.randn(shape, generator=generator).to(rng.choice([torch.float32, torch.bfloat16]))
        for name, shape in tensor_shapes(config).items()
    }
    energy_D = torch.rand(config.hidden_size, generator=generator).sort(descending=True).values + 0.01

    def beside(staging: Path) -> None:
        write_order(staging, dataclasses.replace(identity_order(config), energy=energy_D))

    write_weights(directory, config, weights, beside=beside)
    return directory


def cut(full: Path, subnets: list[Subnet], target: Path, *, ffn_layout: FfnLayout = "list") -> list[Path]:
    """The slice of every subnet."""
    slices = [target / f"slice-{i}" for i in range(len(subnets))]
    for subnet, directory in zip(subnets, slices, strict=True):
        slice_checkpoint(full, subnet, directory, ffn_layout=ffn_layout)
    return slices


def store(full: Path, subnets: list[Subnet], slices: list[Path], target: Path) -> list[Path]:
    """The shell of every subnet, from the smallest; the first is over nothing."""
    config = read_config(full)
    stored = [target / f"shell-{i}" for i in range(len(subnets))]
    below = [None, *(within(small, large, config) for small, large in itertools.pairwise(subnets))]
    for subnet, inner, source, directory in zip(subnets, below, slices, stored, strict=True):
        write_shell(source, directory, own=within(subnet, subnet, config), below=inner)
    return stored


def weights_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("model*")}


def assembled(source: Path, chain: list[Path], target: Path) -> dict[str, bytes]:
    """What a chain of shells gives, beside the config.json of the slice that it should be."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    assemble(target, chain)
    return weights_of(target)


def small_pieces(patch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """Chunks of a few rows, and files of a few tensors, on both sides."""
    assign, most = shards._assign_shards, rng.choice([400, 3000, 10**9])
    patch.setattr(shards, "CHUNK_BYTES", rng.choice([50, 500, 2**20]))
    patch.setattr(shards, "BLOCK_BYTES", rng.choice([90, 900, 2**20]))
    patch.setattr(shards, "_assign_shards", lambda plan, size: assign(plan, min(size, most)))


@pytest.mark.parametrize("seed", range(FAMILIES))
def test_every_slice_of_a_random_family_comes_back_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    small_pieces(monkeypatch, rng)
    config = random_config(rng)
    full = write_random(tmp_path / "full", config, rng)
    subnets = [full_subnet(config)]
    for _ in range(rng.randint(1, 3)):
        subnets.insert(0, shrunk(subnets[0], config, rng))
    slices = cut(full, subnets, tmp_path, ffn_layout="padded" if rng.random() < 0.5 else "list")
    stored = store(full, subnets, slices, tmp_path)
    for size in range(len(subnets)):
        expected = weights_of(slices[size])
        assert assembled(slices[size], stored[: size + 1], tmp_path / f"again-{size}") == expected
        for whole in range(size):  # a slice that is there already takes the place of its shell and all below
            chain = [slices[whole], *stored[whole + 1 : size + 1]]
            assert assembled(slices[size], chain, tmp_path / f"over-{size}-{whole}") == expected


@pytest.fixture
def family(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Three slices of the tiny model and their shells, the smallest first."""
    middle = dataclasses.replace(
        full_subnet(tiny_config), hidden=40, ffn=(24, 32, 40), mamba_heads=(8, 8, 8), layers=(0, 1, 2, 3, 4, 6, 7)
    )
    small = dataclasses.replace(
        middle, hidden=32, ffn=(16, 32, 8), mamba_head_dim=4, attention_heads=(2, 2), layers=(0, 1, 2, 3, 4, 7)
    )
    subnets = [small, middle, full_subnet(tiny_config)]
    slices = cut(tiny_checkpoint, subnets, tmp_path, ffn_layout="padded")
    return slices, store(tiny_checkpoint, subnets, slices, tmp_path)


def elements(paths: list[Path]) -> int:
    return sum(tensor.numel() for path in paths for tensor in read_tensors(path).values())


def test_the_shells_of_a_family_have_every_weight_of_its_largest_member_once_but_for_norms_of_each_hidden_size(
    family: tuple[list[Path], list[Path]],
) -> None:
    slices, stored = family
    norms = sum(
        tensor.numel()
        for smaller in slices[:-1]
        for name, tensor in read_tensors(smaller / "model.safetensors").items()
        if name.endswith((".norm.weight", "norm_f.weight")) and "mixer" not in name
    )
    largest = elements([slices[-1] / "model.safetensors"])
    assert elements([path for shell in stored for path in shell.glob("*.safetensors")]) == largest + norms


def test_shells_whose_norms_are_shared_are_read_as_they_were_written(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they were before hidden sizes had gains, and said nothing of norms."""
    subnets = [dataclasses.replace(full_subnet(tiny_config), hidden=32), full_subnet(tiny_config)]
    slices = cut(tiny_checkpoint, subnets, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shells, "_is_own", lambda place, shell: False)
        stored = store(tiny_checkpoint, subnets, slices, tmp_path)
    for shell in stored:
        said = json.loads((shell / SHELL_FILE).read_text())
        del said["norms"]
        (shell / SHELL_FILE).write_text(json.dumps(said))
    assert elements([path for shell in stored for path in shell.glob("*.safetensors")]) == elements(
        [slices[-1] / "model.safetensors"]
    )
    assert assembled(slices[-1], stored, tmp_path / "again") == weights_of(slices[-1])


def test_the_shell_over_nothing_is_the_stock_checkpoint(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    write_shell(tiny_checkpoint, tmp_path / "shell", own=full_subnet(tiny_config), below=None)
    slice_checkpoint(tiny_checkpoint, full_subnet(tiny_config), tmp_path / "slice")
    stock = (tmp_path / "slice" / "model.safetensors").read_bytes()
    assert (tmp_path / "shell" / "shell.safetensors").read_bytes() == stock


def test_the_same_slice_again_adds_nothing(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    full = full_subnet(tiny_config)
    slice_checkpoint(tiny_checkpoint, full, tmp_path / "slice")
    write_shell(tmp_path / "slice", tmp_path / "shell", own=full, below=full)
    assert [path.name for path in (tmp_path / "shell").iterdir()] == [SHELL_FILE]
    again = assembled(tmp_path / "slice", [tmp_path / "slice", tmp_path / "shell"], tmp_path / "again")
    assert again == weights_of(tmp_path / "slice")


def test_the_memory_of_storing_and_assembling_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 100_000)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 100_000)
    peaks = []
    for vocab_size in (4000, 16000):
        home = tmp_path / str(vocab_size)
        config = dataclasses.replace(random_config(random.Random(1)), vocab_size=vocab_size, hidden_size=24)
        subnets = [dataclasses.replace(full_subnet(config), hidden=size) for size in (12, 18, 24)]
        full = write_random(home / "full", config, random.Random(0))
        slices = cut(full, subnets, home)
        with LiveBytes() as live:
            stored = store(full, subnets, slices, home)
            assembled(slices[-1], stored, home / "again")
        peaks.append(live.peak)
    # Indices of 8 bytes, in both matrices of a row a token, at three levels and once more on the way, may grow.
    assert peaks[1] - peaks[0] <= 8 * 2 * 3 * 2 * (16000 - 4000)


# Shells from outside


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)


def narrow(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({key: tensors[key][:-1].clone()})


def below(shell: Path, **changes: Any) -> None:
    edit(shell / SHELL_FILE, below={**json.loads((shell / SHELL_FILE).read_text())["below"], **changes})


EMBEDDINGS = "backbone.embeddings.weight.columns"
NORM = "backbone.norm_f.weight"

HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shell.json": (lambda shell: (shell / SHELL_FILE).unlink(), "shell.json: there is no such file"),
    "shell.json not JSON": (lambda shell: (shell / SHELL_FILE).write_text("{"), "is not valid JSON"),
    "shell.json a list": (lambda shell: (shell / SHELL_FILE).write_text("[]"), "holds a JSON list"),
    "shell.json a link": (
        lambda shell: ((shell / SHELL_FILE).unlink(), (shell / SHELL_FILE).symlink_to("/etc/hostname")),
        "links to /etc/hostname, outside",
    ),
    "a key twice": (
        lambda shell: (shell / SHELL_FILE).write_text('{"ffn": [], "ffn": []}'),
        "the key 'ffn' occurs twice",
    ),
    "another format": (lambda shell: edit(shell / SHELL_FILE, format_version=2), "format_version is 2"),
    "an unknown field": (lambda shell: edit(shell / SHELL_FILE, run="rm"), "run is not a known setting"),
    "ffn of other layers": (lambda shell: edit(shell / SHELL_FILE, ffn=[8, 8]), "ffn: subnet.ffn has 2 entries"),
    "ffn above the slice": (lambda shell: edit(shell / SHELL_FILE, ffn=[24, 32, 41]), "ffn: subnet is larger"),
    "ffn below the shell": (lambda shell: edit(shell / SHELL_FILE, ffn=[24, 32, 39]), "expected floats of shape"),
    "ffn of text": (lambda shell: edit(shell / SHELL_FILE, ffn=["a", 1, 1]), "expected a number"),
    "nothing below": (lambda shell: edit(shell / SHELL_FILE, below=None), "below is None; there are 1 slices below"),
    "below larger": (lambda shell: below(shell, hidden=41), "below: subnet is larger"),
    "below negative": (lambda shell: below(shell, hidden=-1), "below: subnet has a size below 1"),
    "below huge": (lambda shell: below(shell, hidden=10**18), "below: subnet is larger"),
    "below with layers out of order": (lambda shell: below(shell, layers=[1, 0, 3, 4, 6]), "layers out of order"),
    "below with a layer twice": (lambda shell: below(shell, layers=[0, 0, 3, 4, 6]), "layers out of order"),
    "below without layers": (lambda shell: below(shell, layers=[]), "layers out of order"),
    "below with a layer too many": (lambda shell: below(shell, layers=[0, 1, 3, 4, 7]), "below: subnet is larger"),
    "below with heads between groups": (lambda shell: below(shell, mamba_heads=[3, 3]), "not a multiple of n_groups"),
    "below with other heads by layer": (lambda shell: below(shell, mamba_heads=[8, 4]), "heads that differ by layer"),
    "below narrower than stored": (lambda shell: below(shell, hidden=30), "expected floats of shape"),
    "a tensor missing": (
        lambda shell: retensor(shell / "shell.safetensors", lambda t: t.pop(NORM)),
        "missing: .*norm_f",
    ),
    "a tensor too many": (
        lambda shell: retensor(shell / "shell.safetensors", lambda t: t.update(extra=torch.ones(1))),
        "unexpected: .*extra",
    ),
    "a tensor too short": (lambda shell: retensor(shell / "shell.safetensors", narrow(EMBEDDINGS)), "expected floats"),
    "a tensor of numbers": (
        lambda shell: retensor(shell / "shell.safetensors", lambda t: t.update({NORM: t[NORM].long()})),
        "expected floats",
    ),
    "a tensor of another type than below": (
        lambda shell: retensor(shell / "shell.safetensors", lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].double()})),
        "embeddings.weight: its parts are",
    ),
    "a tensor with NaN": (
        lambda shell: retensor(shell / "shell.safetensors", lambda t: t[NORM].fill_(torch.nan)),
        "norm_f.weight: holds NaN or infinity",
    ),
    "a tensor in two files": (
        lambda shell: write_tensors(shell / "shell-2.safetensors", {NORM: torch.ones(8)}),
        "is in shell-2.safetensors too",
    ),
    "no tensors": (lambda shell: (shell / "shell.safetensors").unlink(), "missing: "),
    "a file that is cut": (
        lambda shell: (shell / "shell.safetensors").write_bytes((shell / "shell.safetensors").read_bytes()[:-1]),
        "is truncated",
    ),
    "a file that goes on": (
        lambda shell: (shell / "shell.safetensors").write_bytes((shell / "shell.safetensors").read_bytes() + b"x"),
        "has trailing bytes",
    ),
    "a header of 2**63 bytes": (
        lambda shell: (shell / "shell.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}"),
        "claims a header of",
    ),
    "a pickle": (
        lambda shell: (shell / "shell.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        "claims a header of",
    ),
    "a file that is a link": (
        lambda shell: (
            (shell / "shell.safetensors").rename(shell.parent / "outside.safetensors"),
            (shell / "shell.safetensors").symlink_to(shell.parent / "outside.safetensors"),
        ),
        "links to .*outside.safetensors, outside",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_shell_is_refused_with_its_reason(
    family: tuple[list[Path], list[Path]], tmp_path: Path, case: str
) -> None:
    slices, stored = family
    change, reason = HOSTILE[case]
    change(stored[1])
    with pytest.raises(CheckpointError, match=reason) as caught:
        assembled(slices[1], stored[:2], tmp_path / "again")
    assert "\n" not in str(caught.value)


def test_a_whole_slice_of_another_shape_is_refused(
    family: tuple[list[Path], list[Path]], tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    slices, stored = family
    others = {"needs": {"hidden": 16}, "holds other layers": {"layers": (0, 1)}}
    for reason, changes in others.items():
        slice_checkpoint(tiny_checkpoint, dataclasses.replace(full_subnet(tiny_config), **changes), tmp_path / reason)
        with pytest.raises(CheckpointError, match=reason):
            assembled(slices[1], [tmp_path / reason, stored[1]], tmp_path / f"{reason} again")


def test_a_shell_of_what_does_not_nest_is_not_written(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    outside = dataclasses.replace(full_subnet(tiny_config), hidden=49)
    with pytest.raises(ValueError, match="subnet is larger"):
        write_shell(tiny_checkpoint, tmp_path / "shell", own=full_subnet(tiny_config), below=outside)
    assert not list(tmp_path.iterdir())
