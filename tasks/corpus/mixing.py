"""What a stage draws from each source of a corpus.

Apart from how a corpus is built, which does not depend on it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from elastic_core.recipe import DataConfig, Stage
from elastic_core.training.tokens import Portion
from tasks.corpus.record import DataRecord, check_length, read_record

logger = logging.getLogger(__name__)


def portions(corpus: Path, weights: Sequence[float] | None) -> tuple[Portion, ...]:
    """What is drawn from each source, by weight; nothing where all of the stream is, evenly."""
    if weights is None:
        return ()
    sources = read_record(corpus).sources
    return tuple(
        Portion(tokens=source.train_tokens, weight=weight) for source, weight in zip(sources, weights, strict=True)
    )


def check_portions(data: DataConfig, record: DataRecord, stage: Stage) -> None:
    """ValueError unless each source that a stage draws from by weight has a sequence; a line says how often it is read.

    A source that is read many times teaches little more.
    """
    weights = data.weights(stage.sources)
    if weights is None:
        return
    for source, taken, weight in zip(data.sources, record.sources, weights, strict=True):
        if weight > 0:
            name = source.name or source.path
            check_length(name, taken.train_tokens, stage.sequence_length)
            times = stage.tokens * weight / sum(weights) / taken.train_tokens
            logger.info("%s reads %s %.2f times", stage.name, name, times)
