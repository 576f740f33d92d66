"""`elastic promote NAME[:VERSION]`: make a version, with all that were registered with it, the champions."""

from flows.commands.registry import label, open_registry
from flows.commands.terminal import wide_console
from tasks import tracking
from tasks.running.promoting import one_promotion


def promote_model(reference: str, reason: str) -> None:
    """Move `champion` to this version (NAME alone: its candidate) and to those registered with it; print what moved.

    The reason is recorded on each. ValueError where they are the champions already.
    """
    with open_registry() as settings:
        uri = settings.registry
        asked = tracking.resolve(uri, reference, (tracking.CANDIDATE,))
        with one_promotion(settings.home, asked.tags[tracking.FAMILY]):
            together = tracking.registered_with(uri, asked)
            if all(tracking.CHAMPION in version.aliases for version in together):
                raise ValueError(f"{label(asked)} is the champion already, and so is all that was registered with it")
            before = {version.name: tracking.champion(uri, version.name) for version in together}
            tracking.promote(uri, {version.name: version.version for version in together}, reason)
    for version in together:
        replaced = before[version.name]
        place = "there was no champion" if replaced is None else f"in place of version {replaced.version}"
        wide_console().print(f"champion    {label(version)}, {place}", highlight=False, soft_wrap=True)
