"""The demo family's held-out prompts as questions for any model."""

from __future__ import annotations

from fusion.demo.dialogues import held_out_tasks
from fusion.demo.domains import DOMAINS
from fusion.evaluate.tasks import Question


def questions(prompts_per_domain: int = 200, seed: int = 0) -> list[Question]:
    """Checkable questions over the eight domains, the same as `demo check` asks."""
    return [Question(domain, task.prompt, task.check) for domain in DOMAINS
            for task in held_out_tasks(domain, prompts_per_domain, seed)]
