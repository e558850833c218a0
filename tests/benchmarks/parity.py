"""Run mergekit itself and this engine on the same files and compare the merged weights, tensor by tensor.

    python tests/benchmarks/parity.py [--mergekit PATH/mergekit-yaml] [--only NAME]

Makes a tiny Llama with four layers and three fine-tunes of it, runs every file of FILES with `mergekit-yaml`, imports the same
file here and merges; exports every recipe of EXPORTS and has mergekit run it. Prints the largest difference, absolute and in
float32 steps of the tensor's largest weight.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from fusion import Recipe, finish, merge
from fusion.commands.mergekit import export
from fusion.errors import FusionError
from fusion.mergekit import import_text, tensor_names
from fusion.settings import Curve, Override, Slice, Table

STEPS, SHARE = 64, 1e-3  # a weight may be this far off; this share may be farther, where a threshold falls between two roundings
MODELS = ("pivot", "target-a", "target-b", "target-c")
TWO = """base_model: pivot
models:
- {model: target-a, parameters: {weight: 0.3%s}}
- {model: target-b, parameters: {weight: 0.9%s}}
"""
FILES = {
    "linear": "merge_method: linear\nmodels:\n- {model: pivot, parameters: {weight: 0.2}}\n- {model: target-a, parameters: "
              "{weight: 1}}\n- {model: target-b, parameters: {weight: 2}}\nbase_model: pivot\n",
    "linear-plain-sum": "merge_method: linear\n" + TWO % ("", "") + "parameters: {normalize: false, weight: 0}\n",
    "linear-filters": """merge_method: linear
base_model: pivot
models:
- model: target-a
  parameters:
    weight:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - {filter: layers.1., value: 0.25}
    - {filter: mlp.down, value: [1, 0.2]}
    - {filter: norm, value: [0.9, 0.1]}
    - {value: 0.5}
- {model: target-b, parameters: {weight: 0.75}}
- {model: pivot, parameters: {weight: [0.1, 0.4]}}
""",
    "slerp": """merge_method: slerp
base_model: pivot
slices:
- sources:
  - {model: pivot, layer_range: [0, 4]}
  - {model: target-a, layer_range: [0, 4]}
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - {value: 0.5}
""",
    "slerp-far": "merge_method: slerp\nbase_model: pivot\nmodels: [{model: stranger}, {model: pivot}]\n"
                 "parameters: {t: [0.2, 0.9]}\n",
    "nuslerp": "merge_method: nuslerp\nmodels: [{model: target-a, parameters: {weight: 0.3}}, {model: stranger, parameters: "
               "{weight: 0.5}}]\n",
    "nuslerp-rows": "merge_method: nuslerp\n" + TWO % ("", "") + "parameters: {nuslerp_flatten: false}\n",
    "nuslerp-columns": "merge_method: nuslerp\n" + TWO % ("", "")
                       + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
    "multislerp": "merge_method: multislerp\nmodels: [{model: target-a, parameters: {weight: 0.3}}, {model: stranger, parameters: "
                  "{weight: 0.5}}, {model: target-c, parameters: {weight: 0.7}}]\n",
    "multislerp-deltas": "merge_method: multislerp\n" + TWO % ("", "") + "parameters: {normalize_weights: false}\n",
    "karcher": "merge_method: karcher\nmodels: [{model: target-a}, {model: stranger}, {model: target-c}]\n"
               "parameters: {max_iter: 20, tol: 1e-6}\n",
    "karcher-base": "merge_method: karcher\nmodels: [{model: target-a}, {model: stranger}]\nbase_model: pivot\n",
    "task_arithmetic": "merge_method: task_arithmetic\n" + TWO % ("", "") + "parameters: {lambda: 0.8, normalize: true}\n",
    "ties": "merge_method: ties\n" + TWO % (", density: 0.4", ", density: [0.2, 0.8]")
            + "parameters: {lambda: [1, 0.5], int8_mask: true}\n",
    "ties-rescaled": "merge_method: ties\n" + TWO % (", density: 0.4", "")
                     + "parameters: {normalize: false, rescale: true, density: 0.6}\n",
    "dare_linear": "merge_method: dare_linear\n" + TWO % ("", "") + "parameters: {normalize: true}\n",
    "dare_ties": "merge_method: dare_ties\n" + TWO % ("", ""),
    "della": "merge_method: della\n" + TWO % (", density: 1", ", density: 1.0, epsilon: 0.1"),
    "della_linear": "merge_method: della_linear\n" + TWO % ("", "") + "parameters: {lambda: 1.5}\n",
    "breadcrumbs": "merge_method: breadcrumbs\n" + TWO % (", density: 0.7, gamma: 0.05", ", density: 0.9, gamma: 0.01"),
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties\n" + TWO % (", density: 0.5, gamma: 0.1", ", density: 0.6")
                        + "parameters: {normalize: true}\n",
    "sce": "merge_method: sce\nmodels: [{model: target-a}, {model: target-b}, {model: target-c}]\nbase_model: pivot\n"
           "parameters: {select_topk: 0.3}\n",
    "sce-all": "merge_method: sce\nmodels: [{model: target-a}, {model: target-b}]\nbase_model: pivot\n",
    "model_stock": "merge_method: model_stock\nmodels: [{model: target-a}, {model: target-b}, {model: target-c}]\n"
                   "base_model: pivot\n",
    "model_stock-rows": "merge_method: model_stock\nmodels: [{model: target-a}, {model: target-b}]\nbase_model: pivot\n"
                        "parameters: {filter_wise: true}\n",
    "nearswap": "merge_method: nearswap\nmodels: [{model: target-a}]\nbase_model: pivot\nparameters: {t: 0.01}\n",
    "arcee_fusion": "merge_method: arcee_fusion\nmodels: [{model: target-a}]\nbase_model: pivot\n",
    "passthrough": """merge_method: passthrough
slices:
- sources: [{model: pivot, layer_range: [0, 3]}]
- sources:
  - model: target-a
    layer_range: [1, 3]
    parameters:
      scale:
      - {filter: o_proj, value: 0.5}
      - {filter: layers.2.mlp, value: [0.1, 0.9]}
      - {value: 1}
- sources: [{model: target-b, layer_range: [2, 4], parameters: {scale: [0.8, 1.2]}}]
""",
    "slices": """merge_method: linear
slices:
- sources:
  - {model: target-a, layer_range: [0, 2], parameters: {weight: 1}}
  - {model: target-b, layer_range: [1, 3], parameters: {weight: [0.2, 0.6]}}
- sources:
  - {model: target-a, layer_range: [3, 4], parameters: {weight: [0.2, 0.6]}}
  - {model: target-b, layer_range: [1, 2]}
  parameters:
    weight: [{filter: mlp, value: 0.3}, {filter: layers.1.self, value: 0.4}, {value: 0.7}]
parameters: {weight: 0.5}
""",
    "slices-ties": """merge_method: ties
base_model: pivot
slices:
- sources:
  - {model: pivot, layer_range: [0, 2]}
  - {model: target-a, layer_range: [0, 2], parameters: {weight: [1, 0.5]}}
  - {model: target-b, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.5}}
- sources:
  - {model: pivot, layer_range: [1, 4]}
  - {model: target-a, layer_range: [1, 4], parameters: {weight: 0.25}}
  - {model: target-b, layer_range: [1, 4], parameters: {weight: [0, 1]}}
  parameters: {lambda: 0.9}
""",
    "single-layer": "merge_method: slerp\nbase_model: pivot\nslices:\n- sources: [{model: pivot, layer_range: [0, 1]}, {model: "
                    "target-a, layer_range: [0, 1]}]\nparameters: {t: [0.2, 0.9]}\n",
}


EXPORTS = {  # recipes that are exported, run by mergekit, and compared with our own merge of them
    "varm": {},
    "varm-layer": {"granularity": "layer", "measure": "absolute"},
    "varm-edited": {"exclude": ("*norm*",), "overrides": (Override("model.layers.1.*", {"target-a": 0.7}),)},
    "linear-curve": {"method": "linear", "weights": (Curve((0.0, 1.0)), 0.5)},
    "linear-import": {"method": "linear", "weights": (Table((("*", 0.5), ("*self_attn*", Curve((0.2, 0.9, 0.4), 0.2)))), 0.5),
                      "options": {"normalize": False}},
    "ties": {"method": "ties", "weights": (0.3, Curve((0.2, 0.6), 0.2)),
             "options": {"density": (0.5, Table((("*", 0.9), ("*.mlp.*", 0.3)))), "lambda": 0.8}},
    "slerp": {"method": "slerp", "options": {"t": Table((("*", 0.3), ("*mlp*", Curve((0.0, 1.0), 0.0))))}, "targets": 1},
    "slerp-two": {"method": "slerp", "options": {"t": 0.25}},
    "nuslerp": {"method": "nuslerp", "weights": (1.0, 3.0), "options": {"space": "deltas", "flatten": False}},
    "sce": {"method": "sce", "options": {"compat": "mergekit", "select_topk": 0.4}},
    "passthrough": {"method": "passthrough", "slices": (Slice({"target-a": (0, 3)}), Slice({"target-b": (1, 4)})),
                    "options": {"scale": (1.0, Table((("*", 1.0), ("*.o_proj.*", 0.5))))}},
    "slices": {"method": "linear", "slices": (Slice({"target-a": (0, 2), "target-b": (1, 3)}),
                                              Slice({"target-a": (2, 4), "target-b": (2, 4)})),
               "weights": (Curve((0.1, 0.9)), 0.5)},
}


def exported(name: str, folder: Path) -> Recipe:
    """The recipe of EXPORTS on the made models."""
    changes = dict(EXPORTS[name])
    targets = MODELS[1:1 + changes.pop("targets", 2)]
    return Recipe(str(folder / "pivot"), tuple(str(folder / target) for target in targets), **changes)


def make_models(folder: Path) -> None:
    """Save the pivot, three fine-tunes of it, whose changes agree in part as fine-tunes' do, and a stranger of the same shape."""
    from tests.conftest import save_checkpoint

    layer = {"input_layernorm": (8,), "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
             "self_attn.o_proj": (8, 8), "post_attention_layernorm": (8,), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8),
             "mlp.down_proj": (8, 12)}
    shapes = {"model.embed_tokens.weight": (16, 8),
              **{f"model.layers.{n}.{name}.weight": shape for n in range(4) for name, shape in layer.items()},
              "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    config = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2}

    def draw(seed: int, size: float) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {name: random.uniform(-size, size, shape).astype(np.float32) for name, shape in shapes.items()}

    pivot, common = draw(0, 0.3), draw(1, 0.1)
    save_checkpoint(folder / "pivot", pivot, config=config)
    save_checkpoint(folder / "stranger", draw(9, 0.3), config=config)
    for number, name in enumerate(MODELS[1:], 1):
        own = draw(number + 1, 0.03 * number)
        save_checkpoint(folder / name, {key: pivot[key] + common[key] + own[key] for key in shapes}, config=config)


def resolved(text: str, folder: Path) -> str:
    """The file with the models' names replaced by their folders."""
    for name in (*MODELS, "stranger"):
        text = text.replace(f"model: {name}", f"model: {folder / name}")
    return text + "dtype: float32\n" * ("dtype:" not in text)


def run_mergekit(program: str, text: str, out: Path) -> None:
    """Merge with mergekit itself; RuntimeError with its last words when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(text)
    done = subprocess.run([program, str(file), str(out), "--random-seed", "1"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:300])


def compare(ours: Path, theirs: Path) -> tuple[float, float, float, str]:
    """Largest absolute difference, the same in float32 steps of the tensor's largest weight, the share of weights that differ
    by more than 64 steps, and the tensor where the difference is largest."""
    from tests.conftest import load_tensors

    mine, its = load_tensors(ours), load_tensors(theirs)
    if mine.keys() != its.keys():
        return np.inf, np.inf, 1.0, f"other tensors: {sorted(mine.keys() ^ its.keys())[:4]}"
    worst, far, count = (0.0, 0.0, ""), 0, 0
    for name, value in mine.items():
        if value.shape != its[name].shape or value.dtype != its[name].dtype:
            return np.inf, np.inf, 1.0, f"{name}: {value.shape} {value.dtype}, {its[name].shape} {its[name].dtype}"
        differences = (value.double() - its[name].double()).abs()
        step = float(np.spacing(np.float32(its[name].abs().max())))
        far, count = far + int((differences > STEPS * step).sum()), count + value.numel()
        worst = max(worst, (float(differences.max()), float(differences.max()) / step, name))
    return worst[0], worst[1], far / count, worst[2]


def signature(folder: Path) -> list[list[float]]:
    """Two sums over every tensor of a checkpoint, by name, which tell any change of its numbers or their order."""
    from tests.conftest import load_tensors

    def sums(values: np.ndarray) -> list[float]:
        return [round(float(values.sum()), 6), round(float(values @ np.cos(np.arange(values.size))), 6)]
    return [sums(value.numpy().astype(np.float64).reshape(-1)) for _, value in sorted(load_tensors(folder).items())]


def main() -> int:
    """Print the table; 1 when a file gives other weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"))
    parser.add_argument("--only", action="append")
    parser.add_argument("--record", type=Path, help="write what mergekit gave here, as tests/golden/mergekit_files.json has it")
    options = parser.parse_args()
    if not options.mergekit:
        parser.error("mergekit-yaml is not installed; say where it is with --mergekit")
    bad, golden = 0, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder)
        for name in [*FILES, *(f"export {name}" for name in EXPORTS)]:
            if options.only and name not in options.only:
                continue
            ours, theirs = folder / "ours" / name, folder / "theirs" / name
            try:
                if name in FILES:
                    text = resolved(FILES[name], folder)
                    (recipe,), _ = import_text(text, opener=tensor_names)
                else:
                    recipe = exported(name.removeprefix("export "), folder)
                    text = export(recipe)
                run_mergekit(options.mergekit, text, theirs)
                finish(merge(recipe, ours))
                golden[name] = signature(theirs)
                difference, steps, share, where = compare(ours, theirs)
                bad += share > SHARE
                print(f"{name:22} {difference:9.2e}  {steps:9.1f} steps  {share:8.1e} beyond {STEPS}  {where}", flush=True)
            except (RuntimeError, FusionError) as error:
                bad += 1
                print(f"{name:22} {type(error).__name__}: {error}", flush=True)
    if options.record:
        lines = [f"{json.dumps(name)}: {json.dumps(sums, separators=(',', ':'))}" for name, sums in golden.items()]
        options.record.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
