"""What a model reads, as a person describes it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from spec.part import Part, field
from spec.text import Name, Text

Domain = Literal["code", "prose", "tables"]


def _all_domains() -> list[Domain]:
    return ["code", "prose", "tables"]


class Data(Part):
    """What the model reads."""

    source: Literal["stdlib", "files"] = field(
        "stdlib", "stdlib: the Python standard library's own source and documentation. files: your text or JSON-lines files."
    )
    domains: list[Domain] = Field(default_factory=_all_domains, min_length=1, max_length=3, description="Parts of the stdlib corpus to read.")
    paths: list[Text] = Field(
        default_factory=list,
        max_length=1000,
        description="Files or directories on the worker (.txt, .md, .py, .jsonl); with source files. Each is a domain of its own.",
    )
    text_field: Name = Field("text", description="The key that holds the text in JSON lines.")
    tokenizer: Literal["byte"] = field("byte", "byte: one token per byte and one that separates documents.")
    seq_len: int = field(256, "Tokens in one training sequence.", ge=8, le=1_048_576, unit="tokens")
    validation_share: float = field(0.05, "Share of the documents that is held out.", gt=0, le=0.5)

    @model_validator(mode="after")
    def _paths_where_needed(self) -> Self:
        if (self.source == "files") != bool(self.paths):
            raise ValueError("paths go with source files, and source files needs paths")
        if len(set(self.domains)) < len(self.domains):
            raise ValueError("domains lists one twice")
        return self
