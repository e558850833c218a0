"""Make mergekit.json: small inputs and what mergekit's own functions make of them. Run it where mergekit is installed.

    python tests/golden/make_mergekit.py > tests/golden/mergekit.json

`parity`: our result must equal mergekit's. `wrong`: mergekit's result (or error) in the cases where ours must differ.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import numpy as np
import torch
from mergekit.merge_methods.api import merge_tensors

DECIMALS = 5


def numbers(seed: int, shape: tuple[int, ...], spread: float = 0.3, agreed: float = 0.0) -> dict:
    """A pivot and three targets around it, in decimals that JSON keeps; `agreed` is the size of a change they share."""
    random = np.random.default_rng(seed)
    pivot, shared = random.normal(size=shape).round(DECIMALS), random.normal(size=shape) * agreed
    models = [(pivot + shared + random.normal(size=shape) * spread * (j + 1)).round(DECIMALS + 3) for j in range(3)]
    return {"pivot": pivot.tolist(), "models": [model.tolist() for model in models]}


INPUTS = {
    "matrix": numbers(1, (6, 8)), "wide": numbers(2, (3, 40)), "vector": numbers(3, (11,)), "column": numbers(4, (7, 1)),
    "one": numbers(5, (1,)), "cube": numbers(6, (2, 3, 4)),
    "fine": numbers(7, (6, 8), 2e-4),  # changes as small as a fine-tune's
    "agreed": numbers(8, (6, 8), 0.1, 0.5), "agreed cube": numbers(10, (2, 3, 4), 0.05, 1),
    "agreed column": numbers(9, (7, 1), 0.05, 1),
    "opposed": {"pivot": [[0, 0], [0, 0]], "models": [[[1, 0], [0, 0]], [[-1, 0.1], [0, 0]]]},
    "opposite": {"pivot": [0, 0, 0], "models": [[1, 2, 2], [-2, -4, -4]]},
    "turned": {"pivot": [0, 0, 0], "models": [[1, 2, 2], [-2, -4, -4.02]]},
    "cancelling": {"pivot": [0, 0], "models": [[1, 0], [-0.5, 0.75 ** 0.5], [-0.5, -(0.75 ** 0.5)]]},
    "tiny": {"pivot": [0, 0, 0, 0], "models": [[1e-4, 2e-4, 0, 0], [2e-4, 1e-4, 0, 0]]},
    "near": {"pivot": [0, 0], "models": [[5e-8, 2e-7]]},
    "few": {"pivot": [0, 0, 0], "models": [[1, 2, 3], [1, 4, 3]]},
}
SHAPES = ("matrix", "wide", "vector", "column", "one", "cube")
ANY = {"weight": [0.5, 1.25, 2.0]}
TASK = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs", "breadcrumbs_ties")


def case(method: str, its: str, count: int, weights=None, base: bool = True, ours: dict | None = None, **theirs) -> dict:
    """One case: `ours` and `theirs` are the options of the two, `theirs` also mergekit's weights."""
    parameters = dict(theirs)
    if weights is not None:
        parameters["weight"] = weights
    models = [torch.tensor(value, dtype=torch.float32) for value in INPUTS[its]["models"][:count]]
    tensors = [torch.tensor(INPUTS[its]["pivot"], dtype=torch.float32), *models] if base else models
    kept = {"method": method, "input": its, "count": count, "weights": weights, "options": theirs if ours is None else ours}
    try:
        torch.manual_seed(0)
        merged = merge_tensors(tensors, method, parameters=parameters, base_index=0 if base else None)
    except Exception as error:
        return {**kept, "error": f"{type(error).__name__}: {error}"[:120]}
    kept["merged"] = [float(np.format_float_scientific(value, 9)) for value in merged.reshape(-1).numpy()] \
        if torch.isfinite(merged).all() else "not finite"
    return kept


def parity() -> list[dict]:
    """Every method on every shape, then its options."""
    made = []
    for its in SHAPES:
        three = [0.5, 1.25, 2.0]
        made += [case("linear", its, 3, three, False), case("passthrough", its, 1, base=False, ours={}),
                 case("slerp", its, 1, t=0.3), case("nuslerp", its, 2, [0.7, 0.9], False, {}),
                 case("multislerp", its, 3, three, False, {}), case("karcher", its, 3, base=False),
                 case("nearswap", its, 1, t=0.2), case("arcee_fusion", its, 1), case("sce", its, 3, ours={"compat": "mergekit"})]
        made += [case(method, its, 3, three) for method in TASK]
    made += options()
    return [its for its in made if its.get("merged") != "not finite"]


def options() -> list[dict]:
    """Options away from their defaults."""
    three, signed = [0.5, 1.25, 2.0], [1.0, -0.5, 0.25]
    made = [case("linear", "matrix", 3, signed, False, normalize=False),
            case("passthrough", "matrix", 1, base=False, scale=[0.4], ours={"scale": 0.4}),
            case("multislerp", "matrix", 3, three, False, normalize_weights=False),
            case("multislerp", "matrix", 3, three, True, {"space": "deltas"}),
            case("karcher", "wide", 3, base=False, max_iter=2)]
    made += [case("slerp", "matrix", 1, t=t) for t in (0.0, 0.5, 1.0)]
    for its in ("matrix", "cube", "vector", "column"):
        for base, space in ((False, "weights"), (True, "deltas")):
            for row_wise in (False, True):
                made.append(case("nuslerp", its, 2, [1.0, 3.0], base, {"flatten": False, "row_wise": row_wise, "space": space},
                                 nuslerp_flatten=False, nuslerp_row_wise=row_wise))
    made.append(case("nuslerp", "matrix", 2, [1.0, 3.0], True, {"space": "deltas"}))
    made += [case("model_stock", its, count, filter_wise=filter_wise) for its in ("agreed", "agreed cube")
             for count in (2, 3) for filter_wise in (False, True)] + [case("model_stock", "agreed column", 3)]
    made += [case("sce", its, 3, ours={"select_topk": topk, "compat": "mergekit"}, select_topk=topk)
             for its in ("matrix", "wide", "cube") for topk in (0.1, 0.5, 0.9)]
    for density in (0.05, 0.5, 0.83):
        made += [case(method, "wide", 3, three, density=density) for method in ("ties", "breadcrumbs", "breadcrumbs_ties")]
    for method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        made += [case(method, "matrix", 3, signed, density=[0.3, 0.6, 1.0], normalize=normalize, rescale=rescale, **{"lambda": 0.7})
                 for normalize in (False, True) for rescale in (False, True)]
    made += [case("breadcrumbs", "wide", 3, three, density=density, gamma=gamma)
             for density, gamma in ((0.5, 0.2), (0.9, 0.3), (0.5, 0.0), (0.5, [0.0, 0.1, 0.2]))]
    made += [case(method, "matrix", 3, signed, normalize=True, **{"lambda": 1.5}) for method in TASK]
    return made


def wrong() -> dict[str, dict]:
    """The cases where ours must not equal mergekit's."""
    equal = [1.0, 1.0, 1.0]
    return {
        "sce of small changes": case("sce", "fine", 3),
        "sce of conflicting signs": case("sce", "matrix", 3),
        "sce that selects less than one number": case("sce", "few", 2, select_topk=0.3),
        "breadcrumbs that keep less than one number": case("breadcrumbs", "few", 1, equal[:1], density=0.3),
        "della of one column": case("della", "column", 2, equal[:2], density=0.5),
        "nuslerp of nearly opposite vectors": case("nuslerp", "turned", 2, equal[:2], False, {}),
        "karcher of opposite vectors": case("karcher", "opposite", 2, base=False, ours={}),
        "multislerp of vectors that cancel": case("multislerp", "cancelling", 3, equal, False, {}),
        "model stock of opposed changes": case("model_stock", "opposed", 2),
        "model stock of small changes": case("model_stock", "tiny", 2),
        "nearswap nearer than 1e-6": case("nearswap", "near", 1, t=1e-7),
        "linear of weights that sum to 0": case("linear", "few", 2, [1.0, -1.0], False),
        "task arithmetic of weights that sum to less than 1e-8": case("task_arithmetic", "few", 2, [1e-9, 3e-9], normalize=True),
    }


if __name__ == "__main__":
    json.dump({"mergekit": version("mergekit"), "torch": version("torch"), "inputs": INPUTS, "parity": parity(), "wrong": wrong()},
              sys.stdout, separators=(",", ":"))
    print()
