"""The race: one elastic run against the ways of making each size alone. `make race`

All ways start from the same teacher, order of importance and shapes, and train by the same loop with the router frozen,
so that only the training differs. Every lap is a cached step: a race that was killed goes on with the lap it was in.
What a seed has reached is kept in a file, and not run again, wherever the race goes on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prefect import flow

from elastic_core.files.shapes import read_shapes
from elastic_core.planning.profile import recipe_table
from elastic_core.recipe import Recipe, RouterSchedule, Stage
from elastic_core.subnet import Subnet
from flows.elastify import in_order, prepare, shaped
from tasks.race import Lap, Start, run_lap
from tasks.records import Artifact
from tasks.reporting.race import Entry, Rows
from tasks.running.steps import fingerprint, run
from tasks.running.usage import noting
from tasks.running.workspace import small_files
from tasks.settings import home_directory

# The shares of the elastic run's tokens that each size gets alone, after an exploration, and from scratch.
ALONE, EXPLORED, SCRATCH = (0.25, 0.5, 1.0), 0.5, 0.5
# Exploration as Minitron-SSM has it: some of a size's best cuts are distilled briefly, and the best of them to the end.
CANDIDATES, BRIEF = 4, 0.0625


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What all laps of a seed share."""

    recipe: Recipe
    teacher: Artifact
    family: Artifact
    corpus: Artifact
    workspace: str
    seed: int

    def lap(self, share: float = 1.0, only: str = "", subnet: Subnet | None = None, start: Start = "cut") -> Lap:
        """Train all budgets, or `only` one, at its chosen subnet or another, on a share of the recipe's tokens."""
        return run(
            run_lap,
            family=self.family,
            teacher=self.teacher,
            corpus=self.corpus,
            stages=shortened_recipe(self.recipe, share, only).stages,
            subnets={only: subnet} if subnet else {},
            start=start,
            distillation=self.recipe.distillation,
            evaluation=self.recipe.evaluation,
            dtype=self.recipe.dtype,
            seed=self.seed,
            workspace=self.workspace,
            weights=self.weights,
        )

    @property
    def weights(self) -> tuple[tuple[float, ...] | None, ...]:
        """Those of the sources of data, for each stage."""
        return tuple(self.recipe.data.weights(stage.sources) for stage in self.recipe.stages)

    def key(self, share: float = 1.0) -> str:
        """What the laps of all seeds depend on, of a share of the recipe's tokens, wherever they are run.

        Not the bits of a teacher that the recipe trains: on another machine the last of them are others, and every lap
        of a seed has the same.
        """
        recipe = shortened_recipe(self.recipe, share, "")
        teacher = self.teacher if recipe.teacher.pretrain is None else recipe.teacher.pretrain
        shaped = recipe.axes, recipe.budgets, recipe.importance, recipe.shapes, recipe.router, recipe_table(recipe)
        trained = recipe.stages, recipe.distillation, recipe.dtype, recipe.seed, recipe.data.weights(), self.weights
        measured = recipe.evaluation.heldout_tokens, recipe.evaluation.sequence_length
        return fingerprint(teacher, self.corpus, shaped, trained, measured)

    def again(self, number: int) -> "Course":
        """The same with another seed of training; 0 is the recipe's own."""
        return replace(self, seed=self.seed + number)

    def elastic(self, way: str, share: float = 1.0) -> Iterator[Entry]:
        """What all budgets reach together on a share of the recipe's tokens."""
        lap = self.lap(share)
        for name in lap.kl:
            yield self.entry(way, name, lap)

    def entry(self, way: str, name: str, lap: Lap, explored: int = 0) -> Entry:
        """What a lap reached for one budget."""
        return Entry(
            way=way,
            budget=name,
            seed=self.seed,
            tokens=lap.tokens,
            kl=lap.kl[name],
            loss=lap.loss[name],
            explored=explored,
        )

    def explore(self, only: str) -> tuple[int, Subnet]:
        """The best of a size's candidates after a brief distillation of each, and the tokens that this took."""
        measured = read_shapes(small_files(self.family))
        if measured is None:
            raise ValueError("the race needs shapes that were measured; leave shapes.by at measured")
        subnets = [candidate.subnet for candidate in measured.budgets[only][:CANDIDATES]]
        laps = [self.lap(BRIEF, only, subnet) for subnet in subnets]
        best = min(range(len(laps)), key=lambda index: laps[index].kl[only])
        return sum(lap.tokens for lap in laps), subnets[best]


def sizes(recipe: Recipe) -> list[str]:
    """The budgets that are made alone too; one that is the teacher itself has nothing to learn."""
    return [budget.name for budget in recipe.budgets if budget.target is not None]


def laps(recipe: Recipe, seeds: int) -> Iterator[tuple[str, int, Recipe]]:
    """The laps of a race: their way, how many are alike, and the recipe with the stages that each trains."""
    yield "elastic", seeds, recipe
    for name in sizes(recipe):
        for share in ALONE:
            yield "alone", seeds, shortened_recipe(recipe, share, name)
        yield "explored", seeds * CANDIDATES, shortened_recipe(recipe, BRIEF, name)
        yield "explored", seeds, shortened_recipe(recipe, EXPLORED, name)
        yield "from scratch", 1, shortened_recipe(recipe, SCRATCH, name)


def raced(recipe: Recipe, share: float) -> Recipe:
    """The recipe on a share of its tokens, with a router that stands, so that all ways train the same shapes."""
    shorter = shortened_recipe(recipe, share, "")
    return replace(shorter, stages=tuple(replace(s, router=RouterSchedule(mode="frozen")) for s in shorter.stages))


def shortened_recipe(recipe: Recipe, share: float, only: str) -> Recipe:
    return replace(recipe, stages=tuple(shortened(stage, share, only) for stage in recipe.stages))


def shortened(stage: Stage, share: float, only: str) -> Stage:
    """A stage with a share of its tokens, for all budgets or `only` one.

    One alone has the rows of a step that it would have among all, and as many more steps: batches of the elastic run's
    size would be a poorer opponent.
    """
    rows = max(1, stage.batch_size // len(stage.budgets)) if only else stage.batch_size
    steps = max(1, round(stage.steps * share * stage.batch_size / rows))
    return replace(
        stage,
        batch_size=rows,
        micro_batch_size=rows if rows < stage.micro_batch_size else math.gcd(rows, stage.micro_batch_size),
        budget_rows=None if only else stage.budget_rows,
        steps=steps,
        budgets={only: 1.0} if only else stage.budgets,
        optimizer=replace(stage.optimizer, warmup_steps=min(stage.optimizer.warmup_steps, steps // 4)),
    )


@flow(name="race")
def race(recipe: Recipe, seeds: int, rows: Path, share: float = 1.0) -> list[Entry]:
    """What each way reaches for each size, at how many tokens; the elastic run has a `share` of the recipe's.

    What `rows` has of this recipe is taken from there, and what is found is added to it.
    """
    home = home_directory()
    with noting(home):
        first = course(raced(recipe, share), str(home / "workspace"))
        kept = Rows(rows, recipe.family, first.key())
        for number in range(seeds):
            kept.of("elastic", first.seed + number, partial(entries, first.again(number)))
        kept.of("from scratch", first.seed, partial(from_scratch, first))
    return kept.entries


def course(recipe: Recipe, workspace: str) -> Course:
    """A teacher in order, its shapes and its data; all of them are cached."""
    teacher, corpus = prepare(recipe, workspace)
    reordered = in_order(recipe, teacher, corpus, workspace)
    family = shaped(recipe, reordered, reordered, corpus, workspace)
    return Course(recipe=recipe, teacher=teacher, family=family, corpus=corpus, workspace=workspace, seed=recipe.seed)


def entries(course: Course) -> Iterator[Entry]:
    """The laps of one seed."""
    yield from course.elastic("elastic")
    for name in sizes(course.recipe):
        for share in ALONE:
            lap = course.lap(share, name)
            yield course.entry("alone", name, lap)
        spent, subnet = course.explore(name)
        lap = course.lap(EXPLORED, name, subnet)
        yield course.entry("explored", name, lap, explored=spent)


def from_scratch(course: Course) -> Iterator[Entry]:
    """The laps of fresh weights. One seed is enough: they end so far behind that another would not change a word."""
    for name in sizes(course.recipe):
        lap = course.lap(SCRATCH, name, start="fresh")
        yield course.entry("from scratch", name, lap)
