"""`elastic ls`, `show`, `promote`, `rollback` and `diff` with a real registry: what they say, and what they move."""

import itertools
import json
import re
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from records import CONDITIONS
from typer.testing import CliRunner

from flows.cli import app
from flows.commands.diff import score_text
from tasks import tracking
from tasks.records import Conditions
from tasks.settings import HOME, TRACKING_URI, ServiceError

BUDGETS = {"l": 3_000_000, "s": 1_000_000}
RECIPE = {"family": "nano", "seed": 0, "stages": [{"name": "stage1", "steps": 60}, {"name": "stage2", "steps": 24}]}


@pytest.fixture(autouse=True)
def home(tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(TRACKING_URI, tracking_uri)
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return tmp_path / "home"


@dataclass(frozen=True)
class Family:
    """A family of a name of its own, and ways to register versions of it."""

    name: str
    uri: str

    def model(self, budget: str = "s") -> str:
        return f"{self.name}-{budget}"

    def register(
        self,
        loss: float = 2.5,
        *,
        budgets: dict[str, int] = BUDGETS,
        recipe: dict[str, Any] = RECIPE,
        under: Conditions = CONDITIONS,
        **tags: str,
    ) -> None:
        """Register a version of each budget, as a candidate, with a run that has the recipe."""
        version = uuid.uuid4().hex[:12]
        run = tracking.open_run(self.uri, experiment=self.name, run_key=version, run_name=version)
        tracking.log_params(self.uri, run, recipe)
        tracking.register_family(
            self.uri,
            family=self.name,
            version=version,
            manifest_uri=f"s3://b/families/{self.name}/{version}/manifest.json",
            run_id=run,
            members=[
                tracking.Member(
                    budget=budget,
                    source=f"s3://b/families/{self.name}/{version}/{budget}",
                    metrics={
                        "params": params,
                        "weight_bytes": 2 * params,
                        "cross_entropy": loss,
                        "accuracy": 0.5,
                        "cut_answers": 0.25,
                    },
                    tags={
                        tracking.MEASURED: under.digest,
                        tracking.CONDITIONS: under.text,
                        tracking.STORED: str(2 * params + 500_000),
                        tracking.LOADS: "everything loads it",
                        "elastic.corpus_sha256": "c" * 64,
                        "elastic.code": "0.1.0+abc",
                        **tags,
                    },
                )
                for budget, params in budgets.items()
            ],
        )

    def champions(self) -> dict[str, int]:
        found = {budget: tracking.champion(self.uri, self.model(budget)) for budget in ("l", "m", "s")}
        return {budget: version.version for budget, version in found.items() if version is not None}


@pytest.fixture
def family(tracking_uri: str) -> Family:
    return Family(name=f"nano{uuid.uuid4().hex[:10]}", uri=tracking_uri)


def elastic(*arguments: str) -> str:
    """What the command prints, on one line with single spaces; what it raises."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


def promote(family: Family, version: int, reason: str = "it was asked for") -> None:
    elastic("promote", f"{family.model()}:{version}", "--reason", reason)


# ls


def test_ls_has_the_sizes_from_the_largest_with_what_is_known_of_each(family: Family) -> None:
    family.register(2.5)
    promote(family, 1)
    said = elastic("ls", family.name)
    large, small = said.index(f"{family.model('l')}:1"), said.index(f"{family.model('s')}:1")
    assert large < small
    for known in ("candidate, champion", "1M", "2.5000", "50.0 %", "2 MB", "2.5 MB"):
        assert known in said[small:], said


def test_ls_hides_older_versions_without_an_alias_and_says_so(family: Family) -> None:
    for loss in (2.5, 2.4, 2.3):
        family.register(loss)
    promote(family, 1)
    said = elastic("ls", family.name)
    assert f"{family.model()}:1" in said and f"{family.model()}:3" in said and f"{family.model()}:2" not in said
    assert "2 older versions without an alias are not shown" in said
    assert f"{family.model()}:2" in elastic("ls", family.name, "--all")


def test_ls_says_where_losses_cannot_be_compared(family: Family) -> None:
    family.register()
    promote(family, 1)
    assert "measured alike" not in elastic("ls", family.name)
    family.register(under=replace(CONDITIONS, dtype="bfloat16"))
    assert f"losses of {family.name} were not all measured alike" in elastic("ls", family.name)


def test_ls_without_a_name_has_every_family_of_ours_and_no_other_model(family: Family) -> None:
    from mlflow import MlflowClient

    family.register()
    foreign = f"foreign{uuid.uuid4().hex[:10]}"
    client = MlflowClient(tracking_uri=family.uri, registry_uri=family.uri)
    client.create_registered_model(foreign)
    client.create_model_version(foreign, "s3://b/foreign")
    listed = {entry["model"] for entry in json.loads(elastic("ls", "--json"))}
    assert {family.model("l"), family.model("s")} <= listed and foreign not in listed


def test_an_empty_state_directory_is_told_what_to_do_and_stays_empty(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRACKING_URI)
    with pytest.raises(ValueError, match=r"nothing is registered in .*: `elastic run RECIPE`"):
        elastic("ls")
    assert not home.exists()


def test_a_family_that_is_not_there_is_told(family: Family) -> None:
    with pytest.raises(ValueError, match=f"nothing is registered of a family '{family.name}'"):
        elastic("ls", family.name)


# show


def test_show_says_from_what_by_what_how_good_and_how_to_load(family: Family) -> None:
    family.register(2.5)
    promote(family, 1, "the demo is on Monday")
    said = elastic("show", family.model())
    for known in (
        f"{family.model()}:1, candidate, champion",
        "1,000,000 parameters, 2 MB of weights, 2.5 MB stored",
        f"from corpus_sha256: {'c' * 64}",
        "by code: 0.1.0+abc",
        "by MLflow run: ",
        "cross-entropy 2.5000",
        "accuracy 50.0 % with 25.0 % of answers cut off",
        "dtype float32",
        "in place of no champion: the demo is on Monday",
        f"get elastic pull {family.model()}:1 -o {family.model()}",
        "load everything loads it",
    ):
        assert known in said, said


def test_show_of_a_name_alone_is_its_champion_and_before_there_is_one_its_candidate(family: Family) -> None:
    for loss in (2.5, 2.4):
        family.register(loss)
    assert json.loads(elastic("show", family.model(), "--json"))["version"] == 2
    promote(family, 1)
    assert json.loads(elastic("show", family.model(), "--json"))["version"] == 1


# promote and rollback


def test_promote_moves_all_sizes_that_were_registered_together(family: Family) -> None:
    family.register()
    family.register()
    said = elastic("promote", f"{family.model('l')}:1", "--reason", "first")
    assert family.champions() == {"l": 1, "s": 1}
    assert f"champion {family.model('s')}:1, there was no champion" in said
    said = elastic("promote", family.model(), "--reason", "its candidate")
    assert family.champions() == {"l": 2, "s": 2}
    assert f"champion {family.model('l')}:2, in place of version 1" in said
    with pytest.raises(ValueError, match="is the champion already"):
        elastic("promote", family.model(), "--reason", "again")


def test_rollback_goes_back_champion_by_champion_and_records_why(family: Family) -> None:
    for version in (1, 2, 3):
        family.register()
        promote(family, version)
    said = elastic("rollback", family.model(), "--reason", "it repeats itself")
    assert family.champions() == {"l": 2, "s": 2}
    assert f"champion {family.model('l')}:2, after {family.model('l')}:3" in said
    assert "rolled back" in (shown := elastic("show", f"{family.model('l')}:3"))
    assert "to version 2: it repeats itself" in shown
    elastic("rollback", family.model(), "--reason", "so does this")
    assert family.champions() == {"l": 1, "s": 1}
    with pytest.raises(ServiceError, match=f"{family.model()}:1 replaced no other champion"):
        elastic("rollback", family.model(), "--reason", "and this")
    assert family.champions() == {"l": 1, "s": 1}


def test_rollback_goes_further_back_past_an_older_version_that_was_promoted_again(family: Family) -> None:
    for _ in range(3):
        family.register()
    order = (1, 3, 2, 3, 1)
    for version in order:
        promote(family, version)
    for version in order[-2::-1]:
        elastic("rollback", family.model(), "--reason", "worse")
        assert family.champions() == {"l": version, "s": version}
    with pytest.raises(ServiceError, match="replaced no other champion"):
        elastic("rollback", family.model(), "--reason", "worse")


def test_a_champion_whose_alias_was_moved_by_hand_gives_its_place_to_the_last_that_is_recorded(family: Family) -> None:
    for version in (1, 2, 3):
        family.register()
        promote(family, version)
    tracking.set_alias(family.uri, tracking.CHAMPION, {family.model(budget): 1 for budget in BUDGETS})
    elastic("rollback", family.model(), "--reason", "by hand")
    assert family.champions() == {"l": 3, "s": 3}
    elastic("rollback", family.model(), "--reason", "worse")
    assert family.champions() == {"l": 2, "s": 2}


@pytest.mark.parametrize("method", ["set_registered_model_tag", "set_model_version_tag", "set_registered_model_alias"])
@pytest.mark.parametrize("after", [0, 1], ids=["the first", "the second"])
@pytest.mark.parametrize("command", ["promote", "rollback"])
def test_what_was_not_done_is_not_recorded(
    command: str, after: int, method: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for version in (1, 2):
        family.register()
        promote(family, version)
    family.register()
    model = f"{family.model()}:3" if command == "promote" else family.model()
    before = known(family)
    working, calls = getattr(MlflowClient, method), itertools.count()

    def fail(self: MlflowClient, *arguments: Any) -> None:
        if next(calls) == after:
            raise MlflowException("the disk is full")
        working(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(ServiceError, match="the disk is full"):
        patch.setattr(MlflowClient, method, fail)
        elastic(command, model, "--reason", "worse")
    assert known(family) == before
    elastic(command, model, "--reason", "again")
    assert set(family.champions().values()) == {3 if command == "promote" else 1}


def known(family: Family) -> Any:
    """The champions, and all that is recorded of them and of the others."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=family.uri, registry_uri=family.uri)
    models = [client.get_registered_model(family.model(budget)) for budget in BUDGETS]
    versions = [client.get_model_version(model.name, str(number)) for model in models for number in (1, 2, 3)]
    return [(model.aliases, model.tags) for model in models], [version.tags for version in versions]


def test_a_rollback_that_was_killed_half_way_is_completed_by_the_next(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2, 3):
        family.register()
        promote(family, version)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tasks.tracking.champions.alias_moved", killed)
        patch.setattr("tasks.tracking.tags._untag", lambda *_: None)
        tracking.roll_back(family.uri, [tracking.resolve(family.uri, f"{family.model()}@champion")], "worse")
    assert family.champions()["s"] == 3
    assert tracking.withdrawn(tracking.resolve(family.uri, f"{family.model()}@champion")) is None
    elastic("rollback", family.model(), "--reason", "worse")
    assert family.champions() == {"l": 2, "s": 2}


def test_the_same_parts_under_the_name_of_another_family_are_not_moved_with_them(family: Family) -> None:
    """Their registration is the same, for it is of the parts."""
    other = replace(family, name=f"{family.name}b")
    for each in (family, other):
        each.register(**{tracking.REGISTRATION: "r" * 64})
    promote(family, 1)
    assert family.champions() and not other.champions()


def test_a_size_that_is_new_in_a_version_has_no_champion_after_its_rollback(family: Family) -> None:
    family.register()
    promote(family, 1)
    family.register(budgets={**BUDGETS, "m": 2_000_000})
    promote(family, 2)
    assert family.champions() == {"l": 2, "m": 1, "s": 2}
    assert f"{family.model('m')} has none" in elastic("rollback", family.model(), "--reason", "worse")
    assert family.champions() == {"l": 1, "s": 1}


def test_a_rollback_that_fails_half_way_moves_nothing(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (1, 2):
        family.register()
        promote(family, version)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=family.uri, registry_uri=family.uri)
    client.delete_model_version(family.model("s"), "1")
    with pytest.raises(ServiceError, match="moving alias 'champion'"):
        elastic("rollback", family.model(), "--reason", "worse")
    assert family.champions() == {"l": 2, "s": 2}


def test_a_champion_of_unknown_history_is_not_rolled_back_but_told_how(family: Family) -> None:
    family.register()
    tracking.set_alias(family.uri, tracking.CHAMPION, {family.model(): 1})
    with pytest.raises(ServiceError, match=f"does not say which version it replaced.*elastic promote {family.model()}"):
        elastic("rollback", family.model(), "--reason", "worse")


def test_a_reason_is_asked_for(family: Family) -> None:
    family.register()
    for command in ("promote", "rollback"):
        assert CliRunner().invoke(app, [command, family.model()]).exit_code == 2


@pytest.mark.parametrize("version", [":1", "@champion", "/1"])
def test_a_rollback_of_a_version_is_refused_by_what_was_typed(family: Family, version: str) -> None:
    result = CliRunner().invoke(app, ["rollback", f"{family.model()}{version}", "--reason", "asked for"])
    assert str(result.exception).startswith(f"'{family.model()}{version}' is a version; rollback takes a NAME alone")


# diff


def test_diff_names_what_differs_by_its_path_and_nothing_else(family: Family) -> None:
    family.register(2.5)
    longer = {**RECIPE, "stages": [RECIPE["stages"][0], {"name": "stage2", "steps": 400}]}
    family.register(2.25, recipe=longer, **{"elastic.corpus_sha256": "d" * 64})
    found = json.loads(elastic("diff", f"{family.model()}:1", f"{family.model()}:2", "--json"))
    assert found["differences"] == {
        "recipe": {"stages.1.steps": ["24", "400"]},
        "made from": {"corpus_sha256": ["c" * 64, "d" * 64]},
        "shape": {},
        "scores": {"cross_entropy": ["2.5", "2.25"]},
        "measured": {},
    }
    assert found["notes"] == []
    said = elastic("diff", f"{family.model()}:1", f"{family.model()}:2")
    assert "stages.1.steps" in said and "shape: no difference" in said


def test_diff_shows_scores_as_other_tables_do_or_whole_and_json_has_them_whole(family: Family) -> None:
    family.register(2.5, budgets={"s": 1_443_584})
    family.register(2.25904357, budgets={"s": 1_443_585})
    said = elastic("diff", f"{family.model()}:1", f"{family.model()}:2")
    assert re.findall(r"│ (\w+) +│ +(.+?) │ +(.+?) │", said) == [
        ("params", "1,443,584", "1,443,585"),
        ("weight_bytes", "2887168", "2887170"),
        ("cross_entropy", "2.5000", "2.2590"),
    ]
    found = json.loads(elastic("diff", f"{family.model()}:1", f"{family.model()}:2", "--json"))
    assert found["differences"]["scores"]["params"] == ["1443584", "1443585"]
    assert found["differences"]["scores"]["cross_entropy"] == ["2.5", "2.25904357"]


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("accuracy", "0.5", "50.0 %"),
        ("cut_answers", "0.25", "25.0 %"),
        ("math-500.standard_error", "0.0123", "1.2 %"),
        ("math-500.tokens", "8123.4", "8,123"),
        ("active_params", "2783000384", "2,783,000,384"),
        ("tokens_per_second", "1234.5", "1,234"),
        ("kl", "0.00904357", "0.0090"),
        ("kl", "-", "-"),
    ],
)
def test_a_score_in_a_diff_is_written_by_what_it_counts(name: str, text: str, shown: str) -> None:
    assert score_text(name, text) == shown


def test_diff_says_that_losses_measured_otherwise_cannot_be_compared(family: Family) -> None:
    family.register()
    family.register(under=replace(CONDITIONS, dtype="bfloat16", settings={"sequence_length": 80}))
    found = json.loads(elastic("diff", f"{family.model()}:1", f"{family.model()}:2", "--json"))
    assert found["differences"]["measured"] == {
        "dtype": ["float32", "bfloat16"],
        "settings.sequence_length": ["40", "80"],
    }
    assert "not measured alike" in found["notes"][0]


def test_diff_says_where_a_recipe_is_not_known(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    family.register()
    family.register()
    gone = tracking.resolve(family.uri, f"{family.model()}:1").run_id
    reading = MlflowClient.get_run

    def get_run(self: MlflowClient, run_id: str) -> Any:
        return reading(self, "0" * 32 if run_id == gone else run_id)

    monkeypatch.setattr(MlflowClient, "get_run", get_run)
    said = elastic("diff", f"{family.model()}:1", f"{family.model()}:2")
    assert f"the recipe of {family.model()}:1 is not known" in said and "recipe: no difference" not in said
