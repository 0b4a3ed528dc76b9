"""A config.json, read field by field: what nobody read at the end would change the computation, and is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spec.problems import Problem, pointer

# Bookkeeping, generation settings and telemetry switches: none of them changes what the model computes.
HARMLESS = frozenset(
    """
    architectures auto_map model_type _name_or_path name_or_path transformers_version torch_dtype dtype use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class
    max_position_embeddings max_seq_len output_router_logits output_attentions output_hidden_states return_dict use_return_dict
    pretraining_tp ep_size aux_loss_alpha seq_aux chunk_size_feed_forward id2label label2id problem_type task_specific_params
    _attn_implementation attn_implementation _attn_implementation_autoset experts_implementation _experts_implementation
    cache_implementation torchscript use_bfloat16 tf_legacy_loss finetuning_task prefix bad_words_ids exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens min_length max_length do_sample early_stopping
    temperature top_p top_k typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_beams
    num_beam_groups num_return_sequences diversity_penalty output_scores return_dict_in_generate remove_invalid_values _commit_hash
    initial_context_length
    """.split()  # noqa: SIM905  (a list of 70 literals reads worse)
)
# Of every configuration; they change nothing while they are off.
OFF = ("is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "pruned_heads")
_REQUIRED = object()
MOST = 10**15
MOST_LAYERS = 10_000


class ConfigError(ValueError):
    """What of a config.json, or of a spec, cannot be carried over: one problem for each field."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


class Reader:
    """The fields of `config`. Reading marks a field as understood; `finish` refuses the others.

    A field that is null says nothing, like one that is missing. Typed readers raise ConfigError at once for a value of another type;
    refusals of values are collected until `finish`.
    """

    def __init__(self, config: Mapping[str, Any], *at: str) -> None:
        self._config = config
        self._at = at
        self._left = {key for key, value in config.items() if value is not None and key not in HARMLESS and (value or key not in OFF)}
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def __contains__(self, key: str) -> bool:
        return self._config.get(key) is not None

    def value(self, key: str, default: Any = None) -> Any:
        """The plain value; `default` where the field is missing or null."""
        self._left.discard(key)
        found = self._config.get(key)
        return default if found is None else found

    def nullable(self, key: str, default: Any) -> Any:
        """The plain value of a field in which null means none, so that only a missing one means `default`."""
        self._left.discard(key)
        return self._config.get(key, default)

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number from 0 to MOST."""
        found = int(self._typed(key, default, int, "a whole number"))
        if not 0 <= found <= MOST:
            raise self.error(key, f"should be from 0 to {MOST:,}")
        return found

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A number from 0 to MOST."""
        found = self._typed(key, default, (int, float), "a number")
        if not 0 <= found <= MOST:
            raise self.error(key, f"should be from 0 to {MOST:,}")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return bool(self._typed(key, default, bool, "true or false"))

    def text(self, key: str, default: str) -> str:
        """A text."""
        return str(self._typed(key, default, str, "a text"))

    def layers(self, key: str = "num_hidden_layers") -> int:
        """How many layers; bounded, because what differs from layer to layer is written out."""
        found = self.integer(key)
        if found > MOST_LAYERS:
            raise self.error(key, f"should be at most {MOST_LAYERS:,}, not {found}")
        return found

    def whole_list(self, key: str, default: Sequence[int]) -> list[int]:
        """A list of whole numbers; `default` where it is missing, null or empty."""
        found = self.value(key)
        if not found:
            return list(default)
        if not isinstance(found, list) or not all(isinstance(item, int) for item in found):
            raise self.error(key, "should be a list of whole numbers")
        return found

    def text_list(self, key: str, default: Sequence[str]) -> list[str]:
        """A list of texts; `default` where it is missing, null or empty."""
        found = self.value(key)
        if not found:
            return list(default)
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise self.error(key, "should be a list of texts")
        return found

    def part(self, key: str) -> Reader:
        """The mapping at `key`, as a reader of its own; empty where it is missing. Its `finish` is the caller's."""
        found = self.value(key, {})
        if not isinstance(found, Mapping):
            raise self.error(key, "should be a mapping of fields")
        part = Reader(found, *self._at, key)
        part.problems, part.notes = self.problems, self.notes
        return part

    def must_be(self, key: str, allowed: Any, default: Any, why: str) -> None:
        """Refuses every value but `allowed`."""
        found = self.value(key, default)
        if found != allowed or isinstance(found, bool) != isinstance(allowed, bool):
            self.refuse(key, f"{found!r} is not supported, only {allowed!r}: {why}")

    def must_be_off(self, key: str, why: str) -> None:
        """Refuses a field that is there and neither null, 0, false nor empty."""
        found = self.value(key)
        if found:
            self.refuse(key, f"{found!r} is not supported: {why}")

    def leave(self, key: str, why: str) -> None:
        """Notes that a field with a value is left behind: it does not touch what the model computes in evaluation."""
        found = self.value(key)
        if found:
            self.notes.append(f"{key} {found} is left behind: {why}")

    def refuse(self, key: str, detail: str) -> None:
        """Notes that the value of `key` cannot be carried over."""
        self.problems.append(self._problem(key, detail))

    def error(self, key: str, detail: str) -> ConfigError:
        """For what cannot be read on."""
        return ConfigError([*self.problems, self._problem(key, detail)])

    def finish(self) -> None:
        """Refuses what was not read. Raises ConfigError with everything that was refused."""
        for key in sorted(self._left):
            self.refuse(key, "is not a field that the import knows, so that it cannot tell what it changes")
        if self.problems:
            raise ConfigError(self.problems)

    def unread(self) -> None:
        """`finish` of a part: notes what was not read, and leaves the raising to the whole."""
        for key in sorted(self._left):
            self.refuse(key, "is not a field that the import knows, so that it cannot tell what it changes")

    def _typed(self, key: str, default: Any, kind: type | tuple[type, ...], words: str) -> Any:
        found = self.value(key, default)
        if found is _REQUIRED or found is None:
            raise self.error(key, "is missing")
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.error(key, f"should be {words}, not {found!r}")
        return found

    def _problem(self, key: str, detail: str) -> Problem:
        return Problem(pointer(*self._at, key), f"{key}: {detail}")
