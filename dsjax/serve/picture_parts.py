"""Pictures in messages, as OpenAI's API has them: parts of the kind `image_url`.

A part holds the picture itself, as a `data:` URL. The server fetches nothing: an address in a
request would let anyone who asks reach what only the server can reach.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dsjax.infer.pictured import PICTURES, PicturedFormat
from dsjax.serve.errors import ApiError
from dsjax.serve.fields import Fields, invalid
from dsjax.text.chat import Message

MOST_PICTURES = 64  # in all messages of a request


class Sent(NamedTuple):
    """A picture as it came; a message's field PICTURES lists them until they are decoded."""

    data: bytes
    place: str  # its path in the body


def read_picture(fields: Fields) -> Sent:
    """Takes the picture of a part.

    Raises:
      ApiError: 422, it is not there or no `data:` URL in base64.
    """
    inner = Fields(fields.take("image_url"), fields.path("image_url"))
    inner.choice("detail", ["auto", "low", "high"], "auto")  # the tower has one size
    path, url = inner.path("url"), inner.text("url")
    inner.finish()
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise invalid(
            path, "must be the picture itself, data:image/png;base64,...; addresses are not fetched"
        )
    if not head.lower().endswith(";base64"):
        raise invalid(path, "must be in base64: data:image/png;base64,...")
    try:
        return Sent(base64.b64decode(body, validate=True), path)
    except ValueError as error:  # binascii.Error, or of characters that are not ASCII
        raise invalid(path, f"is not base64: {error}") from error


def decoded(messages: Sequence[Message], form: PicturedFormat) -> list[Message]:
    """Returns the messages with their pictures decoded; slow.

    Raises:
      ApiError: 422, one is no whole picture, or too large.
    """

    def picture(sent: Sent) -> object:
        try:
            return form.decode(sent.data, sent.place)
        except ValueError as error:
            raise ApiError(422, str(error), param=sent.place) from error

    return [
        dataclasses.replace(
            message, fields={**message.fields, PICTURES: [picture(each) for each in sent]}
        )
        if (sent := message.fields.get(PICTURES))
        else message
        for message in messages
    ]
