"""Names of the mesh axes, for the config, the commands and the mesh alike.

Nothing else lives here: floors below the config take explicit arguments, and config and commands
import no jax, so neither side could own the names.
"""

# In order of the network between their devices, the slowest first: neighbours along the last axes
# talk most.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
# Loading, generating and scoring do not split layers into stages.
CHECKPOINT_AXES = tuple(axis for axis in AXES if axis != "pipe")
