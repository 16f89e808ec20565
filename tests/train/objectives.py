"""An objective's sums of one batch, without a step."""

import jax

from dsjax.train.objective import read_batch


def sums_of(objective, model, batch):
    """Runs the model on a batch [B, T + 1]; returns the sums, and what its layers routed."""
    micro_batches = {name: rows[None] for name, rows in batch.items()}
    inputs, targets = jax.tree.map(lambda x: x[0], read_batch(objective, model, micro_batches))
    forward = objective.forward
    hidden = model.forward(inputs, balance=forward.balance, remat=forward.remat)
    return objective.sums(model, hidden, targets, {}), hidden.routing
