"""DeepSeek-V3, V3.1, R1 and Moonlight: MLA; experts chosen by sigmoid scores plus a balancing bias;
multi-token prediction.
"""

from __future__ import annotations

from dsjax.checkpoint.families.family import EXPERTS, MLA, MLA_NEUTRAL, TEXT, Family, mla_rules
from dsjax.checkpoint.families.table import field, fixed

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    constants={
        "attention": "mla",
        "score_func": "sigmoid",
        "group_score": "top2",
        "router_bias": True,
    },
    rows=(
        *TEXT,
        *MLA,
        *EXPERTS,
        fixed("scoring_func", "sigmoid", ours="score_func"),
        field("norm_topk_prob", "norm_topk"),
        field("routed_scaling_factor", "route_scale"),
        field("n_group", "n_expert_groups"),
        field("topk_group", "n_limited_groups"),
        fixed("topk_method", "noaux_tc"),
        # The alias is transformers 5's name.
        field("num_nextn_predict_layers", "n_mtp", 0, alias="num_mtp_layers"),
    ),
    attention=mla_rules,
    mtp=True,
    neutral=MLA_NEUTRAL,
)
