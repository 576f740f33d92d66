"""Laws of the reordered teacher as a step's result."""

from pathlib import Path

import pytest
import torch

from elastic_core.budget import Budget
from elastic_core.files import checkpoint, reorder
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Router
from elastic_core.training.curriculum import generator
from tasks.rank import reorder_teacher
from tasks.records import Artifact
from tasks.running.digests import artifact

CONFIG = ModelConfig(
    hybrid_override_pattern="M*-",
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=4,
    n_groups=1,
    vocab_size=64,
    chunk_size=16,
)
LINEAGE = {"teacher_sha256": "1" * 64}


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    model = ElasticNemotronH(CONFIG)
    model.initialise(generator(0))
    checkpoint.write_weights(tmp_path / "teacher", CONFIG, model.state_dict(), torch.float32)
    return artifact(tmp_path / "teacher")


@pytest.fixture
def ranking(tmp_path: Path) -> Artifact:
    (tmp_path / "ranking").mkdir()
    reorder.write_order(tmp_path / "ranking", reorder.random_order(CONFIG, generator(1)))
    return artifact(tmp_path / "ranking")


def test_another_commit_reorders_to_the_same_bytes_so_that_no_stage_is_trained_anew(
    teacher: Artifact, ranking: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for commit in ("1" * 12, "2" * 12):
        monkeypatch.setattr("tasks.running.code.project_version", lambda commit=commit: f"0.1.0+g{commit}")
        made.append(
            reorder_teacher.fn(
                teacher=teacher,
                ranking=ranking,
                axes=Axes(hidden=(16, 8)),
                budgets=(Budget(name="l"), Budget(name="s", params=3000)),
                settings=Router(hidden_size=8),
                lineage=LINEAGE,
                latency_table=None,
                seed=0,
                workspace=str(tmp_path / "workspace"),
            )
        )
    assert made[0].path != made[1].path and made[0].digest == made[1].digest
    assert checkpoint.read_family(Path(made[0].path)).lineage == LINEAGE
