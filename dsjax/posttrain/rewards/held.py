"""What rules have in common that hold a model or a connection, and so judge in this process.

They read answers and run nothing of them; there is nothing for a limited process to fence in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dsjax.posttrain.verify import Outcome

if TYPE_CHECKING:
    from jax.sharding import Mesh


class Held(Protocol):
    """A judge that is kept from one call to the next."""

    def grade(
        self, completions: Sequence[str], problems: Sequence[Mapping[str, Any]]
    ) -> list[Outcome]:
        """Judges each completion; what fails is told, not raised."""
        ...


class Holder(Protocol):
    """The module of such a rule."""

    def require(self, argument: str) -> None:
        """Checks what the argument names.

        Raises:
          ValueError: it is not there.
        """
        ...

    def hold(self, argument: str, mesh: Mesh | None) -> Held: ...

    def complaint(self, problem: Mapping[str, Any], argument: str) -> str | None: ...
