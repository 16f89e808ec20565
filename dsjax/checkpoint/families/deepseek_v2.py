"""DeepSeek-V2, V2-Lite, V2.5 and Coder-V2: MLA; experts chosen by softmax, with or without groups.

Nothing is inferred from a model's name: the published values of mscale, for example, differ between
checkpoints of the same shape. `norm_topk_prob` is refused because loaders disagree: with it,
DeepSeek's code ignores `routed_scaling_factor`, and transformers ignores the switch itself.
"""

from __future__ import annotations

from typing import Any

from dsjax.checkpoint.families.family import (
    EXPERTS,
    MLA,
    MLA_NEUTRAL,
    SOFTMAX,
    TEXT,
    Family,
    mla_rules,
)
from dsjax.checkpoint.families.table import Fields, Row, Values, field, fixed
from dsjax.config import ModelConfig


def _read_groups(fields: Fields, values: Values) -> None:
    if fields.read("topk_method", "str") == "greedy":
        fields.seen |= {"n_group", "topk_group"}  # without effect for this method
        return
    fields.fixed("topk_method", "greedy", "group_limited_greedy")
    values.take("n_expert_groups", fields, "n_group", "int")
    values.take("n_limited_groups", fields, "topk_group", "int")


def _write_groups(model: ModelConfig) -> dict[str, Any]:
    method = "greedy" if model.n_expert_groups == 1 else "group_limited_greedy"
    groups = {"n_group": model.n_expert_groups, "topk_group": model.n_limited_groups}
    return groups | {"topk_method": method}


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    constants={"attention": "mla", **SOFTMAX},
    rows=(
        *TEXT,
        *MLA,
        fixed("use_mla", True, written=False),  # false in VL2-Tiny, which has plain heads
        *EXPERTS,
        fixed("scoring_func", "softmax", ours="score_func"),
        fixed("norm_topk_prob", False, ours="norm_topk"),
        field("routed_scaling_factor", "route_scale"),
        Row(_read_groups, _write_groups),
    ),
    attention=mla_rules,
    neutral=MLA_NEUTRAL,
)
