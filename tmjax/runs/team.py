"""Processes of a job that share a run directory."""

from typing import Any, Protocol


class Team(Protocol):
    """The processes of a job that share a run directory (see `sharding.hosts`)."""

    def is_first(self) -> bool:
        """Whether this is the process that writes and decides."""

    def barrier(self, name: str) -> None:
        """Waits for all processes."""

    def agree(self, value: Any) -> Any:
        """Returns the first process's value on every process."""


class Alone:
    """A team of one."""

    def is_first(self) -> bool:
        """Whether this is the first process: always."""
        return True

    def barrier(self, name: str) -> None:
        """Returns at once."""

    def agree(self, value: Any) -> Any:
        """Returns the value."""
        return value


ALONE = Alone()
