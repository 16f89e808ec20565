"""What a model that sees and draws learns from: the next token, or the next code of a picture, or
where a noisy picture moves.

The loss is one mean over everything that is predicted, without weights between the kinds (Janus,
arXiv:2410.13848, section 3.3): tokens and codes in nats; where a model draws by a flow, the squared
error of each position (`dsjax.janus.flowing`), as much as a token, and with `janus.align` its
negative cosine. JanusFlow's paper adds these two (arXiv:2411.07975v2, section 3.4) and does not say
how much a position counts beside a token. A micro-batch holds, in this order and in fixed numbers,
rows that see, rows of text and rows that draw. Beside `tokens` and `segment_ids` it has

  weights   float32 [..., T + 1], 1 for the tokens of text to predict
  codes     int32 [..., T + 1], the code that stands at a position; -1 where none does
  features  int32 [..., T + 1], which of the features of the row's pictures, or of the inputs of its
            drawings, stands at a position; -1 where none does
  pictures  uint8 [..., P, size, size, 3], the squares of a row's pictures
  large     the same for a second tower, if there is one
  latents, seeds, starts   of the drawings of a row, if they are drawn by a flow: `Drawings`
  drawn     uint8 [..., N, size, size, 3], the squares that they draw, if `janus.align` wants them

An input is replaced where a feature or a code stands. A code is predicted from the position before
it, the first one from the token that begins a picture; a velocity from the position itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config.janus import KINDS, Janus
from dsjax.janus import flowing
from dsjax.janus.flowing import Drawings
from dsjax.model.balance import BalanceWeights
from dsjax.model.head import weighted_nll
from dsjax.model.inputs import shift_left
from dsjax.model.transformer import Embeddings, Hidden
from dsjax.parallel.sharding import constrain, divisible, parts_here
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
    # uint8 [..., rows that see, P, size, size, 3], as the first tower sees them, and the second
    pictures: tuple[jax.Array, ...]
    drawings: Drawings | None  # of the rows that draw
    # uint8 [..., rows that draw, N, size, size, 3], what they draw as the first tower sees it
    drawn: jax.Array | None


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
    such as `draw` and `draw_targets`; and with `janus.align` those of `flowing.misalignment`.

    Args:
      rules: how a picture's bytes become the tower's numbers.
    """
    train, counts, align = config.train, Counts(*config.counts), config.janus.align
    balance = BalanceWeights.of(train, config.shape, isolated=True)
    balanced = any((balance.sequence, balance.expert, balance.device, balance.communication))

    def weights(targets: Targets, knobs: Knobs) -> Weights:
        del knobs
        found = (targets.counted + targets.next_counted).sum(axis=(1, 2))
        if targets.drawings is not None:
            found = found + targets.drawings.counted.sum(axis=1)
        n_targets = jnp.maximum(found.sum(), 1.0)
        each = jnp.broadcast_to(1.0 / n_targets, found.shape)
        factors = {kind: each for kind in counts.kinds}
        if align:
            factors["align"] = align * each
        return Weights(factors, found / n_targets)

    def sums(model: Any, hidden: Hidden, targets: Targets, knobs: Knobs) -> Sums:
        del knobs
        found = _sums(model, hidden, targets, counts, train.loss_chunk)
        if align:
            found["align"] = _misalignment(model, hidden, targets, counts, rules)
        return found

    return Objective(
        ForwardPass(
            True,
            False,
            balance if balanced else None,
            train.remat,
            inner=config.janus.align_layer if align else None,
        ),
        functools.partial(_targets, counts=counts),
        weights,
        sums,
        functools.partial(_metrics, kinds=counts.kinds, align=align),
        functools.partial(_embeddings, counts=counts, rules=rules),
    )


def _targets(batch: Batch, counts: Counts) -> Targets:
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
        pictures=tuple(
            batch[name][:, : counts.see] for name in ("pictures", "large") if name in batch
        ),
        drawings=_drawings(batch, counts),
        drawn=batch["drawn"][:, -counts.draw :] if "drawn" in batch else None,
    )


def _drawings(batch: Batch, counts: Counts) -> Drawings | None:
    if "latents" not in batch:
        return None
    return Drawings(*(batch[name][:, -counts.draw :] for name in Drawings._fields))


def _embeddings(model: Any, targets: Targets, counts: Counts, rules: pictures.Rules) -> Embeddings:
    """Returns what stands in rows instead of tokens, in the order of their kinds."""
    T, D, dtype = targets.ids.shape[1], model.config.dim, model.policy.compute
    pieces_BTD, begun = [], None
    if counts.see:
        features_BXD = see(model.eyes, targets.pictures, rules)
        pieces_BTD.append(_placed(features_BXD, targets.features[counts.rows("see")]))
    if counts.text:
        pieces_BTD.append(jnp.zeros((counts.text, T, D), dtype))
    if targets.drawings is not None:
        inputs_BXD, begun = flowing.begin(model.eyes.brush, targets.drawings)
        pieces_BTD.append(_placed(inputs_BXD, targets.features[counts.rows("draw")]))
    elif counts.draw:
        codes_BT = jnp.maximum(targets.codes[counts.rows("draw")], 0)
        pieces_BTD.append(model.eyes.pencil.embeddings(codes_BT))
    values_BTD = jnp.concatenate([each.astype(dtype) for each in pieces_BTD])
    given_BT = (targets.features >= 0) | (targets.codes >= 0)
    return Embeddings(given_BT, constrain(values_BTD, "batch", "tokens", "width"), begun)


def _placed(features_BXD: jax.Array, places_BT: jax.Array) -> jax.Array:
    """Returns the features at their places, [B, T, D], and any where there are none."""
    return jnp.take_along_axis(features_BXD, jnp.maximum(places_BT, 0)[..., None], axis=1)


def _sums(model: Any, hidden: Hidden, targets: Targets, counts: Counts, chunk: int) -> Sums:
    found: Sums = {}
    for kind in counts.kinds:
        rows = counts.rows(kind)
        hidden_BTD = hidden.main_BTD[rows]
        if kind == "draw" and targets.drawings is not None:
            found[kind] = flowing.squared_error(
                model.eyes.brush, hidden_BTD, targets.drawings, hidden.beside
            )
            counted_BT = targets.drawings.counted
        elif kind == "draw":
            counted_BT = targets.next_counted[rows]
            found[kind] = code_nll(
                model.eyes.pencil.head, hidden_BTD, targets.next_codes[rows], counted_BT, chunk
            )
        else:
            counted_BT = targets.counted[rows]
            weight = model.head_weight()
            of_rows = map(divisible, (hidden_BTD, targets.ids[rows], counted_BT))
            hidden_BTD, ids_BT, padded_BT = of_rows
            found[kind] = weighted_nll(hidden_BTD, weight, ids_BT, padded_BT, model.policy, chunk)
        found[f"{kind}_targets"] = counted_BT.sum()
    return found


def _misalignment(
    model: Any, hidden: Hidden, targets: Targets, counts: Counts, rules: pictures.Rules
) -> jax.Array:
    """Looks at what is drawn, without a gradient for the tower, and compares; see
    `flowing.misalignment`.
    """
    assert hidden.inner_BTD is not None and targets.drawn is not None and targets.drawings
    tower = jax.lax.stop_gradient(model.eyes.tower)
    seen_BTD = tower(divisible(_normalized(targets.drawn, rules)))
    inner_BTD = hidden.inner_BTD[counts.rows("draw")]
    return flowing.misalignment(model.alignment, inner_BTD, seen_BTD, targets.drawings)


def _metrics(sums: Sums, kinds: list[str], align: float) -> Metrics:
    counts = {kind: sums[f"{kind}_targets"] for kind in kinds}
    each = {f"{kind}_loss": sums[kind] / jnp.maximum(counts[kind], 1.0) for kind in kinds}
    nats = jnp.asarray(sum(sums[kind] for kind in kinds))
    if align:
        each["align_loss"] = sums["align"] / jnp.maximum(counts["draw"], 1.0)
        nats += align * sums["align"]
    return {"loss": nats / jnp.maximum(jnp.asarray(sum(counts.values())), 1.0), **each}


def see(eyes: Any, pictures_BPYXC: Sequence[jax.Array], rules: pictures.Rules) -> jax.Array:
    """Looks at the squares of rows, uint8 [B, P, size, size, 3], of each tower.

    Returns:
      [B, P * tokens, D]; where pictures are seen in tiles, a row ends with the embeddings of a
      line's end and of what separates the whole from the tiles.
    """
    own = [rules, *([rules.high] if rules.high else [])]
    features = eyes(*(divisible(x) for x in map(_normalized, pictures_BPYXC, own)))
    B, P = pictures_BPYXC[0].shape[:2]
    D = features.shape[-1]
    features_BXD = features[: B * P].reshape(B, -1, D)
    if rules.resolutions:
        marks = jnp.stack([eyes.newline[...], eyes.separator[...]]).astype(features.dtype)
        marks_BXD = jnp.broadcast_to(marks[None], (B, 2, D))
        features_BXD = jnp.concatenate([features_BXD, marks_BXD], axis=1)
    return features_BXD


def _normalized(pictures_BPYXC: jax.Array, rules: pictures.Rules) -> jax.Array:
    """Returns a tower's input, float32 [B * P, size, size, 3]."""
    # The numbers of the 256 values of a byte, so that they are those of inference to the bit.
    table_VC = pictures.normalized(np.repeat(np.arange(256)[:, None], 3, axis=1), rules)
    flat = pictures_BPYXC.reshape(-1, *pictures_BPYXC.shape[2:])
    channels = jax.lax.broadcasted_iota(jnp.int32, flat.shape, flat.ndim - 1)
    return jnp.asarray(table_VC)[flat.astype(jnp.int32), channels]


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
