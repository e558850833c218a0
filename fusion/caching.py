"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FUSECHAT_CACHE, or `fusechat` in the person's cache folder."""
    own = os.environ.get("FUSECHAT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusechat"
