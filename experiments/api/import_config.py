"""A published model's config.json as an experiment."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, ConfigDict
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.api.endpoint import Endpoint
from experiments.api.problems import FieldError, refused
from spec import trainable
from spec.accounting import price
from spec.huggingface import ConfigError, experiment_of, family_of, read_model


class HuggingFaceConfig(BaseModel):
    """A config.json, as it lies beside the weights. Its fields are those of the family that `model_type` names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model_type: str


class ImportedConfig(BaseModel):
    """The experiment, what it costs, and what of it cannot be trained here (`problems`); `notes` say what is left behind."""

    family: str
    spec: dict[str, Any]
    price: dict[str, Any]
    problems: list[FieldError]
    notes: list[str]


class ImportConfig(Endpoint):
    """A published model's description."""

    @extend_schema(operation_id="import_config", request=HuggingFaceConfig, responses={200: ImportedConfig})
    def post(self, request: Request) -> Response:
        """Reads a config.json (Mixtral, OLMoE, Qwen, DeepSeek, DBRX, Llama 4, gpt-oss and others) as a spec, without its weights."""
        config = self.body(HuggingFaceConfig).model_dump()
        try:
            family, spec, (_, notes) = family_of(config), experiment_of(config), read_model(config)
        except ConfigError as error:
            raise refused(error.problems) from error
        found = [FieldError(pointer=problem.pointer, detail=problem.detail) for problem in trainable.problems(spec)]
        plain, cost = spec.model_dump(mode="json"), price(spec).model_dump()
        answer = ImportedConfig(family=family.model_type, spec=plain, price=cost, problems=found, notes=notes)
        return Response(answer.model_dump(exclude_none=True))
