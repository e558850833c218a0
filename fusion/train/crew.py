"""The processes of `accelerate launch`: who is first, and waiting for each other for as long as the first one works alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

# Reading, aligning and fusing 100,000 dialogues takes the first process about an hour; the default limit is 10 minutes.
PATIENCE = timedelta(hours=24)
_PIECES = "FSDP_CPU_RAM_EFFICIENT_LOADING"


class Crew:
    """The processes of `accelerate launch`, or the only one."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._state = None
        if self.count > 1:
            import torch
            from accelerate import InitProcessGroupKwargs, PartialState

            patience = InitProcessGroupKwargs(timeout=PATIENCE).to_kwargs()
            self._state = PartialState(cpu=not torch.cuda.is_available(), **patience)

    @property
    def first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()


@contextmanager
def as_one() -> Iterator[None]:
    """Load models whole in this process, also under an FSDP or DeepSpeed launch.

    There transformers gives weights to the first process alone, or cuts them up, as is right for the one model that is trained.
    """
    deepspeed, before = sys.modules.get("transformers.integrations.deepspeed"), os.environ.get(_PIECES)
    config = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    os.environ[_PIECES] = "false"
    if config is not None:
        deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        if config is not None:
            deepspeed._hf_deepspeed_config_weak_ref = config
        if before is None:
            del os.environ[_PIECES]
        else:
            os.environ[_PIECES] = before
