"""Runs, curves and registered families in MLflow. Nobody else imports mlflow, and this only where a function needs it.

A tracking URI goes into every function: an http(s) server, or a database such as sqlite:///... with no server at all.
Failures are `ServiceError`s of one line that name the redacted URI. Every function may be repeated after a failure.
"""

from tasks.tracking.champions import PROMOTED as PROMOTED
from tasks.tracking.champions import ROLLED_BACK as ROLLED_BACK
from tasks.tracking.champions import Change as Change
from tasks.tracking.champions import change_of as change_of
from tasks.tracking.champions import promote as promote
from tasks.tracking.champions import registered_with as registered_with
from tasks.tracking.champions import roll_back as roll_back
from tasks.tracking.champions import withdrawn as withdrawn
from tasks.tracking.connection import CHECK_SECONDS as CHECK_SECONDS
from tasks.tracking.connection import CLIENT_ENVIRONMENT as CLIENT_ENVIRONMENT
from tasks.tracking.connection import check_database as check_database
from tasks.tracking.connection import check_server as check_server
from tasks.tracking.connection import is_server as is_server
from tasks.tracking.curves import MetricSpool as MetricSpool
from tasks.tracking.curves import step_curves as step_curves
from tasks.tracking.registry import ANSWERED as ANSWERED
from tasks.tracking.registry import BUDGET as BUDGET
from tasks.tracking.registry import CANDIDATE as CANDIDATE
from tasks.tracking.registry import CHAMPION as CHAMPION
from tasks.tracking.registry import CONDITIONS as CONDITIONS
from tasks.tracking.registry import FAMILY as FAMILY
from tasks.tracking.registry import HELDOUT_DIGEST as HELDOUT_DIGEST
from tasks.tracking.registry import JUDGED as JUDGED
from tasks.tracking.registry import LOADS as LOADS
from tasks.tracking.registry import MANIFEST as MANIFEST
from tasks.tracking.registry import MEASURED as MEASURED
from tasks.tracking.registry import NUMBER as NUMBER
from tasks.tracking.registry import PARAMS as PARAMS
from tasks.tracking.registry import PREFECT_RUN as PREFECT_RUN
from tasks.tracking.registry import PULL as PULL
from tasks.tracking.registry import REGISTRATION as REGISTRATION
from tasks.tracking.registry import STORAGE as STORAGE
from tasks.tracking.registry import STORED as STORED
from tasks.tracking.registry import SUBNET as SUBNET
from tasks.tracking.registry import VERSION as VERSION
from tasks.tracking.registry import Member as Member
from tasks.tracking.registry import ModelVersion as ModelVersion
from tasks.tracking.registry import aliased as aliased
from tasks.tracking.registry import are_registered as are_registered
from tasks.tracking.registry import by_alias as by_alias
from tasks.tracking.registry import champion as champion
from tasks.tracking.registry import identity as identity
from tasks.tracking.registry import model_name as model_name
from tasks.tracking.registry import model_url as model_url
from tasks.tracking.registry import pointed_to as pointed_to
from tasks.tracking.registry import register_family as register_family
from tasks.tracking.registry import resolve as resolve
from tasks.tracking.registry import set_alias as set_alias
from tasks.tracking.registry import versions_of as versions_of
from tasks.tracking.runs import NOTE as NOTE
from tasks.tracking.runs import finish_run as finish_run
from tasks.tracking.runs import flatten as flatten
from tasks.tracking.runs import log_files as log_files
from tasks.tracking.runs import log_metrics as log_metrics
from tasks.tracking.runs import log_params as log_params
from tasks.tracking.runs import open_run as open_run
from tasks.tracking.runs import params_of as params_of
from tasks.tracking.runs import rename_run as rename_run
from tasks.tracking.runs import run_url as run_url
from tasks.tracking.runs import set_tags as set_tags
from tasks.tracking.runs import tags_of_finished as tags_of_finished
from tasks.tracking.tags import tag_versions as tag_versions
