"""What mergekit's merge methods take, as its users write it: the facts that reading, explaining and translating share.

Observed on mergekit 0.1.5. A parameter has a scope: "shared" (looked up without a model: slice, module and file level only),
"input" (one per listed model) or "target" (one per model that is not the base). Price: a newer mergekit may know more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64")
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")


@dataclass(frozen=True)
class Parameter:
    """One parameter: `kind` number, integer or flag; `default` None with `required` False means "left out"."""

    kind: str
    scope: str
    default: float | bool | None = None
    required: bool = False
    text: str = ""


@dataclass(frozen=True)
class Form:
    """How mergekit writes one method: its parameters, whether it wants a base model (required, optional, ignored), how many
    models it takes, the base included where one is required."""

    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: str = "ignored"
    least: int = 1
    most: int | None = None
    random: bool = False


_MASK = Parameter("flag", "shared", False, text="only saves memory while merging; the numbers stay the same")
_SHARE = Parameter("number", "input", required=True, text="how much this model counts")
_WEIGHT = Parameter("number", "target", required=True, text="how much this model's change counts")
_DENSITY = Parameter("number", "target", 1.0, text="share of this model's changes that is kept")
_T = Parameter("number", "shared", required=True)


def _task_vectors(normalize: bool = False, rescale: bool = False, random: bool = False, **more: Parameter) -> Form:
    return Form({
        "weight": _WEIGHT, "density": _DENSITY, **more,
        "normalize": Parameter("flag", "shared", normalize, text="divides by the sum of the weights that count"),
        "rescale": Parameter("flag", "shared", rescale, text="scales what is kept up to the size of the whole"),
        "lambda": Parameter("number", "shared", 1.0, text="factor on the merged change"),
        "int8_mask": _MASK}, "required", random=random)


_GAMMA = Parameter("number", "target", 0.01, text="share of the largest changes that is dropped")
_EPSILON = Parameter("number", "target", 0.15, text="how far the keep probability spreads around the density")

FORMS: dict[str, Form] = {
    "linear": Form({"weight": _SHARE,
                    "normalize": Parameter("flag", "shared", True, text="divides by the sum of the weights")}),
    "slerp": Form({"t": Parameter("number", "shared", required=True, text="0 = the base model, 1 = the other one")},
                  "required", 2, 2),
    "nuslerp": Form({"weight": _WEIGHT,
                     "nuslerp_flatten": Parameter("flag", "shared", True, text="one angle for the whole tensor"),
                     "nuslerp_row_wise": Parameter("flag", "shared", False, text="an angle for every column vector")},
                    "optional", 2, 3),
    "multislerp": Form({"weight": _WEIGHT,
                        "normalize_weights": Parameter("flag", "shared", True, text="divides by the sum of the weights"),
                        "eps": Parameter("number", "shared", 1e-8, text="guards divisions")}, "optional"),
    "karcher": Form({"max_iter": Parameter("integer", "shared", 10, text="most steps of the iteration"),
                     "tol": Parameter("number", "shared", 1e-5, text="step size at which it stops")}),
    "task_arithmetic": _task_vectors(),
    "ties": _task_vectors(normalize=True),
    "dare_linear": _task_vectors(rescale=True, random=True),
    "dare_ties": _task_vectors(rescale=True, random=True),
    "della_linear": _task_vectors(rescale=True, random=True, epsilon=_EPSILON),
    "della": _task_vectors(normalize=True, rescale=True, random=True, epsilon=_EPSILON),
    "breadcrumbs": _task_vectors(gamma=_GAMMA),
    "breadcrumbs_ties": _task_vectors(gamma=_GAMMA),
    "sce": Form({"select_topk": Parameter("number", "shared", 1.0, text="share of positions, by variance, that is merged"),
                 "int8_mask": _MASK}, "required"),
    "model_stock": Form({"filter_wise": Parameter("flag", "shared", False, text="one ratio per row instead of per tensor")},
                        "required", 3),
    "nearswap": Form({"t": Parameter("number", "shared", required=True, text="differences up to this size are taken over")},
                     "required", 2, 2),
    "arcee_fusion": Form({}, "required", 2, 2),
    "passthrough": Form({"scale": Parameter("number", "input", text="factor on the copied tensor")}, most=1),
}
OTHERS = {"ram": ("epsilon",), "ramplus_tl": ("r", "alpha", "epsilon")}  # mergekit's methods that have no counterpart here


def as_kind(value: object, kind: str) -> float | int | bool | None:
    """A YAML scalar as a number, integer or flag, as leniently as mergekit takes it (`1e-4` is text to YAML); None = it is none."""
    if kind == "flag":
        words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
        return value if isinstance(value, bool) else words.get(str(value).strip().lower())
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    if not -1e30 < number < 1e30:
        return None
    if kind == "integer":
        return int(number) if number == int(number) else None
    return number
