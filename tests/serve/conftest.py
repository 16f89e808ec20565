"""Tokenizers that can chat in DeepSeek's formats."""

import pytest

from dsjax.text.vocabulary import open_vocabulary
from tests.serve import formats


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder for each format, with a tokenizer alone."""
    root = tmp_path_factory.mktemp("serve")
    controls = {"V3": formats.V3, "R1": formats.R1, "V3.1": formats.V3_1}
    controls |= {"V3.2": formats.V3_2, "base": ()}
    return {
        name: formats.write_tokenizer(root / name, control) for name, control in controls.items()
    }


@pytest.fixture(scope="session")
def vocabulary(folders):
    return open_vocabulary(folders["V3.1"], formats.VOCAB_SIZE)
