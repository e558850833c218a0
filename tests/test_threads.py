"""fusion.threads: as many as the processors that this process may use, within bounds."""

import importlib
import os

import pytest

from fusion import threads


@pytest.mark.parametrize(("processors", "expected"), [(1, 2), (2, 2), (5, 5), (64, 8)])
def test_there_are_as_many_threads_as_processors_within_bounds(monkeypatch, processors, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 100)  # of the machine, not ours
    try:
        found = importlib.reload(threads).THREADS
        assert found == expected
        monkeypatch.delattr(os, "sched_getaffinity")
        found = importlib.reload(threads).THREADS
        assert found == 8
    finally:
        monkeypatch.undo()
        importlib.reload(threads)
