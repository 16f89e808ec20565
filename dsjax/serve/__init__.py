"""A server that answers OpenAI's clients in DeepSeek's dialect, and a page to chat on.

server      starts, warms up, serves and drains: what tools/serve.py does
app         routes, keys, limits, and the page
chat        /v1/chat/completions
completion  /v1/completions, with echo and a suffix
fields      fields of a request's body, each checked
options     what both routes let a request choose about sampling, length, stops and reports
replies     the answer to one HTTP request: choices as they arrive, and their usage
choice      the tokens of one choice as text, thought, tool calls and log-probabilities
worker      the thread that owns the engine
fair_queue  who waits, and in which order
tools       the tools of a request, and what binds a reply that must call one
marked_calls  the same in V3.2's markup
steering    grammar, penalties and bias: what a token may be
grammar     JSON, schemas and grammars by llguidance
scoring     log-probabilities of given tokens
metrics     what Prometheus reads
errors      failures in the shape that clients expect
page        the page: HTML, CSS and JavaScript, served as they are
"""
