"""One lock around loading a model: transformers switches settings of the whole process (default dtype, weight initialisation)
while it works, so two models that are loaded at once spoil each other."""

from __future__ import annotations

import threading

LOADING = threading.Lock()
