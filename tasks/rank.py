"""Rotate the teacher, rank its components, put them in that order, and see what the order is worth.

The reordered teacher is the elastic checkpoint that distillation starts from.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from elastic_core import comparison, cost, depth, importance, resolve, rotation, router, search
from elastic_core.budget import Budget, Dtype
from elastic_core.cost import LatencyTable
from elastic_core.files import checkpoint, directories, reorder, shapes, shards
from elastic_core.geometry import Axes
from elastic_core.recipe import Evaluation, Importance, Router, Shapes
from elastic_core.router import ElasticModel
from elastic_core.subnet import Subnet
from elastic_core.training import job
from elastic_core.training.curriculum import generator, sample_rows
from elastic_core.training.tokens import TokenBatch, TokenRows
from tasks.corpus.heldout import batches_of, predicted, spread
from tasks.corpus.mixing import portions
from tasks.corpus.record import HELDOUT_FILE, TRAIN_FILE
from tasks.evaluate import heldout_loss
from tasks.records import Artifact, OrderComparison
from tasks.reporting.summary import order_warnings
from tasks.running.bars import counter
from tasks.running.devices import dealt, devices, gathered, shared
from tasks.running.digests import artifact
from tasks.running.progress import progress_bar
from tasks.running.steps import end_work, new_directory, step, work_directory

logger = logging.getLogger(__name__)


@step(on_gpu=True)
def rotate_teacher(
    teacher: Artifact,
    corpus: Artifact,
    settings: Importance,
    dtype: Dtype,
    seed: int,
    workspace: str,
    weights: tuple[float, ...] | None = None,
) -> Artifact:
    """The same function as the teacher, with the principal components of its residual stream as hidden channels."""
    source, directory = Path(teacher.path), new_directory(workspace, "rotated")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = job.load_model(source, device, job.DTYPES[dtype])
    batches = _calibration(corpus, settings, weights, generator(seed, "rotation"))
    basis = rotation.principal_basis(rotation.residual_covariance(loaded, batches))
    del loaded
    with progress_bar("rotating") as report:
        rotation.rotate_checkpoint(source, basis, directory, progress=report)
    return artifact(directory)


@step(on_gpu=True)
def rank_importance(
    teacher: Artifact,
    corpus: Artifact,
    axes: Axes,
    settings: Importance,
    dtype: Dtype,
    seed: int,
    workspace: str,
    weights: tuple[float, ...] | None = None,
) -> Artifact:
    """Score every component of the teacher on calibration data; the order of importance on every axis."""
    config = checkpoint.read_config(Path(teacher.path))
    bound, work = axes.bind(config), work_directory(workspace, "ranking")
    batches = _calibration(corpus, settings, weights, generator(seed, "importance"))
    width = work / "width"
    if not width.exists():
        scores = _width_scores(teacher, batches, settings, dtype)
        with directories.staged_directory(width) as staging:
            layers = range(config.num_layers)
            reorder.write_order(staging, importance.importance_order(config, scores, layers, bound))
    depth_batches = batches[: max(1, settings.depth_samples // settings.batch_size)]
    ranking = _layer_ranking(teacher, depth_batches, bound.depth[-1], dtype, work / "removed.json")
    directory = new_directory(workspace, "importance")
    with directories.staged_directory(directory) as staging:
        reorder.write_order(staging, replace(reorder.read_order(width, config), layers=ranking))
    end_work(work)
    return artifact(directory)


def _width_scores(
    teacher: Artifact, batches: list[TokenBatch], settings: Importance, dtype: Dtype
) -> importance.WidthScores:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = job.load_model(Path(teacher.path), device, job.DTYPES[dtype])
    return importance.width_scores(loaded, batches, settings.scores)


def _layer_ranking(
    teacher: Artifact, batches: list[TokenBatch], smallest_depth: int, dtype: Dtype, file: Path
) -> tuple[int, ...]:
    """The layers in order of importance, ranked by all devices; it goes on after the last round that `file` holds."""
    config = checkpoint.read_config(Path(teacher.path))
    if smallest_depth == config.num_layers:
        return tuple(range(config.num_layers))
    removed = json.loads(file.read_text()) if file.exists() else []
    if removed:
        logger.info("ranking goes on: %d layers were removed before it was interrupted", len(removed))
    shares = dealt(batches, devices())
    with (
        progress_bar("ranking layers") as report,
        shared(_removal_terms, [(teacher.path, dtype, share) for share in shares]) as everywhere,
    ):

        def keep(gone: Sequence[int]) -> None:
            part = file.with_suffix(".part")
            part.write_text(json.dumps(list(gone)))
            directories.sync(part)
            part.replace(file)
            report(len(gone), config.num_layers - smallest_depth)

        def terms(which: range, candidates: Sequence[int], remaining: Sequence[int]) -> list[list[float]]:
            return gathered(everywhere.ask(depth.RemovalTerms.on, which, candidates, remaining))

        return depth.rank_layers(config, smallest_depth, terms, len(shares[0]), removed=removed, on_removed=keep)


def _removal_terms(share: tuple[str, Dtype, list[TokenBatch]]) -> depth.RemovalTerms:
    path, dtype, batches = share
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return depth.RemovalTerms(job.load_model(Path(path), device, job.DTYPES[dtype]), batches)


@step()
def reorder_teacher(
    teacher: Artifact,
    ranking: Artifact,
    axes: Axes,
    budgets: tuple[Budget, ...],
    settings: Router,
    lineage: dict[str, str],
    latency_table: LatencyTable | None,
    seed: int,
    workspace: str,
) -> Artifact:
    """Permute the teacher into importance order, with an untrained router: the elastic checkpoint at step 0.

    The version of the code comes into the lineage with training: here it would make each commit train anew.
    """
    source, directory = Path(teacher.path), new_directory(workspace, "reordered")
    config = checkpoint.read_config(source)
    order = reorder.read_order(Path(ranking.path), config)
    elastic = ElasticModel(config, axes.bind(config), order.layers, latency_table)
    fresh = router.Router(elastic, len(budgets), settings.hidden_size)
    fresh.initialise(generator(seed, "router"))
    family = checkpoint.Family(
        axes=axes,
        budgets=(),
        layer_ranking=order.layers,
        lineage=dict(lineage),
        latency_table=latency_table,
        format_version=1 if order.energy is None else 2,
    )

    def beside(staging: Path) -> None:
        reorder.write_order(staging, order)
        shards.write_tensors(staging / checkpoint.ROUTER_FILE, fresh.state_dict())
        checkpoint.write_family(staging, job.resolved_family(family, fresh, budgets))

    with progress_bar("reordering") as report:
        reorder.reorder_checkpoint(source, order, directory, beside=beside, progress=report)
    return artifact(directory)


@step(on_gpu=True)
def choose_shapes(
    reordered: Artifact,
    family: Artifact,
    corpus: Artifact,
    settings: Shapes,
    dtype: Dtype,
    seed: int,
    workspace: str,
    weights: tuple[float, ...] | None = None,
) -> Artifact:
    """The family with the subnets within its budgets whose cut from the reordered teacher loses least.

    A family that has not trained yet gets a router that knows what was measured. One whose router trained says which
    subnets are measured first, and its router stays as it is.
    """
    source, directory = Path(family.path), new_directory(workspace, "shaped")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = search.CutLoss(
        job.load_model(Path(reordered.path), device, job.DTYPES[dtype]),
        _calibration(corpus, settings, weights, generator(seed, "shapes")),
    )
    described = checkpoint.read_family(source)
    routed = job.load_router(source, checkpoint.read_config(source), described)
    budgets = [budget.budget for budget in described.budgets]
    is_trained = family.digest != reordered.digest
    with counter("measuring shapes", "subnets") as count:

        def measured(subnet: Subnet) -> float:
            count(loss.measured)
            return loss(subnet)

        prior = search.prior(routed.elastic, measured)
        router_says = [resolve.log_probabilities(routed, routed.one_hot(index)) for index in range(len(budgets))]
        scores = [[prior, says] if is_trained else [prior] for says in router_says]
        found = search.search(routed.elastic, budgets, measured, scores, measurements=settings.measurements)
    if not is_trained:
        pairs = zip(found.chosen, found.measured, strict=True)
        routed.imitate([search.loss_table(routed.elastic, chosen, seen) for chosen, seen in pairs])
    resolved = tuple(
        checkpoint.ResolvedBudget(
            budget=budget, subnet=chosen.subnet, params=cost.subnet_params(routed.elastic.config, chosen.subnet)
        )
        for budget, chosen in zip(budgets, found.chosen, strict=True)
    )
    candidates = {budget.name: seen for budget, seen in zip(budgets, found.measured, strict=True)}
    shapes.write_shaped(
        source,
        directory,
        replace(described, budgets=resolved),
        routed,
        shapes.MeasuredShapes(tokens=loss.tokens, budgets=candidates),
    )
    return artifact(directory)


@step(on_gpu=True)
def compare_orders(
    reordered: Artifact,
    corpus: Artifact,
    axes: Axes,
    settings: Importance,
    evaluation: Evaluation,
    dtype: Dtype,
    seed: int,
) -> OrderComparison:
    """What cutting each axis alone loses in the order of importance and in random orders, on held-out data.

    A warning is logged for each cut on which importance does not lose less.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = job.load_model(Path(reordered.path), device, job.DTYPES[dtype])
    rows = TokenRows(Path(corpus.path) / HELDOUT_FILE, evaluation.sequence_length)
    batches = batches_of(rows, spread(rows.num_rows, settings.comparison_tokens, evaluation), evaluation.batch_size)
    with progress_bar("comparing orders") as report:
        cuts = comparison.compare_orders(
            loaded,
            axes.bind(loaded.config),
            checkpoint.read_family(Path(reordered.path)).layer_ranking,
            lambda subnet: heldout_loss(loaded, subnet, batches, teacher=loaded)[1],
            random_orders=settings.random_orders,
            generator=generator(seed, "random orders"),
            progress=report,
        )
    compared = OrderComparison(heldout_tokens=predicted(batches), cuts=cuts)
    for warning in order_warnings(compared):
        logger.warning("%s", warning)
    return compared


def _calibration(
    corpus: Artifact, settings: Importance | Shapes, weights: tuple[float, ...] | None, draw: torch.Generator
) -> list[TokenBatch]:
    """Random sequences of the training data, from each source by its weight, in batches."""
    drawn = portions(Path(corpus.path), weights)
    rows = TokenRows(Path(corpus.path) / TRAIN_FILE, settings.sequence_length, drawn)
    return batches_of(rows, sample_rows(rows.drawn, settings.samples, draw), settings.batch_size)
