"""What a request may choose in either route: sampling, length, stops, reports, and who asks."""

from __future__ import annotations

import dataclasses
import re
import secrets

from dsjax.generate.sampling import Sampling
from dsjax.serve.fields import Fields, invalid

MOST_STOPS, LONGEST_STOP = 16, 256
MOST_CHOICES = 32
MOST_TOP = 20
MOST_BIASED = 1024
_USER = re.compile(r"[a-zA-Z0-9_-]{1,512}")
# OpenAI's, which change nothing here.
HARMLESS = frozenset(
    "store metadata service_tier prompt_cache_key prompt_cache_retention safety_identifier "
    "parallel_tool_calls verbosity".split()
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The choices of a request, checked."""

    sampling: Sampling
    max_tokens: int | None  # None: the route's default
    stops: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool  # in a chunk of its own, after the last choice has ended
    frequency_penalty: float
    presence_penalty: float
    logit_bias: dict[int, float]
    user: str

    @property
    def seeds(self) -> list[int]:
        """Returns the seed of each choice."""
        return [(self.sampling.seed + number) % (1 << 32) for number in range(self.n)]


def read_options(fields: Fields, defaults: Sampling, *, vocab_size: int, user: str) -> Options:
    """Takes the fields that both routes have.

    Args:
      defaults: of sampling, where the request says nothing.
      user: who asks, where the request names no `user_id`.

    Raises:
      ApiError: 422, a field is of the wrong type or out of range.
    """
    seed = fields.integer("seed", None, -(1 << 63), (1 << 64) - 1)
    sampling = Sampling(
        temperature=fields.number("temperature", defaults.temperature, 0.0, 2.0),
        top_k=fields.integer("top_k", defaults.top_k, 0, vocab_size) or 0,
        top_p=_above_zero(fields.number("top_p", defaults.top_p, 0.0, 1.0)),
        min_p=fields.number("min_p", defaults.min_p, 0.0, 1.0),
        seed=secrets.randbits(32) if seed is None else seed % (1 << 32),
    )
    max_tokens = fields.integer("max_tokens", None, 0, None)
    max_tokens = fields.integer("max_completion_tokens", max_tokens, 0, None)
    stream = fields.boolean("stream")
    include_usage = False
    if fields.has("stream_options"):
        if not stream:
            raise invalid("stream_options", "is for streams; add stream=true or leave it out")
        inner = Fields(fields.take("stream_options"), "stream_options")
        include_usage = inner.boolean("include_usage")
        inner.finish({"include_obfuscation"})
    n = fields.integer("n", 1, 1, MOST_CHOICES) or 1
    return Options(
        sampling=sampling,
        max_tokens=max_tokens,
        stops=_stops(fields),
        n=n,
        stream=stream,
        include_usage=include_usage,
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        logit_bias=_biases(fields, vocab_size),
        user=_user(fields, user),
    )


def _above_zero(top_p: float) -> float:
    """Turns a top_p of 0, which clients send for the most likely token, into the least there is."""
    return max(top_p, 1e-9)


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop", [])
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid(fields.path("stop"), "must be a text or a list of texts")
    if len(stops) > MOST_STOPS:
        raise invalid(fields.path("stop"), f"has {len(stops)} texts; at most {MOST_STOPS} may be")
    if any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise invalid(
            fields.path("stop"), f"must have texts of 1 to {LONGEST_STOP} characters each"
        )
    return tuple(stops)


def _biases(fields: Fields, vocab_size: int) -> dict[int, float]:
    given = fields.take("logit_bias", {})
    path = fields.path("logit_bias")
    if not isinstance(given, dict) or len(given) > MOST_BIASED:
        raise invalid(path, f"must be an object of at most {MOST_BIASED} token ids and biases")
    inner, found = Fields(given, path), {}
    for key in given:
        # Python refuses to convert thousands of digits, and no vocabulary has as many.
        if not key.isdecimal() or len(key) > 20 or int(key) >= vocab_size:
            raise invalid(path, f"has the key {key[:20]!r}, not an id from 0 to {vocab_size - 1}")
        found[int(key)] = inner.number(key, 0.0, -100.0, 100.0)
    return found


def _user(fields: Fields, otherwise: str) -> str:
    user = fields.take("user_id")
    if user is not None and not (isinstance(user, str) and _USER.fullmatch(user)):
        raise invalid(
            fields.path("user_id"), "must be 1 to 512 letters, digits, underscores or hyphens"
        )
    openais = fields.text("user", "", most=512)
    return user or openais or otherwise
