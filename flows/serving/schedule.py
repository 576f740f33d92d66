"""The schedule that a deployment is given: checked before a server starts, and by whoever applies it."""

from dataclasses import dataclass

NEVER = "none"  # as a schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When to look for new data, teacher or code, as cron, and the GPU-hours that a run may take without asking.

    `cron` may be NEVER, to take away what there is; None leaves it, as does None for the ceiling. ValueError for what
    is no cron expression, and for a schedule without a ceiling.
    """

    cron: str | None = None
    max_gpu_hours: float | None = None

    def __post_init__(self) -> None:
        if self.cron in (None, NEVER):
            return
        from prefect.client.schemas.schedules import CronSchedule  # a second, for those alone who give one

        try:
            CronSchedule(cron=self.cron)
        except ValueError:
            raise ValueError(
                f"--schedule {self.cron!r} is not a cron expression, such as '0 3 * * *', or {NEVER}"
            ) from None
        if self.max_gpu_hours is None:
            raise ValueError(
                f"--schedule {self.cron!r} needs --max-gpu-hours, such as 100: a run that would take more by its plan "
                "waits for a person; `elastic plan RECIPE` says what it takes, and 0 always asks"
            )

    def arguments(self) -> list[str]:
        """As the options of `elastic up`."""
        given = {"--schedule": self.cron, "--max-gpu-hours": self.max_gpu_hours}
        return [text for name, value in given.items() if value is not None for text in (name, str(value))]
