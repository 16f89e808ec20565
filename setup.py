"""Packages what lies beside `dsjax` in a checkout too: tools, the commands, and configs by name."""

from setuptools import find_packages, setup

BESIDE = ("tools", "configs", "configs.pipelines", "configs.rewards")

setup(
    packages=[*find_packages(include=["dsjax", "dsjax.*"]), *(f"dsjax.{name}" for name in BESIDE)],
    package_dir={"dsjax.tools": "tools", "dsjax.configs": "configs"},
)
