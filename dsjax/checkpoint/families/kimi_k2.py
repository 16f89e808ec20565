"""Kimi-K2: the architecture of DeepSeek-V3 under its own `model_type`."""

from __future__ import annotations

import dataclasses

from dsjax.checkpoint.families.deepseek_v3 import DEEPSEEK_V3

KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, name="kimi_k2")
