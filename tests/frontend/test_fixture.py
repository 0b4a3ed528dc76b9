"""The blocks that the TypeScript tests decode are the ones that Python writes today."""

from tests.frontend.fixture import DIRECTORY, blocks


def test_the_committed_blocks_are_what_the_encoder_writes() -> None:
    for name, data in blocks().items():
        assert (DIRECTORY / name).read_bytes() == data, f"{name}: run python -m tests.frontend.fixture"
