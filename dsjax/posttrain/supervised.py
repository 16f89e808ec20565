"""The objective of supervised fine-tuning: cross-entropy of the tokens that are trained.

The loss is the mean over the trained tokens of the whole batch, however they fall into rows and
micro-batches (a mean of means would let a short reply count more, depending on its neighbours).
Conversations in a row do not see one another. MTP modules rest, and routers are left alone, unless
`sft.mtp=on` or a balance loss of `train.` asks for more.
"""

from __future__ import annotations

import jax

from dsjax.config.finetuning import FineTuning
from dsjax.model.balance import BalanceWeights
from dsjax.model.inputs import shift_left
from dsjax.train.loss import next_tokens, target_mask
from dsjax.train.objective import Batch, ForwardPass, Objective


def supervised(config: FineTuning) -> Objective:
    """Returns the objective of a run whose batches have `weights`, 1 for the tokens to train; the
    rest is that of `dsjax.train.loss.next_tokens`.
    """
    train, model, mtp = config.train, config.shape, config.sft.mtp == "on"
    balance = BalanceWeights.of(train, model, isolated=True)
    balanced = any((balance.sequence, balance.expert, balance.device, balance.communication))

    def counted(batch: Batch, ahead: int) -> jax.Array:
        weights = shift_left(batch["weights"], ahead)[..., :-1]
        return target_mask(batch["segment_ids"], ahead, isolate=True) & (weights > 0)

    return next_tokens(
        ForwardPass(True, mtp, balance if balanced else None, train.remat),
        counted,
        n_mtp=model.n_mtp if mtp else 0,
        chunk=train.loss_chunk,
    )
