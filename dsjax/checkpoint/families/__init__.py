"""The families of published checkpoints, one per file, looked up by config.json's `model_type`.

Each of llama.py, qwen2.py, qwen3.py, deepseek.py (DeepSeekMoE), deepseek_v2.py, deepseek_v3.py,
deepseek_v32.py, deepseek_v4.py, kimi_k2.py, multi_modality.py (DeepSeek's models that see),
janus.py, deepseek_vl.py and deepseek_vl_hybrid.py (the same as transformers converts them) and
deepseek_vl_v2.py declares one `Family`: the rows of its config.json and the names of its tensors,
both two-way.
family.py defines `Family` and the parts that families share; table.py defines rows, rope.py the row
for rope settings, sight.py what is beside a language model; deepseek_tower.py, deepseek_towers.py
and janusflow.py are parts of multi_modality.py. To add a family, add a file and an entry in `_ALL`.
"""

from dsjax.checkpoint.families.deepseek import DEEPSEEK
from dsjax.checkpoint.families.deepseek_v2 import DEEPSEEK_V2
from dsjax.checkpoint.families.deepseek_v3 import DEEPSEEK_V3
from dsjax.checkpoint.families.deepseek_v4 import DEEPSEEK_V4
from dsjax.checkpoint.families.deepseek_v32 import DEEPSEEK_V32
from dsjax.checkpoint.families.deepseek_vl import DEEPSEEK_VL
from dsjax.checkpoint.families.deepseek_vl_hybrid import DEEPSEEK_VL_HYBRID
from dsjax.checkpoint.families.deepseek_vl_v2 import DEEPSEEK_VL_V2
from dsjax.checkpoint.families.family import Family
from dsjax.checkpoint.families.janus import JANUS
from dsjax.checkpoint.families.kimi_k2 import KIMI_K2
from dsjax.checkpoint.families.llama import LLAMA
from dsjax.checkpoint.families.multi_modality import MULTI_MODALITY
from dsjax.checkpoint.families.qwen2 import QWEN2
from dsjax.checkpoint.families.qwen3 import QWEN3
from dsjax.config import ModelConfig

_ALL = (
    LLAMA, QWEN2, QWEN3, DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2, DEEPSEEK_V32, DEEPSEEK_V4,
    MULTI_MODALITY, JANUS, DEEPSEEK_VL, DEEPSEEK_VL_HYBRID, DEEPSEEK_VL_V2,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def find(name: object) -> Family:
    """Returns the family with this name, config.json's `model_type`.

    Raises:
      ValueError: the name is not that of a family.
    """
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise ValueError(f"model_type={name!r} is not supported, only {', '.join(sorted(FAMILIES))}")


def naming(model: ModelConfig) -> list[str]:
    """Returns the families that can name this model's tensors, and have none besides."""
    return [name for name, family in FAMILIES.items() if family.names(model) and not family.sight]


def family_for(model: ModelConfig) -> str:
    """Returns the name of the family to publish a model as: the first that can name its tensors."""
    fits = naming(model)
    # No family has names for, say, Llama's attention with V3's router. Such a model can be loaded;
    # exporting it is refused.
    if fits:
        return fits[0]
    if model.attention == "gqa":
        return "deepseek"
    if model.attention == "compressed":
        return "deepseek_v4"
    return "deepseek_v32" if model.index_topk else "deepseek_v3"
