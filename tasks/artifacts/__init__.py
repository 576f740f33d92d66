"""Families in S3: publish a version once, list versions, fetch a part and verify it, remove what is of no use.

    s3://BUCKET/families/FAMILY/VERSION/PART/...       PART is "family" or a budget's name
    s3://BUCKET/families/FAMILY/VERSION/manifest.json  written last: a version without it does not exist

Every object is put with If-None-Match, so nothing is ever overwritten: the same bytes again are a success, other bytes
an error. Failures are `ServiceError`s of one line that name the URI; `tasks.settings.is_transient` sorts them. Nobody
else imports boto3.
"""

from tasks.artifacts.connection import Store as Store
from tasks.artifacts.connection import check_bucket as check_bucket
from tasks.artifacts.connection import ensure_bucket as ensure_bucket
from tasks.artifacts.connection import explain as explain
from tasks.artifacts.connection import manifest_uri as manifest_uri
from tasks.artifacts.connection import open_store as open_store
from tasks.artifacts.connection import parse_uri as parse_uri
from tasks.artifacts.connection import version_uri as version_uri
from tasks.artifacts.fetching import ListedObject as ListedObject
from tasks.artifacts.fetching import download_prefix as download_prefix
from tasks.artifacts.fetching import fetch as fetch
from tasks.artifacts.fetching import get_file as get_file
from tasks.artifacts.fetching import list_objects as list_objects
from tasks.artifacts.fetching import read_manifest as read_manifest
from tasks.artifacts.garbage import Garbage as Garbage
from tasks.artifacts.garbage import find_garbage as find_garbage
from tasks.artifacts.garbage import remove_garbage as remove_garbage
from tasks.artifacts.manifest import REGISTRY as REGISTRY
from tasks.artifacts.publishing import NotAsRecorded as NotAsRecorded
from tasks.artifacts.publishing import is_published as is_published
from tasks.artifacts.publishing import publish as publish
from tasks.artifacts.publishing import published as published
from tasks.artifacts.publishing import published_versions as published_versions
from tasks.artifacts.publishing import put_file as put_file
from tasks.artifacts.publishing import put_first as put_first
from tasks.artifacts.publishing import upload_directory as upload_directory
from tasks.artifacts.reading import open_object as open_object
from tasks.artifacts.signing import check_keys as check_keys
