"""Loaded models under one memory budget, shared by all threads: loaded once, lent out, and forgotten oldest first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fusion.chat.model import ChatModel
from fusion.errors import ResourceError

Loader = Callable[[], ChatModel]


@dataclass(eq=False)
class _Slot:
    """Memory held for one model: reserved while it loads (`model` is None), then taken."""

    nbytes: int
    model: ChatModel | None = None
    users: int = 0


class ModelPool:
    """Keeps models in memory up to `budget_bytes`; none in use is ever evicted, of the others the least recent goes."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # least recently used first
        self._leaving: list[_Slot] = []  # dropped by key, still in somebody's hands
        self._changed = threading.Condition()

    @property
    def used_bytes(self) -> int:
        """Bytes of all models that are held, being loaded, or still in use after a drop."""
        with self._changed:
            return self._used()

    def get(self, key: str, loader: Loader, nbytes: int = 0) -> ChatModel:
        """The model of this key, loaded if it is not here; see `lease` for the arguments and errors."""
        with self.lease(key, loader, nbytes) as model:
            return model

    @contextmanager
    def lease(self, key: str, loader: Loader, nbytes: int = 0) -> Iterator[ChatModel]:
        """Lend the model of this key: it stays in memory until the `with` block ends.

        Threads that ask for one key at the same time share one load. With `nbytes`, the expected size, room is made
        before loading; without it, after. Raises ResourceError when there is no room, and what `loader` raises.
        """
        slot = self._take(key, loader, nbytes)
        try:
            yield slot.model
        finally:
            with self._changed:
                self._release(slot)

    def put(self, key: str, chat_model: ChatModel) -> None:
        """Hold this model under the key in place of the one before; raises ResourceError when it does not fit."""
        with self._changed:
            self._drop(key)
            self._make_room(chat_model.nbytes)
            self._slots[key] = _Slot(chat_model.nbytes, chat_model)
            self._changed.notify_all()

    def drop(self, key: str) -> None:
        """Forget this model; whoever uses it keeps it until the end of the lease."""
        with self._changed:
            self._drop(key)
            self._changed.notify_all()

    def _take(self, key: str, loader: Loader, nbytes: int) -> _Slot:
        with self._changed:
            while (slot := self._slots.get(key)) is not None and slot.model is None:
                self._changed.wait()  # another thread loads it
            if slot is not None:
                slot.users += 1
                self._slots.move_to_end(key)
                return slot
            self._make_room(nbytes)
            slot = self._slots[key] = _Slot(nbytes, users=1)
        try:
            model = loader()
        except BaseException:
            with self._changed:
                self._abandon(key, slot)
            raise
        with self._changed:
            try:
                self._make_room(model.nbytes - slot.nbytes)
            except ResourceError:
                self._abandon(key, slot)
                raise
            slot.model, slot.nbytes = model, model.nbytes
            self._changed.notify_all()
        return slot

    def _used(self) -> int:
        return sum(slot.nbytes for slot in (*self._slots.values(), *self._leaving))

    def _make_room(self, nbytes: int) -> None:
        """Evict idle models until `nbytes` more fit; nothing is evicted when even that would not be enough."""
        idle = [key for key, slot in self._slots.items() if slot.users == 0]
        busy = self._used() - sum(self._slots[key].nbytes for key in idle)
        if busy + nbytes > self.budget_bytes:
            raise ResourceError(
                f"The model needs {_gb(nbytes)} of memory; the budget is {_gb(self.budget_bytes)}"
                + (f", and {_gb(busy)} of it are in use" if busy else ""),
                todo="Wait until the running answers end, or use fewer columns." if busy
                else "Choose a smaller model, or start the app with a larger budget.")
        while idle and self._used() + nbytes > self.budget_bytes:
            del self._slots[idle.pop(0)]

    def _drop(self, key: str) -> None:
        slot = self._slots.pop(key, None)
        if slot is not None and slot.users:
            self._leaving.append(slot)

    def _release(self, slot: _Slot) -> None:
        slot.users -= 1
        if slot.users == 0 and slot in self._leaving:
            self._leaving.remove(slot)
        self._changed.notify_all()

    def _abandon(self, key: str, slot: _Slot) -> None:
        if self._slots.get(key) is slot:
            del self._slots[key]
        self._release(slot)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
