"""The whole model: embedding, dense layers, mixture-of-experts layers, final norm, output head and
MTP modules.

Dense prefix, MoE body and MTP modules are three stacks. A stack is one set of parameters with a
leading layer dimension, over which `lax.scan` runs, so program size and compile time do not grow
with depth. The forward pass has no side effects: routing statistics and balance losses are
returned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.kernels import likeliest_token
from dsjax.kernels.sparse_attention import Lesson
from dsjax.model import rope
from dsjax.model.balance import BalanceWeights
from dsjax.model.block import Block, Context, Extension, extend_layers, rematerialized, run_layers
from dsjax.model.cache import Cache
from dsjax.model.inputs import Ahead, Inputs, read_tokens
from dsjax.model.layer_cache import LayerCache
from dsjax.model.layers import Embedding, Head, RMSNorm, stack
from dsjax.model.mixed_layers import MixedLayers
from dsjax.model.moe import RoutingStatistics
from dsjax.model.mtp import MTP
from dsjax.model.parameters import pinned
from dsjax.model.separate_layers import SeparateLayers, in_bits, separable
from dsjax.parallel.context import restore
from dsjax.parallel.sharding import constrain
from dsjax.precision.matmul import vocabulary_logits
from dsjax.precision.policy import Policy


class Hidden(NamedTuple):
    """What training needs from a forward pass."""

    main_BTD: jax.Array  # after the final norm
    mtp_DBTD: jax.Array | None  # depth first, each after its own norm
    routing: RoutingStatistics | None  # stacked over MoE layers, then MTP modules
    # float32, of the layers with an indexer, then of the MTP modules; see `Statistics`
    index_loss: jax.Array | None = None
    inner_BTD: jax.Array | None = None  # after an inner layer, without a norm; on request
    beside: Any = None  # of the embeddings, as given


class Extended(NamedTuple):
    """Hidden states of the added tokens, and the cache that now holds them."""

    main_BTD: jax.Array  # after the final norm
    mtp_input_BTD: jax.Array  # what the first MTP module reads
    cache: Cache
    experts_LBTK: jax.Array | None = None  # int32, chosen by the MoE layers; on request
    residual_BTD: jax.Array | None = None  # before the final norm


class Embeddings(NamedTuple):
    """Embeddings that replace those of some tokens, for example an image's."""

    given_BT: jax.Array  # bool, the positions to replace
    values_BTD: jax.Array  # ignored at other positions
    beside: Any = None  # what else was computed with them, for an objective's sums


class Transformer(nnx.Module):
    """A DeepSeek model. The constructor declares the parameters, and
    `dsjax.model.parameters.initialize` gives them values.
    """

    def __init__(self, config: ModelConfig, policy: Policy):
        self.embed = Embedding(config.vocab_size, config.dim, config.init_std, policy)
        if config.n_dense_layers:
            axis = "end_layers" if config.n_moe_layers else "layers"
            self.dense_layers = stack(Block(config, policy, moe=False), config.n_dense_layers, axis)
        if config.attention == "compressed":
            self.moe_layers = MixedLayers(config, policy)
        elif config.n_moe_layers:
            self.moe_layers = stack(Block(config, policy, moe=True), config.n_moe_layers)
        self.norm = RMSNorm(config.dim, config.norm_eps, policy)
        if not config.tie_embed:
            self.head = Head(config.dim, config.vocab_size, config.init_std)
        if config.n_mtp:
            layer = Block(config, policy, moe=config.n_moe_layers > 0)
            self.mtp = stack(MTP(config, policy, layer), config.n_mtp, "end_layers")
        self.config = config
        self.policy = policy

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Predicts the token after each token.

        Args:
          tokens_BT: int32; ids of `vocab_size` or more give NaN logits.
          segment_ids_BT: int32, the document of each token; documents packed into one row do not
            see one another.

        Returns:
          logits, float32 [B, T, V].
        """
        return restore(self.logits(self.hidden(tokens_BT, segment_ids_BT, mtp=False).main_BTD))

    def head_weight(self) -> jax.Array:
        """Returns [D, V]: the head's weight, or the transposed embedding if they are tied."""
        return self.embed.weight[...].T if self.config.tie_embed else self.head.weight[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns logits, float32 [B, T, V], of a normed hidden state of the main model or an MTP
        module.
        """
        return vocabulary_logits(hidden_BTD, self.head_weight(), self.policy)

    def likeliest(self, residual_BTD: jax.Array) -> jax.Array:
        """Returns the most likely token after each of some tokens, int32 [B, T]; of equally likely
        ones the lowest id.

        Args:
          residual_BTD: after the last layer, before the final norm.
        """
        norm, target = self.norm, self.policy.target
        x_MD = residual_BTD.reshape(-1, residual_BTD.shape[-1])
        # A tied head would be transposed first.
        head = None if self.config.tie_embed else self.head.weight[...]
        if not likeliest_token.fits(len(x_MD), head, x_MD.dtype, target):
            return jnp.argmax(self.logits(norm(residual_BTD)), axis=-1).astype(jnp.int32)
        assert head is not None
        ids_M = likeliest_token.likeliest_token(
            x_MD,
            norm.weight[...],
            head,
            eps=norm.eps,
            multiprocessors=target.multiprocessors,
        )
        return ids_M.reshape(residual_BTD.shape[:2])

    def hidden(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        *,
        isolate: bool = True,
        mtp: bool = True,
        balance: BalanceWeights | None = None,
        remat: str | None = None,
        embeddings: Embeddings | None = None,
        experts_LBTK: jax.Array | None = None,
    ) -> Hidden:
        """Runs the model up to the hidden states that the output head reads. Their tokens are in
        the order of `dsjax.parallel.context.arrange`.

        Args:
          segment_ids_BT: int32, the document of each token, 0 for padding; None: each row is one
            document.
          isolate: whether attention, positions and balance losses stay within a document.
          mtp: whether to run the MTP modules.

        The others are those of `forward`.
        """
        n_mtp = self.config.n_mtp if mtp else 0
        inputs = read_tokens(tokens_BT, segment_ids_BT, isolate=isolate, n_mtp=n_mtp)
        return self.forward(
            inputs, balance=balance, remat=remat, embeddings=embeddings, experts_LBTK=experts_LBTK
        )

    def forward(
        self,
        inputs: Inputs,
        *,
        balance: BalanceWeights | None = None,
        remat: str | None = None,
        embeddings: Embeddings | None = None,
        experts_LBTK: jax.Array | None = None,
        lesson: Lesson | None = None,
        inner: int | None = None,
    ) -> Hidden:
        """Runs the model on prepared tokens, in their order.

        Args:
          balance: weights of the balance losses; None omits them.
          remat: what a layer's backward pass recomputes: "none", "selective" or "full"; None: there
            is no backward pass.
          embeddings: replace the main model's embeddings of some tokens.
          experts_LBTK: int32, expert choices to replay: those of the MoE layers, optionally
            followed by those of the MTP modules. Weights still come from the routers, with
            gradients. None: the routers choose.
          lesson: what the layers' indexers learn from; None: nothing.
          inner: the layer of the body, counted from 1, whose output is wanted too.
        """
        context = self.context(inputs, remat)
        x_BTD, prefix = self.enter(inputs, context, embeddings, lesson)
        body = getattr(self, self.body)
        own = ahead = None
        if experts_LBTK is not None:
            own, ahead = jnp.split(experts_LBTK, [self.config.n_moe_layers])
        if isinstance(body, MixedLayers):
            assert experts_LBTK is None and balance is None and lesson is None and inner is None
            x_BTD = body(x_BTD, inputs.tokens, inputs.segment_ids)
            return self.leave(x_BTD, inputs, context, balance=balance)
        x_BTD, found, inner_BTD = run_layers(
            body, x_BTD, context, balance, own, lesson=lesson, inner=inner
        )
        hidden = self.leave(x_BTD, inputs, context, balance=balance, experts=ahead, lesson=lesson)
        losses = [x for x in (prefix, found.index_loss, hidden.index_loss) if x is not None]
        return hidden._replace(
            routing=_joined(found.routing, hidden.routing),
            index_loss=jnp.concatenate(losses) if losses else None,
            inner_BTD=inner_BTD,
            beside=embeddings.beside if embeddings else None,
        )

    @property
    def redundant(self) -> bool:
        """Tells whether experts have replicas; see `dsjax.model.redundant_experts`."""
        if self.separate or not self.config.n_moe_layers:
            return False
        experts = self.moe_layers.routed_experts
        return experts is not None and experts.slots is not None

    def for_decoding(self) -> Transformer:
        """Returns the model in the form that decodes fastest where it is. On a CPU its layers are
        separate, almost all of their weights views of this model's, and only `extend` runs;
        elsewhere it is itself.
        """
        stacks = [name for name in ("dense_layers", "moe_layers") if hasattr(self, name)]
        of_blocks = all(isinstance(getattr(self, name), Block) for name in stacks)
        if not (of_blocks and separable(self)):
            return self
        leaves, structure = jax.tree.flatten(self)
        model = structure.unflatten(leaves)
        for name in stacks:
            layers = SeparateLayers(getattr(self, name))
            for block in layers.layers:
                block.attn.lay_out_for_decoding()
            setattr(model, name, layers)
        for outer in (model.embed, *([] if self.config.tie_embed else [model.head])):
            outer.weight = outer.weight.copy(jax.tree.map(in_bits, outer.weight[...]))
        return model

    @property
    def separate(self) -> bool:
        """Tells whether layers, and so a cache's entries, are arrays of their own."""
        return isinstance(getattr(self, self.body), SeparateLayers)

    @property
    def body(self) -> str:
        """Names the stack of layers that runs between `enter` and `leave`."""
        return "moe_layers" if self.config.n_moe_layers else "dense_layers"

    def enter(
        self,
        inputs: Inputs,
        context: Context,
        embeddings: Embeddings | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Computes the body's input: embeddings and, before a MoE body, the dense layers.

        Returns:
          [B, T, D]; and the `index_loss` of the dense layers before a MoE body, if they learn.
        """
        x_BTD = self._embed(inputs.tokens, embeddings)
        if not (self.config.n_moe_layers and self.config.n_dense_layers):
            return x_BTD, None
        x_BTD, statistics, _ = run_layers(self.dense_layers, x_BTD, context, None, lesson=lesson)
        return x_BTD, statistics.index_loss

    def _embed(self, tokens_BT: jax.Array, embeddings: Embeddings | None) -> jax.Array:
        x_BTD = self.embed(tokens_BT)
        if embeddings is None:
            return x_BTD
        values_BTD = embeddings.values_BTD.astype(x_BTD.dtype)
        return jnp.where(embeddings.given_BT[..., None], values_BTD, x_BTD)

    def leave(
        self,
        x_BTD: jax.Array,
        inputs: Inputs,
        context: Context,
        *,
        balance: BalanceWeights | None,
        experts: jax.Array | None = None,
        lesson: Lesson | None = None,
    ) -> Hidden:
        """Applies the final norm and the MTP modules; `routing` and `index_loss` of the result are
        those of the modules alone.

        Args:
          experts: int32 [modules, B, T, K], the modules' choices to replay; None or of no
            modules: they choose.
        """
        if experts is not None and not len(experts):
            experts = None

        def mtp_module(hidden_BTD: jax.Array, scanned: tuple[MTP, Ahead, Any]):
            module, ahead, experts_BTK = scanned
            module = pinned(module, self.policy)
            # Otherwise the compiler has what the norms read and write whole on every device.
            embedding_BTD, hidden_BTD = (
                constrain(x_BTD, "batch", "length", "width")
                for x_BTD in (self.embed(ahead.tokens), hidden_BTD)
            )
            hidden_BTD, statistics = module(
                embedding_BTD,
                hidden_BTD,
                context._replace(documents_BT=ahead.documents),
                balance,
                experts_BTK,
                lesson,
            )
            return hidden_BTD, (hidden_BTD, statistics)

        main_BTD = self.norm(x_BTD)
        if inputs.ahead is None:
            return Hidden(main_BTD, None, None)
        first = main_BTD if self.config.mtp_after_final_norm else x_BTD
        _, (mtp_DBTD, statistics) = jax.lax.scan(
            rematerialized(mtp_module, context.remat), first, (self.mtp, inputs.ahead, experts)
        )
        # Here, or the backward pass would compute the modules' outputs again, for the norms alone.
        mtp_DBTD = jax.vmap(RMSNorm.__call__)(self.mtp.norm, mtp_DBTD)
        mtp_DBTD = constrain(mtp_DBTD, "end_layers", "batch", "length", "width")
        return Hidden(main_BTD, mtp_DBTD, statistics.routing, statistics.index_loss)

    def extend(
        self,
        tokens_BT: jax.Array,
        starts_B: jax.Array,
        cache: Cache,
        *,
        routing: bool = False,
        embeddings: Embeddings | None = None,
        skipped_B: jax.Array | None = None,
    ) -> Extended:
        """Runs tokens whose predecessors are in the cache, and adds them to it.

        Args:
          tokens_BT: int32; row b has positions starts_B[b], starts_B[b] + 1, ... A row may end in
            padding: later tokens overwrite its cache entries before any query sees them.
          starts_B: int32; starts_B + T must not exceed the cache's length.
          routing: whether to return the experts that the MoE layers choose.
          embeddings: replace the embeddings of some tokens.
          skipped_B: int32, how many tokens before these are masked out and have no place in the
            cache, yet count for rope; None: no tokens.
        """
        extension = self._extension(tokens_BT, starts_B, skipped_B)
        x_BTD = self._embed(tokens_BT, embeddings)
        dense, moe, experts_LBTK = cache.dense, cache.moe, None
        if dense is not None:
            x_BTD, dense, _ = extend_layers(self.dense_layers, x_BTD, dense, extension)
        body = getattr(self, self.body)
        if isinstance(body, MixedLayers):
            assert isinstance(moe, dict) and skipped_B is None
            x_BTD, moe, experts_LBTK = body.extend(
                x_BTD, tokens_BT, extension.positions_BT, moe, routing=routing
            )
        elif moe is not None:
            x_BTD, moe, experts_LBTK = extend_layers(body, x_BTD, moe, extension, routing=routing)
        main_BTD = self.norm(x_BTD)
        mtp_input_BTD = main_BTD if self.config.mtp_after_final_norm else x_BTD
        cache = cache._replace(dense=dense, moe=moe)
        return Extended(main_BTD, mtp_input_BTD, cache, experts_LBTK, x_BTD)

    def extend_mtp(
        self,
        depth: int,
        tokens_BT: jax.Array,
        hidden_BTD: jax.Array,
        starts_B: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Runs one MTP module on positions starts_B, starts_B + 1, ... and adds them to its cache.

        Args:
          depth: which module; 0 is the first.
          tokens_BT: int32; for position p the token at p + depth + 1, whose successor is predicted.
          hidden_BTD: the states at these positions: for the first module `mtp_input_BTD` of
            `extend`, for later ones what this method returned for the module before.
          cache: made with `mtp=True`; all earlier positions must have run through this module.

        Returns:
          the hidden states for the next module, the normed ones for the output head, and the cache.
        """
        assert cache.mtp is not None, "the cache has no room for the MTP modules"
        extension = self._extension(tokens_BT, starts_B)
        module = jax.tree.map(lambda stack: stack[depth], self.mtp)
        pair_BTD = module.join(self.embed(tokens_BT), hidden_BTD)
        hidden_BTD, layer_cache, _ = module.layer.extend(
            pair_BTD,
            LayerCache(cache.mtp, jnp.int32(depth)),
            extension,
            self.mtp.layer,
        )
        return hidden_BTD, module.norm(hidden_BTD), cache._replace(mtp=layer_cache.entries)

    def _extension(
        self, tokens_BT: jax.Array, starts_B: jax.Array, skipped_B: jax.Array | None = None
    ) -> Extension:
        steps_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        positions_BT = starts_B[:, None] + steps_T[None]
        turned_BT = positions_BT if skipped_B is None else positions_BT + skipped_B[:, None]
        return Extension(positions_BT, rope.angles(turned_BT, self.config))

    def context(self, inputs: Inputs, remat: str | None = None) -> Context:
        """Prepares what all layers need besides the hidden states."""
        angles = rope.angles(inputs.positions, self.config)
        return Context(angles, inputs.segment_ids, inputs.documents, remat)


def _joined(body: Any, modules: Any) -> Any:
    """Joins the statistics of the body's layers and of the MTP modules, where both have any."""
    if body is None or modules is None:
        return body
    return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), body, modules)
