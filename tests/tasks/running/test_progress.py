"""What the progress artifact on a run's page says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from trainee import STAGE

from tasks.running import progress
from tasks.running.progress import ProgressArtifact, stage_progress


class Client:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, str]] = []

    def create_artifact(self, wanted: Any) -> Any:
        self.sent.append((wanted.data, wanted.description))
        return type("Created", (), {"id": UUID(int=1)})

    def update_artifact(self, artifact: UUID, wanted: Any) -> None:
        self.sent.append((wanted.data, wanted.description))


@pytest.mark.parametrize(
    ("moves", "said"),
    [
        ([(10, 40), (40, 40)], [(25.0, "tokenising: 10 of 40"), (100.0, "tokenising: 40 of 40, ")]),
        ([(10, 0), (1_000_000, 0)], [(0.0, "tokenising: 10"), (0.0, "tokenising: 1,000,000, ")]),
    ],
    ids=["known", "unknown"],
)
def test_the_share_that_is_done_is_shown_where_the_total_is_known(
    moves: list[tuple[int, int]], said: list[tuple[float, str]]
) -> None:
    artifact, client, place = ProgressArtifact("tokenising", UUID(int=0), None, "tokens"), Client(), None
    artifact.close()
    for move in moves:
        place = artifact._put(client, place, *move)  # type: ignore[arg-type]
    assert [share for share, _ in client.sent] == [share for share, _ in said]
    for (_, text), (_, expected) in zip(client.sent, said, strict=True):
        assert text.startswith(expected)
        assert text == expected or text.endswith(" tokens/s")


def test_a_stage_tells_the_last_loss_of_each_budget_and_the_tokens_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, str]] = []

    @contextmanager
    def bar(*_: Any) -> Iterator[Callable[..., None]]:
        yield lambda *arguments: told.append(arguments)

    def row(step: int, seconds: float, **losses: float) -> dict[str, Any]:
        budgets = {budget: {"loss": loss} for budget, loss in losses.items()}
        return {"step": step, "steps": 4, "tokens": 3000, "seconds": seconds, "budgets": budgets}

    monkeypatch.setattr(progress, "progress_bar", bar)
    with stage_progress(STAGE) as on_step:
        on_step(row(0, 1.0, l=2.31, s=2.6125))
        on_step(row(1, 2.0, s=2.5))
    assert told == [
        (1, 4, "loss l 2.310, s 2.612, 3,000 tokens/s"),
        (2, 4, "loss l 2.310, s 2.500, 2,000 tokens/s"),
    ]


def test_a_note_is_on_the_page_after_how_much_is_done() -> None:
    artifact, client = ProgressArtifact("stage1", UUID(int=0), None), Client()
    artifact.close()
    artifact._put(client, None, 1, 4, "loss l 2.310")  # type: ignore[arg-type]
    assert client.sent == [(25.0, "stage1: 1 of 4, loss l 2.310")]
