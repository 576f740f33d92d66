"""Laws of the race's page: tokens are read off the curve, and the page keeps what it did not write."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.reporting.race import BASE, Entry, Rows, ablated, needed, reached, tokens_for, write_ablations, write_race
from tasks.running.code import project_version


def power_law(tokens: float) -> float:
    return 3.0 * tokens**-0.5


def entries(seeds: int = 2, elastic: int = 4000) -> list[Entry]:
    """Alone, every size follows the power law; the elastic run of 4,000 tokens reaches what 3,000 alone do."""
    made = []
    for seed in range(seeds):
        for name in ("m", "s"):
            made.append(Entry(way="elastic", budget=name, seed=seed, tokens=elastic, kl=power_law(3000)))
            made += [
                Entry(way="alone", budget=name, seed=seed, tokens=tokens, kl=power_law(tokens))
                for tokens in (500, 1000, 2000)
            ]
            # A shape that reaches with 2,000 tokens what the chosen one does with 4,000.
            made.append(Entry(way="explored", budget=name, seed=seed, tokens=2000, kl=power_law(4000), explored=1500))
            made.append(Entry(way="from scratch", budget=name, seed=seed, tokens=2000, kl=1.0))
        made.append(Entry(way="elastic", budget="l", seed=seed, tokens=elastic, kl=0.001))
    return made


@pytest.mark.parametrize("tokens", [200, 500, 700, 1000, 1999, 8000])
def test_tokens_are_read_off_a_power_law_inside_and_beyond_the_points(tokens: int) -> None:
    points = [(2000, power_law(2000)), (500, power_law(500)), (1000, power_law(1000))]
    assert math.isclose(tokens_for(power_law(tokens), points), tokens, rel_tol=1e-9)


def test_a_curve_that_does_not_fall_never_gets_there() -> None:
    assert tokens_for(0.1, [(100, 0.5), (200, 0.5)]) == math.inf


def test_what_the_others_need_is_counted_with_their_exploration() -> None:
    table = needed(entries(seeds=1))
    titles, values = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[::2])
    row = dict(zip(titles, values, strict=True))
    assert row["elastic, all sizes"] == "4K" and row["m alone"] == row["s alone"] == "3K"
    assert row["m explored"] == "3K"  # 1,500 to find the shape, which then needs half of 3,000
    assert row["elastic / alone"] == row["elastic / explored"] == "0.67"


@pytest.mark.parametrize("flat", [1.0, 0.99])
def test_a_line_is_not_followed_far_beyond_its_last_point(flat: float) -> None:
    """Alone, s hardly gains from twice the tokens: what it needs is more than four times the most that it had."""
    elastic = Entry(way="elastic", budget="s", seed=0, tokens=100, kl=0.1)
    points = [replace(elastic, way="alone", tokens=n, kl=kl) for n, kl in ((50, 0.2), (100, 0.2 * flat))]
    table = needed([elastic, *points, replace(points[0], way="explored", explored=25)])
    assert table.splitlines()[-1] == "| 0 | 100 | > 400 | > 425 | < 0.25 | < 0.24 |"


def test_rows_of_another_recipe_are_left_alone_and_none_is_found_twice(tmp_path: Path) -> None:
    file, entry = tmp_path / "race.jsonl", Entry(way="elastic", budget="s", seed=0, tokens=9, kl=0.25)
    Rows(file, "tiny", "one").of("elastic", 0, lambda: [entry])
    other = Rows(file, "tiny", "two")
    assert other.entries == []
    other.of("elastic", 0, lambda: [replace(entry, kl=0.5)])
    again = Rows(file, "tiny", "one")
    again.of("elastic", 0, lambda: pytest.fail("it is known"))
    assert (
        [replace(each, commit="") for each in again.entries] == [entry]
        and again.entries[0].commit == project_version()
        and len(file.read_text().splitlines()) == 2
    )


def test_what_is_taken_from_rows_says_what_code_found_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, entry = tmp_path / "race.jsonl", Entry(way="elastic", budget="s", seed=0, tokens=9, kl=0.25)
    Rows(file, "tiny", "one").of("elastic", 0, lambda: [entry])
    kept = Rows(file, "tiny", "one")
    with caplog.at_level("INFO"):
        kept.of("elastic", 0, lambda: pytest.fail("it is known"))
    assert f"found at {kept.entries[0].commit}" in caplog.text
    page = tmp_path / "race.md"
    write_ablations(page, "tiny", [replace(kept.entries[0], way=BASE)], {BASE: []})
    assert f"Found at {kept.entries[0].commit}." in page.read_text()


def test_a_page_whose_results_have_no_end_keeps_its_text(tmp_path: Path) -> None:
    page = tmp_path / "race.md"
    page.write_text("<!-- ablations of tiny -->\nOurs.\n")
    with pytest.raises(ValueError, match="has no <!-- end of ablations of tiny --> after it"):
        write_ablations(page, "tiny", [Entry(way=BASE, budget="s", seed=0, tokens=9, kl=0.25)], {BASE: []})
    assert "Ours." in page.read_text()


def test_a_change_is_compared_with_the_recipe_as_it_is_seed_by_seed() -> None:
    """The seeds differ by a factor of two and the change brings 10 and 30 % less: a fifth, give or take a tenth.

    The loss of one seed falls by 0.2 nats, that of the other by 0.4. A row from before losses were kept has none.
    """
    measured = {
        (BASE, 0): (0.01, 2.5),
        (BASE, 1): (0.02, 2.7),
        ("less", 0): (0.009, 2.3),
        ("less", 1): (0.014, 2.3),
        ("older", 0): (0.01, None),
        ("older", 1): (0.02, 2.7),
    }
    found = [
        Entry(way=way, budget="s", seed=seed, tokens=9, kl=kl, loss=loss)
        for (way, seed), (kl, loss) in measured.items()
    ]
    table = ablated(found, [BASE, "less", "older", "not run"])
    assert "| as it is | 0.0150 ± 0.0050 | 2.6000 ± 0.1000 |" in table
    assert "| less | 0.0115 ± 0.0025, -20% ± 10% | -0.3000 ± 0.1000 |" in table
    assert "| older | 0.0150 ± 0.0050, +0% ± 0% | - |" in table
    assert "| not run | - | - |" in table


def test_the_results_of_a_race_and_of_ablations_stand_beside_each_other(tmp_path: Path) -> None:
    page = tmp_path / "race.md"
    write_race(page, "tiny", entries())
    raced = page.read_text()
    found = [Entry(way=BASE, budget="s", seed=0, tokens=9, kl=0.25)]
    write_ablations(page, "tiny", found, [BASE])
    write_ablations(page, "tiny", found, [BASE])
    assert page.read_text().startswith(raced) and page.read_text().count("0.2500") == 1


def test_the_page_keeps_what_it_did_not_write_and_its_picture_lies_beside_it(tmp_path: Path) -> None:
    page = tmp_path / "race.md"
    write_race(page, "tiny", entries())
    first = page.read_text()
    assert (tmp_path / "race-tiny.png").read_bytes().startswith(b"\x89PNG") and "(race-tiny.png)" in first
    page.write_text(f"Before.\n\n{first}\nAfter.\n")
    write_race(page, "tiny", entries(seeds=1))
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n")
    assert text.count("| elastic | m |") == 1 and "one seed" in text


def test_the_loss_is_shown_where_it_was_kept() -> None:
    kept = [Entry(way="elastic", budget="s", seed=n, tokens=9, kl=0.25, loss=loss) for n, loss in enumerate((2.5, 2.7))]
    table = reached([*kept, Entry(way="alone", budget="s", seed=0, tokens=9, kl=0.25)]).splitlines()
    assert [line.split("|")[-2].strip() for line in table] == ["loss", "---:", "2.6000", "-"]
