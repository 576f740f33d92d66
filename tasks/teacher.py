"""The teacher: fetched from where it lies, or trained from nothing for recipes that have none."""

import logging
from pathlib import Path

import torch
import yaml

from elastic_core.budget import Dtype
from elastic_core.files import checkpoint
from elastic_core.files.card import LICENSE
from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import regular_file
from elastic_core.files.side_files import CARD_FILE
from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import DataConfig, Distillation, Pretraining
from elastic_core.training.job import TrainJob
from tasks import artifacts
from tasks.corpus import build as data
from tasks.corpus import tokenizer
from tasks.corpus.hub import bring_model, parse_model
from tasks.corpus.mixing import portions
from tasks.corpus.record import TRAIN_FILE
from tasks.corpus.sources import CHECKPOINT_FILES, checkpoint_files
from tasks.records import Artifact
from tasks.running.code import CODE, project_version
from tasks.running.digests import artifact
from tasks.running.progress import stage_progress
from tasks.running.steps import new_directory, step, work_directory
from tasks.running.training import train as run_training
from tasks.settings import Settings

logger = logging.getLogger(__name__)


@step()
def fetch_teacher(path: str, identity: str, workspace: str) -> Artifact:
    """Bring a stock Nemotron-H checkpoint here from a directory, `s3://` or the Hub, and check it as a whole."""
    if path.startswith("s3://"):
        directory = work_directory(workspace, "teacher")  # the next attempt goes on with what this one brought
        if not directory.exists():
            artifacts.download_prefix(artifacts.open_store(Settings.from_environment()), path, directory)
    elif Path(path).is_dir():
        directory = Path(path).absolute()
    else:
        directory = new_directory(workspace, "teacher")
        bring_model(parse_model(path), identity, CHECKPOINT_FILES, directory)
    opened = checkpoint.open_checkpoint(directory)
    config = opened.config
    tokenizer.check_tokenizer(directory, config.vocab_size)
    logger.info("teacher %s: %d layers, hidden size %d", path, config.num_layers, config.hidden_size)
    if opened.left_out:
        logger.warning("teacher %s: %s", path, left_out_text(opened))
    return artifact(directory, checkpoint_files(directory) if Path(path).is_dir() else None)


def teacher_name(path: str) -> str:
    """What a family is said to be made from: a Hub name, s3://..., or the name of a directory, which may move."""
    return Path(path).absolute().name if Path(path).is_dir() else path


def left_out_text(teacher: checkpoint.Checkpoint) -> str:
    """What a family will lack of its teacher, in a line."""
    names = f"{checkpoint.MULTI_TOKEN_PREDICTION}*"
    return (
        f"its {len(teacher.left_out)} tensors {names}, which predict several tokens at once, are left out of every "
        "size; engines decode without them"
    )


def license_of(teacher: Path) -> dict[str, str]:
    """What the front matter of a teacher's model card says of its license, by the Hub's names; nothing without one."""
    if not (teacher / CARD_FILE).is_file():
        return {}
    opening, _, rest = regular_file(teacher, CARD_FILE).read_text(errors="replace").partition("---\n")
    try:
        said = yaml.safe_load(rest.partition("\n---")[0]) if not opening.strip() else None
    except yaml.YAMLError:
        said = None
    return {name: str(said[name]) for name in LICENSE if name in said} if isinstance(said, dict) else {}


@step()
def train_tokenizer(
    pretraining: Pretraining, corpus: DataConfig, identity: tuple[str, ...], workspace: str
) -> Artifact:
    """A tokenizer of exactly the model's vocabulary, trained on the recipe's own documents."""
    directory = new_directory(workspace, "tokenizer")
    with staged_directory(directory) as staging:
        texts = data.iter_texts(corpus)
        tokenizer.train_tokenizer(
            texts,
            staging,
            vocab_size=pretraining.model.vocab_size,
            max_length=pretraining.model.max_position_embeddings,
            max_bytes=pretraining.tokenizer_bytes,
        )
    return artifact(directory)


@step(on_gpu=True)
def pretrain_teacher(
    pretraining: Pretraining,
    tokenizer: Artifact,
    corpus: Artifact,
    dtype: Dtype,
    seed: int,
    workspace: str,
    weights: tuple[float, ...] | None = None,
) -> Artifact:
    """Train the recipe's own teacher by cross-entropy, with the loop that distils, on each source by its weight."""
    work = work_directory(workspace, "pretrain")
    start, output = work / "start", work / "checkpoint"
    if not start.exists():
        write_fresh_model(start, pretraining.model, Path(tokenizer.path), seed)
    stage = pretraining.stage()
    with stage_progress(stage) as on_step:
        run_training(
            TrainJob(
                stage=stage,
                distillation=Distillation(kl_weight=0.0, ce_weight=1.0),
                student=str(start),
                teacher=None,
                tokens=str(Path(corpus.path) / TRAIN_FILE),
                work=str(work),
                output=str(output),
                dtype=dtype,
                seed=seed,
                lineage={CODE: project_version()},
                portions=portions(Path(corpus.path), weights),
            ),
            on_step=on_step,
        )
    return artifact(output)


def write_fresh_model(directory: Path, config: ModelConfig, tokenizer: Path, seed: int) -> None:
    """An untrained checkpoint, with the tokenizer's files beside it."""
    fresh = ElasticNemotronH(config)
    fresh.initialise(torch.Generator().manual_seed(seed))
    checkpoint.write_weights(directory, config, fresh.state_dict(), torch.float32, source=tokenizer)
