"""The tables. PostgreSQL is the truth about every run; Valkey holds nothing that cannot be lost."""

from experiments.models.generation import Generation, GenerationState
from experiments.models.node import Node
from experiments.models.project import Membership, Project, Role
from experiments.models.run import HAS_ORIGIN, LIVE, TERMINAL, Checkpoint, Desired, IdempotencyKey, Run, State, Transition
from experiments.models.telemetry import (
    ArchivedScalar,
    ArchivedTensor,
    Event,
    LogChunk,
    ScalarRollup,
    SpoolCursor,
    StepScalar,
    StepTensor,
    TensorRollup,
)
from experiments.models.token import LoginThrottle, Scope, SignInTicket, Token
from experiments.models.worker import Presence, Worker

__all__ = [
    "HAS_ORIGIN",
    "LIVE",
    "TERMINAL",
    "ArchivedScalar",
    "ArchivedTensor",
    "Checkpoint",
    "Desired",
    "Event",
    "Generation",
    "GenerationState",
    "IdempotencyKey",
    "LogChunk",
    "LoginThrottle",
    "Membership",
    "Node",
    "Presence",
    "Project",
    "Role",
    "Run",
    "ScalarRollup",
    "Scope",
    "SignInTicket",
    "SpoolCursor",
    "State",
    "StepScalar",
    "StepTensor",
    "TensorRollup",
    "Token",
    "Transition",
    "Worker",
]
