"""Learning byte pairs (Sennrich 2016) from the training text, once for each corpus.

$MOELAB_HOME/tokenizers/<hash of what went in>/tokenizer.json       as the `tokenizers` library and transformers read it
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

END = "<|endoftext|>"
FORMAT = 1
SAMPLE_BYTES = 32_000_000  # What is learnt from, over all domains: beyond that the merges no longer change much, but the time does.


def learn(texts: Iterator[str], size: int, path: Path) -> None:
    """Writes the tokenizer.json of at most `size` tokens, the 256 bytes and END among them, to `path`: the same for the same texts.

    Splits as GPT-2 does (Radford 2019), so that every text has tokens and comes back as it was.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    _publish(tokenizer.to_str(), path)


def sample(domains: Sequence[Iterator[str]]) -> Iterator[str]:
    """The beginning of each domain's text, all together SAMPLE_BYTES."""
    for texts in domains:
        left = SAMPLE_BYTES // len(domains)
        for text in texts:
            yield text
            left -= len(text)
            if left <= 0:
                break


def _publish(text: str, path: Path) -> None:
    """Puts the file in place whole; of several builders the last one counts, and all wrote the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"tmp-{os.getpid()}-", dir=path.parent))
    try:
        (work / path.name).write_text(text)
        (work / path.name).rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
