"""What the progress artifact on a run's page says."""

from typing import Any
from uuid import UUID

import pytest

from tasks.running.progress import ProgressArtifact


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
