"""The families of published checkpoints, one a file, found by config.json's `model_type`.

llama.py, qwen2.py, deepseek.py (DeepSeekMoE), deepseek_v2.py, deepseek_v3.py and kimi_k2.py each
declare a `Family`: the rows of its config.json and the names of its tensors, both two-way.
family.py has that class and what families share, table.py the kinds of rows, rope.py the one for
rope settings. A further family is a further file and a name in `_ALL`.
"""

from dsjax.checkpoint.families.deepseek import DEEPSEEK
from dsjax.checkpoint.families.deepseek_v2 import DEEPSEEK_V2
from dsjax.checkpoint.families.deepseek_v3 import DEEPSEEK_V3
from dsjax.checkpoint.families.family import Family
from dsjax.checkpoint.families.kimi_k2 import KIMI_K2
from dsjax.checkpoint.families.llama import LLAMA
from dsjax.checkpoint.families.qwen2 import QWEN2
from dsjax.config import ModelConfig

_ALL = (LLAMA, QWEN2, DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def find(name: object) -> Family:
    """Finds a family by its name, config.json's `model_type`.

    Raises:
      ValueError: there is none of that name.
    """
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise ValueError(f"model_type={name!r} is not supported, only {', '.join(sorted(FAMILIES))}")


def family_for(model: ModelConfig) -> str:
    """Chooses the family to publish a model as: the first that names its tensors."""
    fits = [name for name, family in FAMILIES.items() if family.names(model)]
    # None has names for, say, Llama's attention with V3's router; writing such a model is refused.
    return fits[0] if fits else "deepseek" if model.attention == "gqa" else "deepseek_v3"
