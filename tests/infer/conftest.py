"""R1's vocabulary and chat format, and a generator whose engine is scripted."""

import pytest

from dsjax.generate.sampling import Sampling
from dsjax.infer.answers import Generator, Settings
from dsjax.text.chat import find_format
from dsjax.text.vocabulary import open_vocabulary
from tests.infer.scripted import ScriptedEngine, ids
from tests.text.released import R1, VOCAB_SIZE, write_checkpoint


@pytest.fixture(scope="module")
def r1(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("r1"), R1)
    vocabulary = open_vocabulary(folder, VOCAB_SIZE)
    return vocabulary, find_format(folder, vocabulary)


@pytest.fixture
def make(r1):
    def make(*replies, **options):
        engine = ScriptedEngine(*(ids(r) if isinstance(r, str) else r for r in replies))
        settings = Settings(r1[0], **{"context": 1000, "sampling": Sampling()} | options)
        return engine, Generator(engine, settings)

    return make
