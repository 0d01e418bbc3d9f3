"""Koi finds an initialisation from which a few gradient steps learn a new task."""

from importlib.metadata import version

from koi.clients import ClientTasks
from koi.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    EngineError,
    KoiError,
    KoiWarning,
    ModelError,
    NonFiniteError,
    RankError,
    TaskError,
)
from koi.evaluation import Evaluation
from koi.learner import Koi
from koi.phi.schedules import cosine, linear, warmup
from koi.ragged import RaggedTask
from koi.records import STOP, Record
from koi.supervised import SupervisedTask
from koi.tasks import Task, TaskDistribution, stack, tensor_task

__version__ = version("koi-x")

__all__ = [
    "STOP",
    "CheckpointError",
    "ClientTasks",
    "ConfigurationError",
    "DataError",
    "EngineError",
    "Evaluation",
    "Koi",
    "KoiError",
    "KoiWarning",
    "ModelError",
    "NonFiniteError",
    "RaggedTask",
    "RankError",
    "Record",
    "SupervisedTask",
    "Task",
    "TaskDistribution",
    "TaskError",
    "cosine",
    "linear",
    "stack",
    "tensor_task",
    "warmup",
]
