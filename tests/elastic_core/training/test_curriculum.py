"""Laws of the curriculum: what a step trains on is a function of its number, in the proportions of the recipe."""

import itertools
import math
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from dataclasses import replace

import pytest
import torch

from elastic_core.recipe import Optimizer, RouterSchedule, Stage
from elastic_core.training.curriculum import (
    LEAST_SHARE,
    ROUND,
    DataOrder,
    Need,
    generator,
    learning_rate,
    micro_steps,
    noise_generator,
    place_budgets,
    sample_rows,
    scale,
    temperature,
)

# Products and powers of a few float64 numbers.
FLOAT64_PRODUCT = 1e-12
# Points stepped by the golden ratio stray from an even spread by a few at most, however many there are.
GOLDEN_STRAY = 3


def make_stage(
    budgets: dict[str, float] | None = None, *, name: str = "stage1", batch_size: int = 12, steps: int = 100
) -> Stage:
    return Stage(
        name=name,
        sequence_length=16,
        batch_size=batch_size,
        steps=steps,
        budgets=budgets or {"l": 1, "m": 1, "s": 1},
        optimizer=Optimizer(learning_rate=1e-3),
        router=RouterSchedule(temperature=(1.0, 0.05), scale=(1.0, 10.0)),
    )


@pytest.mark.parametrize(
    ("shares", "places", "counts"),
    [
        ({"l": 1, "m": 1, "s": 1}, 12, {"l": 4, "m": 4, "s": 4}),
        ({"l": 1 / 3, "m": 1 / 3, "s": 1 / 3}, 1536, {"l": 512, "m": 512, "s": 512}),
        ({"l": 0.5, "m": 0.3, "s": 0.2}, 10, {"l": 5, "m": 3, "s": 2}),
        ({"l": 0.5, "m": 0.3, "s": 0.2}, 40, {"l": 20, "m": 12, "s": 8}),
        ({"l": 2, "m": 6}, 4, {"l": 1, "m": 3}),
        ({"l": 0, "m": 1, "s": 0}, 5, {"m": 5}),
        ({"l": 1}, 1, {"l": 1}),
    ],
)
def test_a_batch_that_the_shares_divide_holds_them_exactly(
    shares: dict[str, float], places: int, counts: dict[str, int]
) -> None:
    stage = make_stage(shares)
    for step in range(8):
        assert Counter(place_budgets(stage, stage.budgets, 7, step, places)) == counts


@pytest.mark.parametrize("places", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("shares", [{"l": 1, "m": 1, "s": 1}, {"l": 0.5, "m": 0.3, "s": 0.2}, {"l": 0.97, "s": 0.03}])
def test_any_batch_is_within_one_and_the_run_keeps_the_shares(shares: dict[str, float], places: int) -> None:
    stage, steps = make_stage(shares), 200
    run: Counter[str] = Counter()
    for step in range(steps):
        counts = Counter(place_budgets(stage, stage.budgets, 7, step, places))
        assert sum(counts.values()) == places
        for name, share in shares.items():
            assert abs(counts[name] - places * share / sum(shares.values())) < 1
        run += counts
        for name, share in shares.items():
            due = (step + 1) * places * share / sum(shares.values())
            assert abs(run[name] - due) < GOLDEN_STRAY, f"{name} after step {step}"


def test_budgets_are_functions_of_seed_stage_and_step() -> None:
    stage = make_stage()
    first = [place_budgets(stage, stage.budgets, 0, step, 12) for step in range(20)]
    torch.rand(3)
    assert [place_budgets(stage, stage.budgets, 0, step, 12) for step in reversed(range(20))] == first[::-1]
    assert len({tuple(order) for order in first}) > 15, "the order within a batch must differ by step"
    assert [place_budgets(stage, stage.budgets, 1, step, 12) for step in range(20)] != first
    assert [place_budgets(make_stage(name="stage2"), stage.budgets, 0, step, 12) for step in range(20)] != first


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("budget_rows", [None, 4])
def test_micro_steps_run_every_row_once_at_its_budget_and_at_most_a_micro_batch_at_once(
    processes, micro_batch_size, budget_rows
):
    stage = replace(make_stage(batch_size=24), micro_batch_size=micro_batch_size, budget_rows=budget_rows)
    shares, together = {"l": 0.05, "m": 0.3, "s": 0.65}, budget_rows or processes
    for step in range(10):
        planned = micro_steps(stage, shares, 3, step, processes)
        budgets = place_budgets(stage, shares, 3, step, 24 // together)
        rows = {first + r: m.budget for m in planned for first in m.firsts for r in range(processes)}
        assert rows == {row: budgets[row // together] for row in range(24)}
        assert sum(len(m.firsts) for m in planned) * processes == 24
        assert all(len(m.firsts) <= micro_batch_size for m in planned)


def test_rows_that_share_a_budget_divide_among_the_processes():
    with pytest.raises(ValueError, match="budget_rows=3"):
        micro_steps(replace(make_stage(), budget_rows=3), {"l": 1.0}, 0, 0, 2)


def test_shares_follow_the_measured_kl_and_the_full_size_gets_its_fixed_share():
    stage = replace(make_stage({"l": 1, "m": 1, "s": 2}), shares="by_need", full_share=0.1)
    need = Need(stage, ["l"])
    assert need.shares() == {"l": 0.25, "m": 0.25, "s": 0.5}
    need.add({"l": 0.0, "m": 0.2})
    assert need.shares() == {"l": 0.25, "m": 0.25, "s": 0.5}, "until every budget was measured"
    need.add({"s": 0.6})
    assert need.shares() == pytest.approx({"l": 0.1, "m": 0.225, "s": 0.675})
    need.add({"m": 0.4})
    assert need.shares()["m"] == pytest.approx(0.9 * 0.22 / (0.22 + 0.6))
    assert sum(need.shares().values()) == pytest.approx(1.0)


def test_a_budget_that_has_next_to_nothing_to_learn_keeps_rows_to_be_measured_on():
    need = Need(make_stage({"l": 1, "m": 1, "s": 1, "t": 1}), ["l"])
    need.add({"l": 0.0, "m": 1e-8, "s": 0.3, "t": 0.6})
    kept = make_stage().full_share
    assert need.shares() == pytest.approx(
        {"l": kept, "m": LEAST_SHARE, "s": (0.95 - kept) / 3, "t": (0.95 - kept) * 2 / 3}
    )
    for _ in range(60):
        need.add({"m": 0.3, "s": 0.3, "t": 0.6})
    alike = (1 - kept) / 4
    assert need.shares() == pytest.approx({"l": kept, "m": alike, "s": alike, "t": 2 * alike}, 0.01)


def test_many_budgets_have_half_of_an_equal_share_at_least():
    names = [f"b{number}" for number in range(40)]
    need = Need(make_stage(dict.fromkeys(names, 1)), [])
    need.add(dict.fromkeys(names, 1e-9) | {"b0": 1.0})
    shares = need.shares()
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) == pytest.approx(1 / 80)


def test_fixed_shares_are_those_of_the_recipe_whatever_was_measured():
    need = Need(replace(make_stage({"l": 1, "s": 3}), shares="fixed"), ["l"])
    need.add({"l": 0.0, "s": 1.0})
    assert need.shares() == {"l": 0.25, "s": 0.75}


def test_a_step_in_which_a_budget_met_nothing_to_learn_says_nothing_of_its_need():
    need = Need(make_stage(), ["l"])
    need.add({"l": 0.0, "m": 0.1, "s": 0.3})
    before = need.shares()
    need.add({"m": 0.0, "s": 0.0})
    assert need.shares() == before


def test_several_full_sizes_divide_the_full_share():
    need = Need(replace(make_stage({"l": 1, "m": 1, "s": 1}), full_share=0.6), ["l", "m"])
    need.add({"s": 0.1})
    assert need.shares() == pytest.approx({"l": 0.3, "m": 0.3, "s": 0.4})


def test_a_budget_without_a_share_gets_none_by_need_either():
    need = Need(make_stage({"l": 0, "m": 1, "s": 0}), ["l"])
    need.add({"l": 0.1, "m": 0.1, "s": 0.1})
    assert need.shares() == {"l": 0.0, "m": 1.0, "s": 0.0}


def test_generators_are_the_same_in_another_process() -> None:
    code = (
        "import torch; from elastic_core.training.curriculum import generator;"
        "print(torch.randint(2**31, (4,), generator=generator(3, 'stage1', 5, 'order')).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = torch.randint(2**31, (4,), generator=generator(3, "stage1", 5, "order")).tolist()
    assert done.stdout == f"{here}\n"


def test_noise_differs_by_every_part_of_its_key() -> None:
    stage, other = make_stage(), make_stage(name="stage2")
    keys = [(0, stage, 0, 0), (1, stage, 0, 0), (0, other, 0, 0), (0, stage, 1, 0), (0, stage, 0, 1), (0, stage, 1, 1)]
    draws = [tuple(torch.rand(4, generator=noise_generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.rand(4, generator=noise_generator(*key)).tolist()) for key in keys]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(24, 12), (10, 4), (5, 12), (1, 3)])
def test_each_epoch_is_a_permutation_of_all_rows(num_rows: int, batch_size: int) -> None:
    order = DataOrder(num_rows, make_stage(batch_size=batch_size), seed=0)
    epochs = 6
    steps = math.ceil(epochs * num_rows / batch_size)
    stream = [row for step in range(steps) for row in order.rows(step)]
    assert len(stream) == steps * batch_size
    by_epoch = [tuple(stream[e * num_rows : (e + 1) * num_rows]) for e in range(epochs)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in by_epoch)
    if num_rows > 4:
        assert len(set(by_epoch)) == epochs, "no two epochs in the same order"


def test_rows_of_a_step_do_not_depend_on_what_was_asked_before() -> None:
    stage = make_stage(batch_size=7)
    whole = [DataOrder(20, stage, seed=5).rows(step) for step in range(12)]
    order = DataOrder(20, stage, seed=5)
    assert [order.rows(step) for step in reversed(range(12))] == whole[::-1]
    assert [DataOrder(20, stage, seed=6).rows(step) for step in range(12)] != whole
    renamed = DataOrder(20, make_stage(batch_size=7, name="stage2"), seed=5)
    assert [renamed.rows(step) for step in range(12)] != whole


def test_data_order_is_one_stream_however_it_is_cut_into_batches() -> None:
    """So a run that goes on with another world size, or another batch, goes on through the same rows."""
    streams = []
    for batch_size in (2, 3, 8, 24):
        order = DataOrder(24, make_stage(batch_size=batch_size), seed=0)
        streams.append([row for step in range(48 // batch_size) for row in order.rows(step)])
    assert all(stream == streams[0] for stream in streams)


def test_no_rows_are_refused_with_what_to_do() -> None:
    message = "^stage stage1: the data holds no sequence of 16 tokens; add data or shorten sequence_length$"
    with pytest.raises(ValueError, match=message):
        DataOrder(0, make_stage(), seed=0)


def test_temperature_falls_by_a_constant_factor_and_scale_rises_by_a_constant_step() -> None:
    stage = make_stage(steps=50)
    taus, scales = [temperature(stage, i) for i in range(50)], [scale(stage, i) for i in range(50)]
    assert (taus[0], scales[0]) == (1.0, 1.0)
    assert (taus[-1], scales[-1]) == pytest.approx((0.05, 10.0), rel=FLOAT64_PRODUCT)
    ratios = [b / a for a, b in itertools.pairwise(taus)]
    assert ratios == pytest.approx([0.05 ** (1 / 49)] * 49, rel=FLOAT64_PRODUCT)
    steps = [b - a for a, b in itertools.pairwise(scales)]
    assert steps == pytest.approx([9 / 49] * 49, rel=FLOAT64_PRODUCT)
    one_step = make_stage(steps=1)
    assert (temperature(one_step, 0), scale(one_step, 0)) == (1.0, 1.0)


def test_the_paper_anneals_by_its_published_decay() -> None:
    """tau from 1.0 to 0.05 over both stages is a decay of about 0.99957 a step (arXiv 2511.16664)."""
    stage = make_stage(steps=5166 + 1788)
    assert temperature(stage, 1) == pytest.approx(0.99957, abs=5e-6)


def test_the_learning_rate_warms_up_linearly_and_stays() -> None:
    optimizer = Optimizer(learning_rate=1e-3, warmup_steps=4)
    rates = [learning_rate(optimizer, 2.0, step, 10) for step in range(10)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    none = Optimizer(learning_rate=1e-3, warmup_steps=0)
    assert [learning_rate(none, 2.0, step, 3) for step in range(3)] == [2.0] * 3


def test_a_cosine_rate_starts_at_its_peak_and_ends_at_its_final_fraction() -> None:
    optimizer = Optimizer(learning_rate=1e-3, warmup_steps=5, schedule="cosine", final_fraction=0.1)
    rates = [learning_rate(optimizer, 2.0, step, 26) for step in range(26)]
    assert rates[4] == rates[5] == 2.0
    assert rates[15] == pytest.approx((2.0 + 0.2) / 2, rel=FLOAT64_PRODUCT)
    assert rates[25] == pytest.approx(0.2, rel=FLOAT64_PRODUCT)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0], rel=FLOAT64_PRODUCT)


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_stage_shorter_than_its_warm_up_has_rates_up_to_the_peak(steps: int, schedule: str) -> None:
    optimizer = Optimizer(learning_rate=1e-3, warmup_steps=5, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(optimizer, 2.0, step, steps) for step in range(steps)]
    assert rates == pytest.approx([min(2.0, 0.4 * (step + 1)) for step in range(steps)], rel=FLOAT64_PRODUCT)


# --- sources with weights ---


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (0.5, 0.3, 0.15, 0.05), (1, 0, 2), (1, 0.0001)])
def test_sources_are_drawn_from_as_often_as_their_weights_say_over_any_stretch(weights: tuple[float, ...]) -> None:
    drawn = [(50 + 7 * source, weight) for source, weight in enumerate(weights)]
    firsts = [sum(rows for rows, _ in drawn[:source]) for source in range(len(drawn) + 1)]
    order = DataOrder(firsts[-1], make_stage(batch_size=12), 0, drawn)
    rows = [row for step in range(200) for row in order.rows(step)]
    sources = [bisect_right(firsts, row) - 1 for row in rows]
    for end in (12, 120, 700, 2400):
        for source, weight in enumerate(weights):
            expected = end * weight / sum(weights)
            # Half a draw for each source's own place and for those of the others, and one in ROUND for rounded shares.
            assert abs(sources[:end].count(source) - expected) <= 0.5 * len(weights) + 1 + end / ROUND


def test_each_source_has_epochs_of_its_own_in_which_every_row_is_drawn_once() -> None:
    order = DataOrder(30, make_stage(batch_size=10), 0, [(10, 0.5), (20, 0.5)])
    rows = [row for step in range(8) for row in order.rows(step)]
    few, many = [row for row in rows if row < 10], [row for row in rows if row >= 10]
    assert all(sorted(few[start : start + 10]) == list(range(10)) for start in range(0, 40, 10))
    assert all(sorted(many[start : start + 20]) == list(range(10, 30)) for start in range(0, 40, 20))
    assert few[:10] != few[10:20]


def test_weighted_rows_are_functions_of_the_step_alone() -> None:
    drawn = [(11, 0.2), (17, 0.8)]
    whole = [DataOrder(28, make_stage(batch_size=7), 5, drawn).rows(step) for step in range(12)]
    order = DataOrder(28, make_stage(batch_size=7), 5, drawn)
    assert [order.rows(step) for step in (7, 3, 11)] == [whole[step] for step in (7, 3, 11)]


def test_a_source_without_a_row_is_refused_where_it_is_drawn_from() -> None:
    with pytest.raises(ValueError, match="stage stage1: the data holds no sequence of 16 tokens"):
        DataOrder(10, make_stage(), 0, [(10, 1.0), (0, 0.1)])
    assert DataOrder(10, make_stage(batch_size=10), 0, [(10, 1.0), (0, 0.0)]).rows(0)


def test_a_sample_holds_different_rows_of_each_source_by_its_weight() -> None:
    drawn = [(100, 0.25), (300, 0.75), (50, 0.0)]
    rows = sample_rows(drawn, 80, generator(0, "sample"))
    assert len(set(rows)) == 80 and sum(row < 100 for row in rows) == 20 and max(rows) < 400
    assert sample_rows([(40, 1.0)], 7, generator(1)) == torch.randperm(40, generator=generator(1))[:7].tolist()
