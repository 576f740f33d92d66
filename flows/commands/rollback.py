"""`elastic rollback NAME`: give the place of a champion, and of those that came with it, back to those before."""

from flows.commands.registry import label, open_registry
from flows.commands.terminal import wide_console
from tasks import tracking
from tasks.running.promoting import one_promotion


def roll_back_model(name: str, reason: str) -> None:
    """Undo the promotion of NAME's champion and of the champions registered with it; print what moved.

    The reason is recorded on each. A ServiceError where nothing is recorded to go back to.
    """
    if any(mark in name for mark in ":@/"):
        raise ValueError(
            f"{name!r} is a version; rollback takes a NAME alone, whose champion goes back to the one before"
        )
    with open_registry() as settings:
        uri = settings.registry
        champion = tracking.resolve(uri, f"{name}@{tracking.CHAMPION}")
        with one_promotion(settings.home, champion.tags[tracking.FAMILY]):
            champion = tracking.resolve(uri, f"{name}@{tracking.CHAMPION}")  # as it is now that nobody else moves it
            together = [v for v in tracking.registered_with(uri, champion) if tracking.CHAMPION in v.aliases]
            to = tracking.roll_back(uri, together, reason)
    for version in together:
        back = to[version.name]
        now = f"{version.name}:{back}" if back is not None else f"{version.name} has none"
        wide_console().print(f"champion    {now}, after {label(version)}", highlight=False, soft_wrap=True)
