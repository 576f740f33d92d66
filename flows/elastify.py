"""The pipeline: a teacher goes in, a registered family comes out. The body of `pipeline` is the plan."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from prefect import flow

from elastic_core.files.checkpoint import read_config
from elastic_core.judging import TEACHER
from elastic_core.planning.profile import recipe_table
from elastic_core.recipe import Recipe
from flows.commands.recipes import checked, load_recipe, recipe_file
from flows.serving.failures import explain_failure
from flows.serving.guard import guard_run
from flows.serving.naming import called, name_after, name_instead, summed_up, tag_run
from flows.serving.page import headline, link_curves, show_outcome
from tasks.corpus.record import read_record
from tasks.corpus.sources import problems_digest
from tasks.data import prepare_data
from tasks.distill import distill
from tasks.evaluate import evaluate
from tasks.judge import (
    bring_benchmarks,
    bring_references,
    find_engine,
    judge_models,
    look_for_contamination,
    published_scores,
)
from tasks.promote import Verdict, decide
from tasks.rank import choose_shapes, compare_orders, rank_importance, reorder_teacher, rotate_teacher
from tasks.records import Artifact, EvaluationRecord, OrderComparison, Release
from tasks.register import destination, register
from tasks.running.preflight import (
    check_cluster,
    check_corpus,
    check_ends,
    check_model,
    check_problems,
    check_prompts,
    check_scorers,
)
from tasks.running.recipe_run import identities, link_release, tracked
from tasks.running.steps import run
from tasks.running.workspace import small_files
from tasks.settings import Settings
from tasks.slice import slice_budget
from tasks.teacher import fetch_teacher, license_of, pretrain_teacher, teacher_name, train_tokenizer

logger = logging.getLogger(__name__)

Outcome = tuple[EvaluationRecord, OrderComparison, Release, Verdict]


@flow(name="elastify", flow_run_name=called(lambda given: given["recipe"].family), on_failure=[explain_failure])
def elastify(recipe: Annotated[Recipe, checked(Recipe)]) -> Outcome:
    """Distil a teacher into a family of sizes, evaluate, slice and register it; every step resumes or is cached.

    Args:
        recipe: The whole run, as in a recipe file.
    """
    guard_run()
    return pipeline(recipe)


@flow(name="elastify", flow_run_name=called(lambda given: str(given["recipe"])), on_failure=[explain_failure])
def elastify_by_name(recipe: str, changes: tuple[str, ...] = ()) -> Outcome:
    """Distil a teacher into a family of sizes, evaluate, slice and register it; every step resumes or is cached.

    Args:
        recipe: The recipe to carry out, by its name. Another deployment has all its settings in a form.
        changes: Settings to change, one a line, such as stages.0.steps=100 or family=mine. Positions count from 0.
    """
    guard_run()
    loaded = load_recipe(recipe_file(Path(recipe)), changes)
    name_instead(recipe, loaded.family)
    return pipeline(loaded)


def pipeline(recipe: Recipe) -> Outcome:
    """The pipeline, as part of a flow run."""
    tag_run(recipe.family)
    settings = Settings.from_environment()
    workspace = str(settings.home / "workspace")
    if (cluster := check_cluster(recipe)).words:
        logger.info("%s", cluster.words)
    with tracked(recipe, settings, pipeline) as run_id:
        link_curves(settings, run_id)
        check_scorers(recipe.evaluation)
        if engine := find_engine(recipe.evaluation, recipe.dtype):
            logger.info("benchmarks are answered by %s", engine)
        problems = bring_benchmarks(recipe.evaluation, workspace)
        references = bring_references(recipe.references, workspace)
        teacher, corpus = prepare(recipe, workspace)
        check_prompts(recipe.evaluation, problems, small_files(teacher))
        digest = problems_digest(recipe.evaluation.problems)
        contamination = look_for_contamination(recipe.evaluation, problems, digest, corpus, tokenizer=teacher)
        reordered = in_order(recipe, teacher, corpus, workspace)
        family = shaped(recipe, reordered, reordered, corpus, workspace)
        orders = compared(recipe, reordered, corpus)
        stages, first_step = [], 0
        for stage in recipe.stages:
            trained = run(
                distill,
                family=family,
                teacher=teacher,
                corpus=corpus,
                stage=stage,
                distillation=recipe.distillation,
                first_step=first_step,
                run_id=run_id,
                dtype=recipe.dtype,
                seed=recipe.seed,
                workspace=workspace,
                weights=recipe.data.weights(stage.sources),
                least_nodes=cluster.least_nodes.get(stage.name, 1),
            )
            stages.append(trained)
            family, first_step = trained.family, first_step + stage.steps
            if stage.router.mode != "frozen":
                family = shaped(recipe, reordered, family, corpus, workspace)
        slices = {
            budget.name: run(
                slice_budget,
                family=family,
                budget=budget.name,
                ffn_layout=recipe.ffn_layout,
                workspace=workspace,
            )
            for budget in recipe.budgets
        }
        evaluation = run(
            evaluate,
            teacher=teacher,
            reordered=reordered,
            family=family,
            slices=slices,
            corpus=corpus,
            settings=recipe.evaluation,
            problems_digest=digest,
            dtype=recipe.dtype,
            seed=recipe.seed,
        )
        judged = judge_models({TEACHER: teacher, **slices, **references}, problems, recipe.evaluation, recipe.dtype)
        scores = (*judged, *published_scores(recipe.references))
        evaluation = replace(evaluation, scores=scores, contamination=contamination)
        release = run(
            register,
            recipe=recipe,
            family=family,
            slices=slices,
            stages=stages,
            evaluation=evaluation,
            orders=orders,
            corpus=corpus,
            destination=destination(settings),
            run_id=run_id,
            workspace=workspace,
        )
        verdict = decide(
            release=release,
            evaluation=evaluation,
            teacher=teacher,
            corpus=corpus,
            settings=recipe.evaluation,
            dtype=recipe.dtype,
            gate=recipe.promotion,
            problems=problems,
            workspace=workspace,
        )
        name_after(release)
        link_release(settings, run_id, release)
        show_outcome(settings, evaluation, orders, release, verdict)
        return summed_up((evaluation, orders, release, verdict), headline(evaluation, release, verdict))


def in_order(recipe: Recipe, teacher: Artifact, corpus: Artifact, workspace: str) -> Artifact:
    """The teacher as an elastic checkpoint: in principal channels, unless the recipe wants its own, and in order."""
    ranked = teacher
    if recipe.importance.hidden == "principal":
        ranked = run(
            rotate_teacher,
            teacher=teacher,
            corpus=corpus,
            settings=recipe.importance.ranking,
            dtype=recipe.dtype,
            seed=recipe.seed,
            workspace=workspace,
            weights=recipe.data.weights(),
        )
    ranking = run(
        rank_importance,
        teacher=ranked,
        corpus=corpus,
        axes=recipe.axes,
        settings=recipe.importance.ranking,
        dtype=recipe.dtype,
        seed=recipe.seed,
        workspace=workspace,
        weights=recipe.data.weights(),
    )
    return run(
        reorder_teacher,
        teacher=ranked,
        ranking=ranking,
        axes=recipe.axes,
        budgets=recipe.budgets,
        settings=recipe.router,
        lineage=lineage(recipe, teacher, corpus),
        latency_table=recipe_table(recipe),
        seed=recipe.seed,
        workspace=workspace,
    )


def compared(recipe: Recipe, reordered: Artifact, corpus: Artifact) -> OrderComparison:
    """What the order of importance is worth, where the recipe asks for it; no cut, where it does not."""
    if not recipe.importance.comparison_tokens:
        return OrderComparison(heldout_tokens=0, cuts=())
    return run(
        compare_orders,
        reordered=reordered,
        corpus=corpus,
        axes=recipe.axes,
        settings=recipe.importance,
        evaluation=recipe.evaluation,
        dtype=recipe.dtype,
        seed=recipe.seed,
    )


def shaped(recipe: Recipe, reordered: Artifact, family: Artifact, corpus: Artifact, workspace: str) -> Artifact:
    """The family with the subnets whose cut from the teacher loses least, where the recipe measures them."""
    if recipe.shapes.by != "measured":
        return family
    return run(
        choose_shapes,
        reordered=reordered,
        family=family,
        corpus=corpus,
        settings=recipe.shapes,
        dtype=recipe.dtype,
        seed=recipe.seed,
        workspace=workspace,
        weights=recipe.data.weights(),
    )


def prepare(recipe: Recipe, workspace: str) -> tuple[Artifact, Artifact]:
    """The teacher and the tokens; a recipe without a teacher first trains a tokenizer and then the teacher."""
    identity, sources = identities(recipe)
    pretraining, data = recipe.teacher.pretrain, recipe.data.unweighted()
    if pretraining is None:
        path = recipe.teacher.path
        assert path is not None and identity is not None, "recipe.Teacher has one of path and pretrain"
        teacher = run(fetch_teacher, path=path, identity=identity, workspace=workspace)
        described = small_files(teacher)
        check_model(recipe, read_config(described))
        check_ends(described)
        check_problems(recipe.evaluation, described)
        corpus = run(prepare_data, config=data, identity=sources, tokenizer=teacher, workspace=workspace)
        check_corpus(recipe, corpus)
        return teacher, corpus
    check_model(recipe, pretraining.model)
    tokenizer = run(train_tokenizer, pretraining=pretraining, corpus=data, identity=sources, workspace=workspace)
    check_problems(recipe.evaluation, small_files(tokenizer))
    corpus = run(prepare_data, config=data, identity=sources, tokenizer=tokenizer, workspace=workspace)
    check_corpus(recipe, corpus)
    teacher = run(
        pretrain_teacher,
        pretraining=pretraining,
        tokenizer=tokenizer,
        corpus=corpus,
        dtype=recipe.dtype,
        seed=recipe.seed,
        workspace=workspace,
        weights=recipe.data.weights(),
    )
    return teacher, corpus


def lineage(recipe: Recipe, teacher: Artifact, corpus: Artifact) -> dict[str, str]:
    """What the family is made from, for elastic.json and the registry."""
    return {
        "teacher": teacher_name(recipe.teacher.path) if recipe.teacher.path else "pretrained by the recipe",
        "teacher_sha256": teacher.digest,
        "corpus_sha256": corpus.digest,
        "heldout_sha256": read_record(small_files(corpus)).heldout.sha256,
        "seed": str(recipe.seed),
        **license_of(small_files(teacher)),
    }
