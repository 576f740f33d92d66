"""Laws of the race's laps: shares of tokens hold, and a size alone has the rows of a step that it has among all."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from micro import write_micro
from trainee import train_here

from elastic_core.recipe import Optimizer, Stage
from flows.ablations import ablations
from flows.commands.recipes import load_recipe, read_yaml
from flows.race import ALONE, BRIEF, CANDIDATES, EXPLORED, SCRATCH, Course, laps, race, shortened
from tasks.records import Artifact

STAGE = Stage(
    name="stage1",
    sequence_length=128,
    batch_size=18,
    micro_batch_size=6,
    steps=200,
    budgets={"l": 1, "m": 1, "s": 1},
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=20),
)


@pytest.mark.parametrize("only", ["", "m"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.125, 0.0625])
def test_a_lap_has_its_share_of_the_tokens(share: float, only: str) -> None:
    made = shortened(STAGE, share, only)
    one_step = made.batch_size * made.sequence_length
    assert abs(made.tokens - share * STAGE.tokens) <= one_step
    assert made.optimizer.warmup_steps <= made.steps // 4
    assert made.budgets == ({only: 1.0} if only else STAGE.budgets)


def test_a_size_alone_has_the_rows_that_it_has_among_all() -> None:
    assert shortened(STAGE, 0.25, "m").batch_size * len(STAGE.budgets) == STAGE.batch_size
    assert shortened(STAGE, 0.25, "").batch_size == STAGE.batch_size


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and trainings run in this process."""
    monkeypatch.setenv("ELASTIC_HOME", str(tmp_path / "home"))
    for module in ("flows.race", "flows.elastify"):
        monkeypatch.setattr(f"{module}.run", lambda step, **given: step.fn(**given))
    for module in ("tasks.race", "tasks.teacher"):
        monkeypatch.setattr(f"{module}.run_training", train_here)


def test_every_way_is_gone_for_every_size_at_the_tokens_it_says(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole race on a micro recipe."""
    quick = ["stages.0.steps=16", "stages.1.steps=4", *(f"stages.{i}.checkpoint_every=100" for i in range(2))]
    recipe = load_recipe(write_micro(tmp_path), quick)
    rows = tmp_path / "race.jsonl"
    found = race.fn(recipe, 1, rows)
    total = sum(stage.tokens for stage in recipe.stages)
    assert Counter((e.way, e.budget) for e in found) == {
        ("elastic", "l"): 1,
        **{("elastic", name): 1 for name in "ms"},
        **{("alone", name): len(ALONE) for name in "ms"},
        **{(way, name): 1 for way in ("explored", "from scratch") for name in "ms"},
    }
    rounding = sum(2 * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    shares = {"elastic": [1.0], "alone": ALONE, "explored": [EXPLORED], "from scratch": [SCRATCH]}
    for way, expected in shares.items():
        for name in "ms":
            mine = [e for e in found if (e.way, e.budget) == (way, name)]
            assert all(abs(lap.tokens - share * total) <= rounding for lap, share in zip(mine, expected, strict=True))
            explored = CANDIDATES * BRIEF * total if way == "explored" else 0
            assert all(abs(lap.explored - explored) <= CANDIDATES * rounding for lap in mine)
    planned, trained = Counter[str](), Counter[str]()
    for way, alike, lap in laps(recipe, 1):
        planned[way] += alike * sum(stage.tokens for stage in lap.stages)
    for e in (e for e in found if (e.way, e.budget) not in {("elastic", "m"), ("elastic", "s")}):  # one lap for all
        trained[e.way] += e.tokens + e.explored
    assert planned == trained
    fresh = {e.budget: e.kl for e in found if e.way == "from scratch"}
    assert all(e.kl < fresh[e.budget] for e in found if e.way == "elastic" and e.budget in fresh)
    monkeypatch.setattr("flows.race.run_lap", None)
    assert race.fn(recipe, 1, rows) == found, "from the rows"


def test_ablations_train_every_recipe_on_its_share_with_its_own_router(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ["stages.0.steps=8", "stages.1.steps=4", *(f"stages.{i}.checkpoint_every=100" for i in range(2))]
    micro = write_micro(tmp_path)
    changed = {"base": ["stages.0.router.mode=frozen"], "soft": ["shapes.by=router"]}
    recipes = {name: load_recipe(micro, [*quick, *changes]) for name, changes in changed.items()}
    assert {recipe.stages[0].router.mode for recipe in recipes.values()} == {"frozen", "soft"}
    rows = tmp_path / "race.jsonl"
    found = ablations.fn(recipes, 0.5, 2, rows)
    seed = recipes["base"].seed
    assert Counter((e.way, e.budget, e.seed) for e in found) == {
        (way, name, each): 1 for way in recipes for name in "lms" for each in (seed, seed + 1)
    }
    assert {e.tokens for e in found} == {sum(stage.tokens for stage in recipes["base"].stages) // 2}
    monkeypatch.setattr("flows.race.run_lap", None)
    assert ablations.fn(recipes, 0.5, 2, rows) == found, "from the rows"


def test_rows_are_known_by_the_recipe_and_the_tokens_wherever_these_lie_and_whatever_a_trained_teacher_became(
    tmp_path: Path,
) -> None:
    def key(place: str, teacher: str = "bits of one machine", *changes: str) -> str:
        (tmp_path / place).mkdir(exist_ok=True)
        made = {
            name: Artifact(path=place, digest=digest, files={}) for name, digest in (("corpus", "t"), ("it", teacher))
        }
        recipe = load_recipe(write_micro(tmp_path / place), changes)
        return Course(
            recipe=recipe, teacher=made["it"], family=made["it"], corpus=made["corpus"], workspace=place, seed=0
        ).key()

    assert key("here") == key("there") == key("there", "bits of another")
    weighed = ("data.sources.0.weight=2", "data.sources.1.weight=1")
    assert key("here", "bits of one machine", *weighed) != key("here")
    for change in (
        "router.hidden_size=9",
        "axes.ffn=[64, 48]",
        "seed=1",
        "stages.0.steps=61",
        "teacher.pretrain.steps=9",
        "dtype=bfloat16",
    ):
        assert key("here", "bits of one machine", change) != key("here"), change


def test_every_ablation_of_the_repository_is_a_recipe_of_as_many_tokens() -> None:
    named = read_yaml(Path("infra/ablations.yaml"))
    tokens = {sum(stage.tokens for stage in load_recipe(Path("tiny"), changes).stages) for changes in named.values()}
    assert len(named) > 10 and tokens == {sum(stage.tokens for stage in load_recipe(Path("tiny")).stages)}


def test_prefect_is_imported_when_the_races_own_server_is_there() -> None:
    """Prefect reads the server's address when it is imported, and starts a second server where it finds none."""
    found = "import sys, flows.commands.race; print('prefect' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
