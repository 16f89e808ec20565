"""The DeepSeek family as Flax modules: what a model computes, and what that costs.

transformer.py   the whole model: training's forward pass, and steps on a decoding cache
inputs.py        what the model reads of tokens, computed and laid out over the devices once
block.py         one layer; scans over stacks of layers; rematerialisation
separate_layers.py  a stack's layers as arrays of their own, which a CPU decodes from
attention.py     what every kind of attention declares and shares
mla.py, gqa.py   the kinds: multi-head latent and grouped-query attention
compressed_attention.py  the kind of V4, and compressor.py, which makes its entries
mixed_layers.py  V4's layers, of several kinds (layer_kinds.py), with several residual streams
hyper_connections.py     what connects a layer to these
moe.py           mixture of experts: shared and routed experts, dispatched over devices
redundant_experts.py  replicas of routed experts, for serving on several devices
router.py        which experts each token goes to, and their weights
balance.py       balance losses and the update of the router's bias
mtp.py           the modules that predict tokens further ahead
head.py          log-likelihoods from hidden states, without holding all logits
token_sets.py    sets of token ids as bits
layers.py        parameter declarations, stacks, norms, feed-forward, embedding
rope.py          rotary position embedding
cache.py         the decoding cache of the whole model; layer_cache.py: one layer's part of it
parameters.py    from declarations: initial values, shardings, counts
flops.py         parameters, FLOPs and cache bytes, counted

  model = initialize(Transformer(config.model, policy), jax.random.key(0))
  logits = model(tokens_BT)  # float32 [B, T, V]
  cache = empty_cache(config.model, batch, length, policy.compute)
  extended = model.extend(tokens_BT, starts_B, cache)  # hidden states and the cache
"""
