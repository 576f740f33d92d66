"""A recipe's teacher as its config.json tells it: in a directory, in a bucket or on the Hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from elastic_core.files.checkpoint import CheckpointError, read_config
from elastic_core.geometry import ModelConfig
from elastic_core.recipe import Recipe
from flows.serving.services import tracking_environment
from tasks import artifacts
from tasks.settings import ServiceError, Settings, home_directory


def teacher_geometry(recipe: Recipe) -> ModelConfig:
    """The teacher's geometry: from the recipe, from a directory, or from the config.json that the Hub has."""
    teacher = recipe.teacher
    if teacher.pretrain is not None:
        return teacher.pretrain.model
    assert teacher.path is not None, "recipe.Teacher has one of path and pretrain"
    if teacher.model is not None and not Path(teacher.path).is_dir():
        return teacher.model
    if "://" in teacher.path and not teacher.path.startswith("hf://"):
        raise ValueError(
            f"teacher.path {teacher.path!r} is not a directory here; put the geometry of its config.json under "
            "teacher.model, or name a directory"
        )
    try:
        return geometry_at(teacher.path)
    except CheckpointError:
        raise
    except (ValueError, ServiceError) as error:
        raise ValueError(f"{error}; or put the geometry of its config.json under teacher.model") from error


def geometry_at(path: str) -> ModelConfig:
    """The geometry that the config.json of a directory, of an `s3://` prefix or of a model on the Hub gives."""
    with config_at(path) as directory:
        return read_config(directory)


@contextmanager
def config_at(path: str) -> Iterator[Path]:
    """A directory with the config.json of `path`, which may be `s3://` or a model on the Hub, while the block runs."""
    if Path(path).is_dir():
        yield Path(path)
        return
    with TemporaryDirectory() as directory:
        if path.startswith("s3://"):
            settings = Settings.from_environment(tracking_environment(home_directory()) | os.environ, need_bucket=False)
            file = Path(directory) / "config.json"
            artifacts.get_file(artifacts.open_store(settings), f"{path.rstrip('/')}/{file.name}", file)
        else:
            from tasks.corpus.hub import bring_config, parse_model  # huggingface_hub, which few plans need

            bring_config(parse_model(path), Path(directory))
        yield Path(directory)
