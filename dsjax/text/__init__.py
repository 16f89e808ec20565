"""Text and tokens, without jax: what a checkpoint's folder says about both, and replies as text.

tokenizer      text to token ids and back; training a tokenizer
tiktoken_file  reading tiktoken.model, of releases without a tokenizer.json
added_tokens   the tokens that DeepSeek-VL2's processor adds to its tokenizer
vocabulary     the tokenizer of a checkpoint's folder, with its begin, end and thinking tokens
chat           conversations as tokens, in DeepSeek's formats or by a chat template
conversation   whole conversations as tokens, and which of them are trained
template       the chat template that a checkpoint brings along
sandbox        limited processes in which templates run and tokenizers are tried
reply          tokens of a reply to text as they arrive: characters, stop strings, thoughts
"""
