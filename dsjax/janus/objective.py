"""What a model that sees and draws learns from: the next token, or the next code of a picture.

The loss is one mean over everything that is predicted, text and codes alike, without weights
between them (Janus, arXiv:2410.13848, section 3.3). A micro-batch holds, in this order and in fixed
numbers, rows that see, rows of text and rows that draw. Beside `tokens` and `segment_ids` it has

  weights   float32 [..., T + 1], 1 for the tokens of text to predict
  codes     int32 [..., T + 1], the code that stands at a position; -1 where none does
  features  int32 [..., T + 1], which of the features of the row's pictures stands at a position;
            -1 where none does
  pictures  uint8 [..., P, size, size, 3], those of a row, as `pictures.square` makes them

An input is replaced where a feature or a code stands. A code is predicted from the position before
it, the first one from the token that begins a picture.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config.janus import KINDS, Janus
from dsjax.model.balance import BalanceWeights
from dsjax.model.head import weighted_nll
from dsjax.model.inputs import shift_left
from dsjax.model.transformer import Embeddings, Hidden
from dsjax.parallel.sharding import constrain, parts_here
from dsjax.train.loss import target_mask
from dsjax.train.objective import (
    Batch,
    ForwardPass,
    Knobs,
    Metrics,
    Objective,
    Sums,
    Weights,
)
from dsjax.vision import pictures
from dsjax.vision.projector import CodeHead


class Targets(NamedTuple):
    """What positions read beside their token, and what they predict, [..., B, T]."""

    ids: jax.Array  # int32, the next token
    counted: jax.Array  # float32, 1 where it is predicted
    next_codes: jax.Array  # int32, the next code
    next_counted: jax.Array  # float32, 1 where it is predicted
    codes: jax.Array  # int32, the code here, or -1
    features: jax.Array  # int32, the feature here, or -1
    pictures: jax.Array  # uint8 [..., rows that see, P, size, size, 3]


class Counts(NamedTuple):
    """Rows of each kind in a micro-batch, in this order."""

    see: int
    text: int
    draw: int

    @property
    def kinds(self) -> list[str]:
        """The kinds of which there are any."""
        return [kind for kind in KINDS if getattr(self, kind)]

    def rows(self, kind: str) -> slice:
        """Returns where the rows of a kind are."""
        first = sum(self[: KINDS.index(kind)])
        return slice(first, first + getattr(self, kind))


def seeing_and_drawing(config: Janus, rules: pictures.Rules) -> Objective:
    """Returns the objective of a run. It asks for no knobs.

    Its sums are, of each kind in `janus.ratio`, the nats of what its rows predict and their number,
    such as `draw` and `draw_targets`.

    Args:
      rules: how a picture's bytes become the tower's numbers.
    """
    train, counts = config.train, Counts(*config.counts)
    balance = BalanceWeights.of(train, config.shape, isolated=True)
    balanced = any((balance.sequence, balance.expert, balance.device, balance.communication))

    def weights(targets: Targets, knobs: Knobs) -> Weights:
        del knobs
        found = (targets.counted + targets.next_counted).sum(axis=(1, 2))
        n_targets = jnp.maximum(found.sum(), 1.0)
        each = jnp.broadcast_to(1.0 / n_targets, found.shape)
        return Weights({kind: each for kind in counts.kinds}, found / n_targets)

    def sums(model: Any, hidden: Hidden, targets: Targets, knobs: Knobs) -> Sums:
        del knobs
        return _sums(model, hidden, targets, counts, train.loss_chunk)

    return Objective(
        ForwardPass(True, False, balance if balanced else None, train.remat),
        functools.partial(_targets, n_see=counts.see),
        weights,
        sums,
        functools.partial(_metrics, kinds=counts.kinds),
        functools.partial(_embeddings, counts=counts, rules=rules),
    )


def _targets(batch: Batch, n_see: int) -> Targets:
    next_codes = shift_left(batch["codes"] + 1, 1)[..., :-1] - 1  # what is past the end is -1
    valid = target_mask(batch["segment_ids"], 1, isolate=True)
    weights = shift_left(batch["weights"], 1)[..., :-1]
    return Targets(
        ids=batch["tokens"][..., 1:],
        counted=(valid & (weights > 0)).astype(jnp.float32),
        next_codes=jnp.maximum(next_codes, 0),
        next_counted=(valid & (next_codes >= 0)).astype(jnp.float32),
        codes=batch["codes"][..., :-1],
        features=batch["features"][..., :-1],
        pictures=batch["pictures"][..., :n_see, :, :, :, :],
    )


def _embeddings(model: Any, targets: Targets, counts: Counts, rules: pictures.Rules) -> Embeddings:
    """Returns the features and the codes that stand in rows, in the order of their kinds."""
    T, D, dtype = targets.ids.shape[1], model.config.dim, model.policy.compute
    pieces_BTD = []
    if counts.see:
        features_BXD = see(model.eyes, targets.pictures, rules)
        place_BT = jnp.maximum(targets.features[counts.rows("see")], 0)
        pieces_BTD.append(jnp.take_along_axis(features_BXD, place_BT[..., None], axis=1))
    if counts.text:
        pieces_BTD.append(jnp.zeros((counts.text, T, D), dtype))
    if counts.draw:
        codes_BT = jnp.maximum(targets.codes[counts.rows("draw")], 0)
        pieces_BTD.append(model.eyes.pencil.embeddings(codes_BT))
    values_BTD = jnp.concatenate([each.astype(dtype) for each in pieces_BTD])
    given_BT = (targets.features >= 0) | (targets.codes >= 0)
    return Embeddings(given_BT, constrain(values_BTD, "batch", "tokens", "width"))


def _sums(model: Any, hidden: Hidden, targets: Targets, counts: Counts, chunk: int) -> Sums:
    found: Sums = {}
    for kind in counts.kinds:
        rows = counts.rows(kind)
        hidden_BTD = hidden.main_BTD[rows]
        if kind == "draw":
            counted_BT = targets.next_counted[rows]
            found[kind] = code_nll(
                model.eyes.pencil.head, hidden_BTD, targets.next_codes[rows], counted_BT, chunk
            )
        else:
            counted_BT = targets.counted[rows]
            weight = model.head_weight()
            found[kind] = weighted_nll(
                hidden_BTD, weight, targets.ids[rows], counted_BT, model.policy, chunk
            )
        found[f"{kind}_targets"] = counted_BT.sum()
    return found


def _metrics(sums: Sums, kinds: list[str]) -> Metrics:
    counts = {kind: sums[f"{kind}_targets"] for kind in kinds}
    each = {f"{kind}_loss": sums[kind] / jnp.maximum(counts[kind], 1.0) for kind in kinds}
    nats = jnp.asarray(sum(sums[kind] for kind in kinds))
    return {"loss": nats / jnp.maximum(jnp.asarray(sum(counts.values())), 1.0), **each}


def see(eyes: Any, pictures_BPYXC: jax.Array, rules: pictures.Rules) -> jax.Array:
    """Looks at the pictures of rows, uint8 [B, P, size, size, 3].

    Returns:
      [B, P * tokens, D].
    """
    # The numbers of the 256 values of a byte, so that they are those of inference to the bit.
    table_VC = pictures.normalized(np.repeat(np.arange(256)[:, None], 3, axis=1), rules)
    B, P, *rest = pictures_BPYXC.shape
    flat = pictures_BPYXC.reshape(B * P, *rest)
    channels = jax.lax.broadcasted_iota(jnp.int32, flat.shape, flat.ndim - 1)
    pixels = jnp.asarray(table_VC)[flat.astype(jnp.int32), channels]
    features = eyes(pixels)
    return features.reshape(B, P * features.shape[1], -1)


def code_nll(
    head: CodeHead, hidden_BTD: jax.Array, codes_BT: jax.Array, counted_BT: jax.Array, chunk: int
) -> jax.Array:
    """Sums the negative log-likelihood of the codes that count, in nats, float32.

    Args:
      chunk: the approximate number of positions per device whose logits exist at once.
    """
    B, T = codes_BT.shape
    width = min(T, max(1, chunk * parts_here("batch") // B))
    padded = T + -T % width

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padded - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, padded // width, width, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        hidden_BtD, codes_Bt, counted_Bt = chunk
        logits_BtV = head(hidden_BtD)
        chosen_Bt = jnp.take_along_axis(logits_BtV, codes_Bt[..., None], axis=-1)[..., 0]
        nll_Bt = jax.nn.logsumexp(logits_BtV, axis=-1) - chosen_Bt
        # Selected, not multiplied: where nothing counts, a loss may be infinite.
        return total + jnp.where(counted_Bt > 0, nll_Bt, 0.0).sum(), None

    total, _ = jax.lax.scan(
        of_chunk, jnp.float32(0), (cut(hidden_BTD), cut(codes_BT), cut(counted_BT))
    )
    return total
