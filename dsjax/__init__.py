"""dsjax: the DeepSeek family in JAX and Flax, for TPU, GPU and CPU.

From the ground up; a module imports only from lines above its own:

  axes, files, display, tables    names of mesh axes; files written whole; what a terminal shows
  signals                         Ctrl-C and SIGTERM
  config, settings, command       experiments as dataclasses; reading them; arguments of the tools
  kernels                         attention and grouped products for each kind of machine
  text, data                      tokenizers and chat formats; documents to packed sequences
  precision                       which element type does what, FP8 included
  parallel                        meshes, sharding, expert, context and pipeline parallelism
  model                           the transformer: MLA, GQA, mixture of experts, MTP
  generate, checkpoint            decoding; checkpoints of our own and Hugging Face's
  infer                           chat, scoring and the evaluation harness
  serve                           the server with OpenAI's API, and its page
  train, show                     training runs; figures of a config
  curate                          text made ready to train on
  posttrain                       fine-tuning, preferences, rewards, reinforcement, distillation
  plan                            figures of a step on a TPU slice, of a pipeline schedule

`load` is the one entry for Python users; everything else is reached through tools/ or the command
`dsjax`.
"""

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
      path: the folder, or a name on the Hugging Face Hub, such as "deepseek-ai/DeepSeek-V2-Lite" or
        "OWNER/NAME@REVISION", which is downloaded into the Hub's cache.
      mesh: devices to place the weights on, split as `dsjax.parallel.sharding` says; each process
        reads only what its own devices hold. None: the default device.
      dtype: of weights and activations, bfloat16 or float32; None: the checkpoint's.
      overrides: fields of a Hugging Face config.json and the values to read in their place.

    Raises:
      ValueError: the folder holds no complete checkpoint, its config and arrays disagree, the model
        does not fit the mesh, or `dtype` is another type.
    """
    from dsjax.checkpoint import load  # here, so that importing dsjax does not import jax

    return load.load(load.open_checkpoint(path, overrides), mesh=mesh, dtype=dtype)
