"""What a model reads, as a person describes it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spec.part import Part, field
from spec.text import Name, Text

Domain = Literal["code", "prose", "tables"]


def _all_domains() -> list[Domain]:
    return ["code", "prose", "tables"]


class Data(Part):
    """What the model reads."""

    source: Literal["stdlib", "files"] = field(
        "stdlib", "stdlib: the Python standard library's own source and documentation. files: your own text, tables of text or datasets."
    )
    domains: list[Domain] = Field(default_factory=_all_domains, min_length=1, max_length=3, description="Parts of the stdlib corpus to read.")
    paths: list[Text] = Field(
        default_factory=list,
        max_length=1000,
        description="On the worker: files or directories of .txt, .md, .py, .jsonl and .parquet, or a dataset that Hugging Face's save_to_disk "
        "wrote; with source files. Each is a domain of its own.",
    )
    weights: list[Annotated[float, Field(gt=0, le=1e9)]] = Field(
        default_factory=list,
        max_length=1000,
        description="How often each domain is read, in the order of domains or paths; only ratios count. Empty: in proportion to its size.",
    )
    text_field: Name = Field("text", description="The key or column that holds the text in JSON lines, Parquet and datasets.")
    tokenizer: Literal["byte", "bpe", "file"] = field(
        "byte",
        "What text is cut into.",
        options={
            "byte": "One token per byte, and one that separates documents.",
            "bpe": "Byte pairs, learnt from the training text.",
            "file": "The tokens of a tokenizer.json, as a Hugging Face checkpoint has it.",
        },
    )
    bpe_vocab_size: int = field(
        4096,
        "Tokens that are learnt, the 256 bytes and the separator included.",
        ge=257,
        le=1_000_000,
        unit="tokens",
        when={"tokenizer": ["bpe"]},
    )
    tokenizer_path: Text | None = field(None, "The tokenizer.json on the worker.", when={"tokenizer": ["file"]})
    separator: Name | None = field(None, "The token that ends a document; where absent, one with a usual name.", when={"tokenizer": ["file"]})
    packing: Literal["stream", "documents"] = field(
        "stream",
        "How documents fill a sequence.",
        options={
            "stream": "A sequence runs over the ends of documents.",
            "documents": "Attention stays within a document, and none is to guess how the next begins.",
        },
    )
    seq_len: int = field(256, "Tokens in one training sequence.", ge=8, le=1_048_576, unit="tokens")
    validation_share: float = field(0.05, "Share of the documents that is held out.", gt=0, le=0.5)

    @model_validator(mode="after")
    def _paths_where_needed(self) -> Self:
        if (self.source == "files") != bool(self.paths):
            raise ValueError("paths go with source files, and source files needs paths")
        if len(set(self.domains)) < len(self.domains):
            raise ValueError("domains lists one twice")
        named, count = ("domains", len(self.domains)) if self.source == "stdlib" else ("paths", len(self.paths))
        if self.weights and len(self.weights) != count:
            raise ValueError(f"weights has {len(self.weights)} numbers for {count} {named}")
        if (self.tokenizer == "file") != bool(self.tokenizer_path):
            raise ValueError("tokenizer_path goes with tokenizer file, and tokenizer file needs tokenizer_path")
        if self.separator is not None and self.tokenizer != "file":
            raise ValueError(f"separator goes with tokenizer file; tokenizer {self.tokenizer} has its own")
        return self
