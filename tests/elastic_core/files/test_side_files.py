"""What a checkpoint takes over from the one it was made of, and the card that it gets."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml

from elastic_core.budget import Budget
from elastic_core.cost import subnet_params
from elastic_core.files.card import family_card, slice_card
from elastic_core.files.checkpoint import Family, ResolvedBudget, load_weights
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.subnet import full_subnet

CARRIED = ("tokenizer.json", "LICENSE", "NOTICE.txt", "tool_parser.py", "preprocessor_config.json", "safety.md")
LEFT = ("consolidated.safetensors", "pytorch_model.bin", "modeling_nemotron_h.py", "original")


@pytest.fixture
def teacher(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "teacher"
    shutil.copytree(tiny_checkpoint, directory)
    for name in (*CARRIED, *LEFT[:-1], ".gitattributes"):
        (directory / name).write_text(f"the teacher's {name}")
    (directory / "README.md").write_text("the teacher's card")
    (directory / LEFT[-1]).mkdir()
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_every_file_that_is_not_weights_is_carried_and_the_rest_is_named(
    teacher: Path, tiny_config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        slice_checkpoint(teacher, full_subnet(tiny_config), tmp_path / "slice")
    for name in CARRIED:
        assert (tmp_path / "slice" / name).read_bytes() == (teacher / name).read_bytes(), name
    (line,) = [record.getMessage() for record in caplog.records if "left behind" in record.getMessage()]
    for name in LEFT:
        assert not (tmp_path / "slice" / name).exists() and name in line, name
    assert ".gitattributes" not in line
    assert "the teacher's card" not in (tmp_path / "slice" / "README.md").read_text()


def test_a_checkpoint_without_a_generation_config_gets_that_of_its_config(
    teacher: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    (teacher / "generation_config.json").unlink()
    slice_checkpoint(teacher, full_subnet(tiny_config), tmp_path / "slice")
    written = json.loads((tmp_path / "slice" / "generation_config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, 0)


def described(config: ModelConfig, **lineage: str) -> Family:
    full = full_subnet(config)
    budget = ResolvedBudget(budget=Budget(name="l"), subnet=full, params=subnet_params(config, full))
    return Family(axes=Axes(), budgets=(budget,), layer_ranking=tuple(range(config.num_layers)), lineage=dict(lineage))


def front_matter(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


@pytest.mark.parametrize(
    ("teacher", "base"),
    [
        ("nvidia/Nemotron-Nano-12B-v2", "nvidia/Nemotron-Nano-12B-v2"),
        ("nvidia/Nemotron-Nano-12B-v2@main", "nvidia/Nemotron-Nano-12B-v2"),
        ("/models/nano", None),
        ("s3://bucket/nano", None),
        ("pretrained by the recipe", None),
    ],
)
def test_a_card_names_the_base_model_where_the_hub_has_it(
    teacher: str, base: str | None, tiny_config: ModelConfig
) -> None:
    card = family_card(tiny_config, described(tiny_config, teacher=teacher, license="other", license_name="nvidia"))
    said = front_matter(card)
    assert said.get("base_model") == base and teacher in card
    assert (said["license"], said["license_name"], said["library_name"]) == ("other", "nvidia", "transformers")


def test_a_card_counts_parameters_apart_from_the_zeros_that_pad(teacher: Path, tiny_config: ModelConfig, tmp_path):
    subnet = dataclasses.replace(full_subnet(tiny_config), ffn=(16, 40, 24))
    slice_checkpoint(teacher, subnet, tmp_path / "slice")
    params = subnet_params(tiny_config, subnet)
    zeros = sum(tensor.numel() for tensor in load_weights(tmp_path / "slice").values()) - params
    assert zeros > 0
    assert f"| {params:,} and {zeros:,} zeros that pad" in (tmp_path / "slice" / "README.md").read_text()


def test_a_card_says_where_no_common_engine_loads_the_slice(tiny_config: ModelConfig) -> None:
    listed = dataclasses.replace(tiny_config, intermediate_size=(16, 40, 24))
    cards = [slice_card(c, params=1, zeros=0, dtype="float32", family=None, name="s") for c in (tiny_config, listed)]
    assert ["vllm serve" in card for card in cards] == [True, False]
    assert "--ffn-layout padded" in cards[1]
