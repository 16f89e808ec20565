"""Generation of tokens with a model: any number of requests, on any mesh, without text or files.

engine       requests in, tokens out: a closed batch, or requests that join and leave a running one
prefill      where prompts run: with decoding, or on devices of their own
prompts      newcomers, whose prompts run in chunks, each distinct prompt once
rows         the requests that run together, one per row of a cache
prefixes     known beginnings of prompts: found by their tokens, kept in pages
pages        copies of cache entries from pages to rows and back
page_files   the same on disk, for longer than memory and a restart
programs     the compiled functions of an engine, and the weights they run with
decoding     those functions: a chunk of prompts, some steps of decoding, rows put into a cache
unattended   steps of decoding that ask nothing of the host: on a GPU, while all rows are greedy
speculative  decoding with drafts by the model's own MTP modules
sampling     from logits to a token: temperature, top-k, top-p, min-p
balancing    redundant experts: loads counted while requests run, and experts moved to even them
warming      compiling every program of a service before its first request
record       what is reported of each drawn token on request: log-probabilities, chosen experts,
             the ids to choose from
"""
