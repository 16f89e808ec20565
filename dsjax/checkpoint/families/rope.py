"""Rope settings in config.json: `rope_theta` and `rope_scaling`, or both as `rope_parameters`.

Two settings are refused because loaders disagree about them:
1. YaRN with only one of `mscale` and `mscale_all_dim`: the other has two published defaults.
2. YaRN without `original_max_position_embeddings`: 4096 in DeepSeek's code,
   `max_position_embeddings` in transformers.

One is passed over, as in transformers: YaRN's `attn_factor`, which DeepSeek-R1-0528-Qwen3-8B has at
1 / (0.1 ln 4 + 1). vLLM multiplies cos and sin by it, which cancels YaRN's own factor there. To
compute that instead, give `attention_factor` with a value of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsjax.checkpoint.families.table import REQUIRED, Fields, Row, Values
from dsjax.config import ModelConfig

_KINDS = ("default", "linear", "yarn", "llama3")
_NEUTRAL = frozenset({"finetuned"})  # written by YaRN's own code, which reads it for another kind


def _read(fields: Fields, values: Values) -> None:
    fields.seen |= {"rope_scaling", "rope_parameters"}
    spellings = {}
    for place in ("rope_scaling", "rope_parameters"):
        value = fields.values.get(place)
        if value and not isinstance(value, Mapping):
            fields.problems.append(f"{fields.place}.{place}={value!r} is not an object")
        elif value:
            settings = dict(value)
            kind = settings.pop("type", None)
            spellings[place] = settings | {
                "rope_type": settings.get("rope_type") or kind or "default"
            }
    theta = fields.read("rope_theta", "float", 0.0)
    inner = {
        place: Fields(s, f"{fields.place}.{place}", fields.problems)
        for place, s in spellings.items()
    }
    thetas = {one.read("rope_theta", "float", 0.0) for one in inner.values()} | {theta}
    thetas -= {0.0}
    without_theta = [{k: v for k, v in s.items() if k != "rope_theta"} for s in spellings.values()]
    if len(thetas) > 1 or (len(without_theta) == 2 and without_theta[0] != without_theta[1]):
        fields.problems.append(
            f"{fields.place} gives its rope settings more than once, with different values"
        )
    values["rope_theta"] = max(thetas, default=10000.0)
    given = next((one for one in inner.values() if one.values.get("rope_theta")), fields)
    values.places["rope_theta"] = f"{given.place}.rope_theta"
    if inner:
        read_scaling(next(iter(inner.values())), values)


def read_scaling(inner: Fields, values: Values) -> None:
    """Reads the settings of one rope, without its theta."""
    kind = inner.read("rope_type", "str")
    if kind not in _KINDS:
        inner.problems.append(
            f"{inner.place}.rope_type={kind!r} is not supported, only {', '.join(_KINDS)}"
        )
        return
    inner.fixed("partial_rotary_factor", 1)
    values["rope_scaling"] = "none" if kind == "default" else kind
    if kind in ("yarn", "llama3"):
        values.take("original_seq_len", inner, "original_max_position_embeddings", "int")
    if kind != "default":
        # Where YaRN's factor is null, transformers uses the ratio of the lengths.
        ratio = values["max_seq_len"] / max(values.get("original_seq_len", 0), 1)
        usual = ratio if kind == "yarn" else REQUIRED
        values.take("rope_factor", inner, "factor", "float", usual)
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            values.take(name, inner, name, "float")
    if kind == "yarn":
        for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            values.take(name, inner, name, "float", usual)
            # transformers treats 0 as absent; the formula would divide by it.
            values[name] = values[name] or usual
        values |= _temperature(inner, values)
        inner.fixed("truncate", True)
        inner.read("attn_factor", "float", 1.0)
    inner.refuse_rest(_NEUTRAL)


def _temperature(inner: Fields, values: Values) -> dict[str, float]:
    """Reads YaRN's attention temperature.

    Scores are scaled by the temperature of `mscale_all_dim`, cos and sin by the ratio of the
    temperatures of `mscale` and `mscale_all_dim`. Without the two, cos and sin carry all of it.
    `attention_factor` gives that ratio explicitly; it is expressed as the `mscale` that yields it.
    """
    given = {name: inner.read(name, "float", 0.0) for name in ("mscale", "mscale_all_dim")}
    explicit = inner.read("attention_factor", "float", 0.0)
    if any(given.values()) and values["attention"] != "mla":
        inner.problems.append(
            f"{inner.place}: mscale and mscale_all_dim are read by the MLA families only"
        )
    if explicit:
        step = 0.1 * math.log(values["rope_factor"]) if values["rope_factor"] > 1 else 0.0
        temperature = explicit * (step * given["mscale_all_dim"] + 1)
        if step:
            return given | {"mscale": (temperature - 1) / step}
        inner.fixed("attention_factor", 1)  # no mscale can express another at a factor of 1
    elif any(given.values()) and not all(given.values()):
        inner.problems.append(
            f"{inner.place} has only one of mscale and mscale_all_dim, and their defaults differ "
            "between loaders"
        )
    return given if any(given.values()) else {"mscale": 1.0, "mscale_all_dim": 0.0}


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Returns the settings as `rope_theta` and `rope_scaling`, which every loader understands."""
    kind = model.rope_scaling
    if kind == "none":
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    # DeepSeek's code and older loaders read `type`, newer ones `rope_type`.
    scaling: dict[str, Any] = {"type": kind, "rope_type": kind, "factor": model.rope_factor}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = model.original_seq_len
    if kind == "llama3":
        scaling |= {
            "low_freq_factor": model.low_freq_factor,
            "high_freq_factor": model.high_freq_factor,
        }
    if kind == "yarn":
        scaling |= {"beta_fast": model.beta_fast, "beta_slow": model.beta_slow}
        if (model.mscale, model.mscale_all_dim) != (1.0, 0.0):
            if model.attention in ("gqa", "compressed") and not model.mscale_all_dim:
                step = 0.1 * math.log(max(model.rope_factor, 1))
                scaling["attention_factor"] = step * model.mscale + 1
            else:
                scaling |= {"mscale": model.mscale, "mscale_all_dim": model.mscale_all_dim}
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling}


ROPE = Row(_read, write_rope)
