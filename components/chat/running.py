"""Which visitors have answers running, so that Stop reaches them and nobody starts two conversations at once."""

from __future__ import annotations

import threading

from fusion.errors import RecipeError


class Running:
    """Stop events by session; gr.State cannot hold them, since it hands every handler the value from before the event."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, session: str) -> threading.Event:
        """A fresh stop event; raises RecipeError while this visitor's models still answer."""
        with self._lock:
            self.check(session)
            return self._events.setdefault(session, threading.Event())

    def check(self, session: str) -> None:
        """Raise RecipeError while this visitor's models still answer."""
        if session in self._events:
            raise RecipeError("The models are still answering", todo="Wait for them, or press Stop.")

    def stop(self, session: str) -> None:
        """Ask this visitor's models to stop."""
        event = self._events.get(session)
        if event is not None:
            event.set()

    def end(self, session: str) -> None:
        """This visitor's models have ended."""
        with self._lock:
            self._events.pop(session, None)
