"""Check at the start what a run will need hours later."""

from tasks.artifacts import check_bucket
from tasks.settings import Settings
from tasks.tracking import check_server


def check_services() -> None:
    """ServiceError, one line, unless MLflow answers and the bucket takes what we write."""
    settings = Settings.from_environment()
    check_server(settings.tracking_uri)
    check_bucket(settings)
