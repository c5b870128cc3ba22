"""The processes of a job that share a run directory."""

from typing import Any, Protocol


class Team(Protocol):
    """The processes of a job that share a run directory (see `sharding.hosts`)."""

    def is_first(self) -> bool:
        """Whether this is the process that writes and decides."""

    def barrier(self, name: str) -> None:
        """Waits for all processes."""

    def agree(self, value: Any) -> Any:
        """The first process's value, on every process."""


class Alone:
    """A team of one."""

    def is_first(self) -> bool:
        """Yes."""
        return True

    def barrier(self, name: str) -> None:
        """Nobody to wait for."""

    def agree(self, value: Any) -> Any:
        """The value."""
        return value


ALONE = Alone()
