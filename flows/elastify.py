"""The pipeline: a teacher goes in, a registered family comes out. Read the body of `elastify`; it is the plan."""

from dataclasses import asdict

from prefect import flow, unmapped

from elastic_core.config import Recipe
from tasks.data import prepare_data
from tasks.distill import distill
from tasks.evaluate import evaluate
from tasks.promote import promote
from tasks.rank import rank_importance, reorder_teacher
from tasks.records import Artifact, EvaluationRecord, Release
from tasks.register import register
from tasks.slice import slice_budget
from tasks.teacher import fetch_teacher, pretrain_teacher, train_tokenizer
