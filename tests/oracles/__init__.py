"""Slow float64 NumPy renderings of the papers' equations, one token or one sequence at a time.

They share no code with dsjax but its config, read the same parameter tree, and are kept too simple
to be wrong in the same way. Array names carry dim letters (style legend): T tokens, D model, N
heads, E experts, K experts a token, V vocabulary.
"""
