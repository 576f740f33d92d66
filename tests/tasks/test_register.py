"""Laws of registering: a family is made once it was promoted or refused, and its published cards have its scores."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from objects import stored
from records import CONDITIONS, evaluated, judged, measured
from trainee import AXES, BUDGETS, STAGE, write_family

from elastic_core.budget import WHOLE
from elastic_core.files import checkpoint
from elastic_core.files.side_files import CARD_FILE
from elastic_core.recipe import DataConfig, DataSource, Recipe, Teacher
from flows.elastify import pipeline
from tasks import artifacts, tracking
from tasks.artifacts import Store
from tasks.artifacts.documents import remove_objects
from tasks.records import Artifact, EvaluationRecord, OrderComparison, Release, StageRecord
from tasks.register import check_published, destination, register
from tasks.reporting.benchmarks import benchmark_table
from tasks.reporting.scores import differ_in_scores_alone
from tasks.reporting.summary import markdown_table
from tasks.running import steps
from tasks.running.code import CODE, project_version
from tasks.running.digests import artifact, file_digest
from tasks.running.recipe_run import to_do, tracked
from tasks.settings import ServiceError, Settings

MEASURED = evaluated(*(measured(budget.name, 1.25 + number) for number, budget in enumerate(BUDGETS)))


@dataclass(frozen=True)
class Made:
    """A recipe carried out up to its registration."""

    recipe: Recipe
    family: Artifact
    metrics: Path
    settings: Settings

    def register(self, run_id: str, evaluation: EvaluationRecord = MEASURED) -> Release:
        digest = file_digest(self.metrics)
        return register.fn(
            recipe=self.recipe,
            family=self.family,
            slices={budget.name: self.family for budget in BUDGETS},
            stages=[StageRecord(family=self.family, metrics=str(self.metrics), metrics_sha256=digest)],
            evaluation=evaluation,
            orders=OrderComparison(heldout_tokens=400, cuts=()),
            corpus=self.family,
            destination=destination(self.settings),
            run_id=run_id,
            workspace=str(self.metrics.parent / "workspace"),
        )

    def registered(self, evaluation: EvaluationRecord = MEASURED) -> Release:
        with tracked(self.recipe, self.settings, pipeline) as run_id:
            return self.register(run_id, evaluation)


@pytest.fixture
def made(settings: Settings, tmp_path: Path) -> Made:
    texts, metrics = tmp_path / "texts.txt", tmp_path / "metrics.jsonl"
    texts.write_text("the cat sat on the mat\n")
    metrics.touch()
    directory = write_family(tmp_path / "family")
    checkpoint.write_family(directory, replace(checkpoint.read_family(directory), lineage={CODE: "1.0"}))
    family = artifact(directory)
    recipe = Recipe(
        family=f"nano{settings.bucket.removeprefix('test-')}",
        teacher=Teacher(path=family.path),
        data=DataConfig(sources=(DataSource(path=str(texts)),)),
        axes=AXES,
        budgets=BUDGETS,
        stages=(STAGE,),
    )
    return Made(recipe=recipe, family=family, metrics=metrics, settings=settings)


def test_a_recipe_is_not_made_before_its_family_was_promoted_or_refused_nor_once_the_code_changed(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between registering and promoting leaves a run that a schedule carries on."""
    asked = made.recipe, made.settings, pipeline
    with tracked(*asked) as run_id:
        assert made.register(run_id).exists() and "not yet carried out" in to_do(*asked)
    assert not to_do(*asked)
    monkeypatch.setitem(steps.WAYS, "distill", lambda: "by other code")
    assert to_do(*asked) == f"distill changed since {project_version()}"


def card(store: Store, release: Release, part: str) -> str:
    with closing(store.client.get_object(Bucket=store.bucket, Key=key(release, part))["Body"]) as body:
        return str(body.read().decode())


def key(release: Release, part: str) -> str:
    return f"families/{release.family}/{release.version}/{part}/{CARD_FILE}"


@pytest.mark.parametrize("part", [*(budget.name for budget in BUDGETS), WHOLE])
def test_a_published_card_has_the_scores_and_what_they_were_measured_on(made: Made, store: Store, part: str) -> None:
    published = card(store, made.registered(), part)
    assert ("| 1.250 |" in published) == (part in (BUDGETS[0].name, WHOLE))
    assert all(str(value) in published for value in (CONDITIONS.heldout_sha256, CONDITIONS.dtype, CONDITIONS.tokens))
    assert differ_in_scores_alone(published, (Path(made.family.path) / CARD_FILE).read_text())


def test_the_same_files_measured_again_are_not_published_again_and_the_registry_has_both_scores(
    made: Made, store: Store
) -> None:
    first = made.registered()
    before = card(store, first, WHOLE)
    second = made.registered(replace(MEASURED, heldout_tokens=800, teacher_cross_entropy=1.125))
    assert (second.version, second.registration == first.registration) == (first.version, False)
    assert card(store, second, WHOLE) == before
    for release, teacher in ((first, "1.0000"), (second, "1.1250")):
        entry = tracking.resolve(made.settings.registry, release.models[BUDGETS[0].name])
        assert f"Cross-entropy 1.2500 (the teacher's {teacher})" in entry.description


def test_scores_on_benchmarks_are_in_the_registry_the_run_and_the_cards(made: Made, store: Store) -> None:
    name, other = BUDGETS[0].name, BUDGETS[1].name
    scores = (
        judged("teacher", 0.9),
        judged(name, 0.75),
        judged(other, 0.5),
        judged("separate", 0.7),  # as two references and two baselines are
        judged("from-scratch", 0.25),
        judged("beside", 0.85),
        judged("else", 0.8, score=None, source="x"),
    )
    release = made.registered(replace(MEASURED, scores=scores))
    entry = tracking.resolve(made.settings.registry, release.models[name])
    assert entry.metrics["sums.accuracy"] == 0.75 and entry.metrics["sums.tokens"] == 4096
    assert entry.tags[f"{tracking.JUDGED}sums"] == "alike"
    assert entry.tags[f"{tracking.ANSWERED}sums"] == "vllm 0.99"
    client = MlflowClient(tracking_uri=made.settings.tracking_uri)
    run = client.get_run(release.run_id)
    assert run.data.metrics["teacher/sums.accuracy"] == 0.9 and run.data.metrics[f"{name}/sums.unanswered"] == 0.125
    of_size, of_all = card(store, release, name), card(store, release, WHOLE)
    assert f"| {name} | 75.0 ± 2.0 |" in of_size and f"| {other} | 50.0" not in of_size
    assert f"| {other} | 50.0 ± 2.0 |" in of_all
    table = markdown_table(benchmark_table(replace(MEASURED, scores=scores))).rstrip()
    assert table in of_all
    assert table in Path(client.download_artifacts(release.run_id, "report/results.md")).read_text()
    assert all("| else (published) | 80.0 |" in each and "else: published, x." in each for each in (of_size, of_all))


def test_an_interrupted_upload_goes_on_with_the_card_that_it_left_though_the_scores_are_others(
    made: Made, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*asked: object, **named: object) -> None:
        raise ServiceError("away")

    with monkeypatch.context() as patch, pytest.raises(ServiceError, match="away"):
        patch.setattr(artifacts, "publish", lost)
        made.registered()
    release = made.registered(replace(MEASURED, teacher_cross_entropy=1.125))
    assert "| teacher | 1 | - | 1.000 |" in card(store, release, WHOLE)
    uri = artifacts.manifest_uri(store.bucket, release.family, release.version)
    artifacts.fetch(store, uri, WHOLE, made.metrics.parent / "pulled")


def test_a_release_exists_while_the_registry_holds_that_registration_of_it(made: Made) -> None:
    release = made.registered()
    assert release.exists()
    assert not replace(release, registration="another").exists()
    client = MlflowClient(tracking_uri=made.settings.registry, registry_uri=made.settings.registry)
    client.delete_registered_model(release.models[BUDGETS[0].name].rpartition(":")[0])
    assert not release.exists()


def test_a_release_whose_objects_were_lost_is_published_again(made: Made, store: Store) -> None:
    release = made.registered()
    assert release.exists()
    root = f"families/{release.family}/{release.version}/"
    everything = stored(store)
    lost = sorted(key for key in everything if key.startswith(root) and key.endswith(".safetensors"))[0]
    for keys in ([lost], [f"{root}manifest.json"], [key for key in everything if key.startswith(root)]):
        remove_objects(store, keys)
        assert not release.exists()
        assert made.registered() == release and release.exists()
        assert stored(store) == everything


def test_a_card_of_other_files_and_a_published_part_that_differs_are_refused(
    made: Made, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = made.registered()
    manifest = artifacts.published(store, release.family, release.version)
    assert manifest is not None
    check_published(manifest, {WHOLE: made.family})
    for changed in (
        replace(manifest, metadata={}),
        replace(manifest, metadata={"cards": {WHOLE: "0" * 64}}),
        replace(manifest, files=manifest.files[1:]),
    ):
        with pytest.raises(ServiceError, match="is published with another 'family'"):
            check_published(changed, {WHOLE: made.family})
    monkeypatch.setattr(artifacts, "published", lambda *asked: None)
    monkeypatch.setattr(artifacts, "put_first", lambda *asked: b"## Scores\n\n## Load it\nof another model")
    with pytest.raises(ServiceError, match="is of other files"):
        made.registered(replace(MEASURED, heldout_tokens=800))


def test_a_version_says_what_it_takes_and_what_loads_it(made: Made, store: Store) -> None:
    release, budget = made.registered(), BUDGETS[0].name
    entry = tracking.resolve(made.settings.registry, release.models[budget])
    sizes = [size for name, size in stored(store).items() if f"/{release.version}/{budget}/" in name]
    assert int(entry.tags[tracking.STORED]) == sum(sizes)
    for said in (entry.tags[tracking.LOADS], entry.description):
        assert "load_model does not load it" in said and "from_pretrained" in said
