"""FuseChat Studio's library: see how far chat models have moved from their pivot, and merge them by it.

    from fusion import Checkpoint, Recipe, finish, measure, merge
    pivot, targets = Checkpoint("pivot"), [Checkpoint("target-a"), Checkpoint("target-b")]
    finish(measure(pivot, targets)).ratios("matrix")
    finish(merge(Recipe("pivot", ("target-a", "target-b")), out="merged"))

Importing it needs neither torch nor transformers; only `chat`, `live` and `demo` load them, when they are used.
"""

from fusion.anatomy import GRANULARITIES, Place, place
from fusion.checkpoint import Checkpoint
from fusion.errors import (
    CheckpointError,
    FusionError,
    MismatchError,
    OutputError,
    RecipeError,
    ResourceError,
    Stopped,
)
from fusion.merge import MergeResult, merge
from fusion.methods import METHODS
from fusion.preflight import Preflight, preflight
from fusion.progress import Progress, finish
from fusion.recipe import Override, Recipe
from fusion.variation import MEASURES, Variation, measure
from fusion.version import VERSION
from fusion.weights import effective_weights

__all__ = [
    "GRANULARITIES", "MEASURES", "METHODS", "Checkpoint", "CheckpointError", "FusionError", "Inspection", "MergeResult",
    "MismatchError", "OutputError", "Override", "Place", "Preflight", "Preview", "Progress", "Recipe", "RecipeError",
    "ResourceError", "Stopped", "Variation", "effective_weights", "finish", "inspect", "measure", "merge", "place", "preflight",
    "preview",
]

__version__ = VERSION
_LATER = ("Inspection", "Preview", "inspect", "preview")  # opened when asked for: every command imports this file


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusion import inspection

    return getattr(inspection, name)
