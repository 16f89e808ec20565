"""Kimi-K2: DeepSeek-V3's architecture and code under a name of its own."""

from __future__ import annotations

import dataclasses

from dsjax.checkpoint.families.deepseek_v3 import DEEPSEEK_V3

KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, name="kimi_k2")
