"""The operations that XLA alone does not make fast, as pure functions of arrays. No file knows of
configs, models or meshes; `Target` says which machine a program is compiled for.

  target.py             the machine: its kind and capability, read from devices or described
  attention.py          causal attention over whole sequences: picks a kernel for the target
  flash_attention.py    the same in plain XLA, chunk by chunk or by a list of tiles
  cudnn_attention.py    the same through cuDNN, for Hopper GPUs
  hopper_attention.py   the same within documents, for Hopper GPUs
  cached_attention.py   attention of new tokens to a decoding cache
  latent_attention.py   the same to a cache of latents, one token per row, for Hopper GPUs
  latent_queries.py     what a decoding step does around that: queries, entries, heads' values
  few_rows.py           products of a decoding step's few rows, read in place, for Hopper GPUs
  likeliest_token.py    the head of a decoding step that draws nothing, for Hopper GPUs
  sparse_attention.py   attention to the keys that an index chooses (V3.2): masked, and gathered
  native_sparse.py      attention in three branches that read few keys (NSA)
  compressed_attention.py  attention to recent tokens and compressed entries (V4)
  index_kernel.py       the scores of that index, for TPUs
  dense_lesson.py       how far that index is from attention to all keys, by a list of tiles
  stacked_rows.py       rows of one layer out of a stack of layers
  block_kernel.py       attention to chosen blocks of keys, for TPUs
  query_tiles.py        a function of queries, run over a few of them after the other
  grouped_matmul.py     rows sorted by group times one matrix per group: the experts' products
  hopper_grouped.py     the same as Mosaic GPU kernels, for Hopper
  chosen_experts.py     the experts that tokens chose, read in place: decoding, prompts on a CPU
  expert_choice.py      the router's choice for few tokens, for Hopper GPUs
  mixture_step.py       a MoE layer after its attention, for few tokens, for Hopper GPUs
  grouped_mixture.py    the same where tokens choose more matrices than there are
  small_matmul.py       grouped products with weights of eight or four bits, for TPUs
  fp8_gemm.py           block-scaled FP8 products, slice by slice
  hopper_scaled.py      the same with each slice's sums in registers, for Hopper GPUs
  varying.py            types of values that differ between devices inside `shard_map`

What each is tested against stands in `tests/oracles/kernels.py`.
"""
