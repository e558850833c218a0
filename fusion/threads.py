"""How many threads read and compute at once. Every result has the same bytes whatever it is."""

from __future__ import annotations

import os

MOST = 8  # more wait for memory and for each other
_allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # of the machine's processors, ours
THREADS = max(2, min(MOST, len(_allowed(0))))  # two even on one processor: one computes while the other waits for a file
