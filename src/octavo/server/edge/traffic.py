"""Traffic: counts the POST requests of clients that are running, so that batches can make way for them."""

from collections.abc import Callable

INTERNAL = "octavo.internal"  # key of an ASGI scope: the request was not made by a client


class Traffic:
    """The number of POST requests of clients. `on_change` is called after each change."""

    def __init__(self) -> None:
        self.count = 0
        self.on_change: Callable[[], None] = lambda: None

    def add(self, number: int) -> None:
        """Change the count by `number`."""
        self.count += number
        self.on_change()
