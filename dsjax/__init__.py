"""dsjax: the DeepSeek family in JAX and Flax, for TPU, GPU and CPU."""

import typing

if typing.TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from typing import Any

    from jax.sharding import Mesh
    from jax.typing import DTypeLike

    from dsjax.model.transformer import Transformer

__version__ = "0.1.0"


def load(
    path: "str | os.PathLike[str]",
    *,
    mesh: "Mesh | None" = None,
    dtype: "DTypeLike | None" = None,
    overrides: "Mapping[str, Any] | None" = None,
) -> "Transformer":
    """Loads a model from a Hugging Face folder, a converted folder or the folder of a run.

    Args:
      mesh: where the weights go, split as `dsjax.parallel.sharding` says; each process reads what
        its own devices hold. None: the default device.
      dtype: of weights and activations, bfloat16 or float32; None: the checkpoint's.
      overrides: fields of a Hugging Face config.json to read as if the file said so.

    Raises:
      ValueError: the folder holds no whole checkpoint, its config and its arrays disagree, the
        model does not fit the mesh, or another dtype is asked for.
    """
    from dsjax.checkpoint import load  # here, so that importing dsjax does not import jax

    return load.load(load.open_checkpoint(path, overrides), mesh=mesh, dtype=dtype)
