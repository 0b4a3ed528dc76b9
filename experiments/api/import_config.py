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
from spec.huggingface import ConfigError, experiment_of, family_of


class HuggingFaceConfig(BaseModel):
    """A config.json, as it lies beside the weights. Its fields are those of the family that `model_type` names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model_type: str


class ImportedConfig(BaseModel):
    """The experiment, what it costs, and what of it cannot be trained here; empty `problems` mean that all of it can."""

    family: str
    spec: dict[str, Any]
    price: dict[str, Any]
    problems: list[FieldError]


class ImportConfig(Endpoint):
    """A published model's description."""

    @extend_schema(operation_id="import_config", request=HuggingFaceConfig, responses={200: ImportedConfig})
    def post(self, request: Request) -> Response:
        """Reads a config.json (Mixtral, OLMoE, Qwen, DeepSeek, DBRX, Llama 4, gpt-oss and others) as a spec, without its weights."""
        config = self.body(HuggingFaceConfig).model_dump()
        try:
            family, spec = family_of(config), experiment_of(config)
        except ConfigError as error:
            raise refused(error.problems) from error
        found = [FieldError(pointer=problem.pointer, detail=problem.detail) for problem in trainable.problems(spec)]
        answer = ImportedConfig(family=family.model_type, spec=spec.model_dump(mode="json"), price=price(spec).model_dump(), problems=found)
        return Response(answer.model_dump(exclude_none=True))
