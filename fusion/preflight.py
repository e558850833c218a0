"""Can these be merged, and what will it cost? Answered from headers and configs alone, before any weight is read.

    report = preflight(pivot, targets)
    report.level            # "good", "warning" or "bad"
    report.raise_if_bad()   # the first thing that stands in the way, as an error
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion import dtypes
from fusion.checkpoint import Checkpoint
from fusion.compatibility import Finding, fits, mergeable_names, rowless
from fusion.errors import OutputError, RecipeError, ResourceError
from fusion.journal import reclaimable_bytes
from fusion.methods import METHODS
from fusion.methods.stack import BLOCK
from fusion.side_files import has_tokenizer, left_out
from fusion.tables import bytes_text
from fusion.threads import THREADS
from fusion.untied import side_by_side

LEVELS = ("good", "warning", "bad")
RUNTIME_BYTES = 60_000_000  # Python, numpy, and the machine code that is loaded when the work is worth it
_PACE_BYTES_PER_S = 0.8e9


@dataclass(frozen=True)
class Facts:
    """What headers and config say of one checkpoint; `nbytes` on disk, `vocabulary` tokens of the tokenizer."""

    name: str
    role: str
    architecture: str
    layers: int
    parameters: int
    tensors: int
    dtype: str
    nbytes: int
    vocab_size: int | None
    vocabulary: int | None
    tied: bool
    chat_template: bool


@dataclass(frozen=True)
class Preflight:
    """The verdict: facts of every model, findings, and the cost of merging in bytes (seconds are a rough guess)."""

    models: tuple[Facts, ...]
    findings: tuple[Finding, ...]
    tensors: int
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    free_disk_bytes: int
    seconds: float

    @property
    def level(self) -> str:
        """The worst level of all findings: "bad" means these cannot be merged."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="good")

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings in words, each with the model that it is about."""
        return tuple(f"{one.model}: {one.text}" if one.model else one.text for one in self.findings if one.level == "warning")

    def of(self, model: str) -> list[Finding]:
        """The findings about one model."""
        return [finding for finding in self.findings if finding.model == model]

    def raise_if_bad(self) -> Preflight:
        """Raise the first bad finding as the FusionError it is; return self when there is none."""
        for finding in self.findings:
            if finding.level == "bad":
                raise finding.kind(finding.text, where=finding.model or None)
        return self

    def to_dict(self) -> dict:
        """Plain data: what `--json` prints."""
        findings = [{k: v for k, v in vars(finding).items() if k != "kind"} for finding in self.findings]
        rest = {name: getattr(self, name) for name in ("tensors", "bytes_read", "bytes_written", "peak_memory_bytes",
                                                       "free_disk_bytes", "seconds")}
        return {"level": self.level, "mergeable": self.level != "bad", "models": [asdict(facts) for facts in self.models],
                "findings": findings, **rest}


def preflight(pivot: Checkpoint, targets: Sequence[Checkpoint], *, out: str | os.PathLike | None = None,
              dtype: str | None = None, method: str = "varm", in_memory: bool = False,
              donor: Checkpoint | None = None) -> Preflight:
    """Compare headers and configs of pivot and targets; never raises for what it finds, see `Preflight.raise_if_bad`.

    `out` is the folder to be written (its disk is checked), `dtype` the stored dtype (default: as the pivot), `method` the
    name of the merge method; `in_memory` says that the result is kept in memory; `donor` gives tokenizer, template and
    generation config (default: the pivot).
    """
    given = (pivot, *targets)
    pivot, targets = side_by_side(pivot, targets)
    names = mergeable_names(pivot)
    findings = list(_count(pivot, targets, METHODS[method].measured))
    for target in targets:
        findings += fits(pivot, target)
    findings += [*rowless(pivot), *_files(pivot, donor or pivot)]
    read = sum(model.info[name].nbytes for model in (pivot, *targets) for name in names if name in model.info)
    written = output_bytes(pivot, dtype)
    free = shutil.disk_usage(_existing(Path(out) if out else Path.cwd())).free + (reclaimable_bytes(out) if out else 0)
    memory = peak_memory_bytes(pivot, len(targets), method) + (written if in_memory else 0)
    findings += [*_output(out, written, free), *_memory(memory, available_memory_bytes())]
    return Preflight(tuple(facts(model, "pivot" if i == 0 else "target") for i, model in enumerate(given)),
                     tuple(findings), len(names), read, written, memory, free, (2 * read + written) / _PACE_BYTES_PER_S)


def facts(model: Checkpoint, role: str) -> Facts:
    """Collect what headers and config say of one checkpoint."""
    vocabulary = model.vocabulary
    return Facts(model.name, role, model.architecture, model.layers, model.parameters, len(model), dtypes.name(model.dtype),
                 model.nbytes, model.vocab_size, len(vocabulary) if vocabulary is not None else None, model.tied,
                 model.chat_template is not None)


def output_bytes(pivot: Checkpoint, dtype: str | None) -> int:
    """Bytes of the merged tensors when floats are stored as `dtype` (None: each as in the pivot)."""
    merged = set(mergeable_names(pivot))

    def size(name: str) -> int:
        tensor = pivot.info[name]
        code = dtypes.code(dtype) if dtype and name in merged else tensor.dtype
        return tensor.numel * dtypes.ITEM_BYTES[code]
    return sum(size(name) for name in pivot.info if name not in pivot.tied_copies)


def peak_memory_bytes(pivot: Checkpoint, targets: int, method: str = "varm") -> int:
    """An upper bound of the anonymous memory that merging takes by this method; it does not grow with the model.

    Every thread holds one block of every model and what a method computes from it: at most 4 more float32 blocks per target
    and 16 in all; a block has `BLOCK` elements, or one row where rows are longer. Beside that, of the largest tensor: digests
    take 16 bytes for every 4096 of a model, and methods that rescale what they drop by rank remember one bit a number.
    """
    row = max((tensor.shape[-1] for tensor in pivot.info.values() if tensor.shape), default=1)
    largest = max((tensor.numel for tensor in pivot.info.values()), default=1)
    blocks = (5 * targets + 16) * min(max(BLOCK, row), largest) * 4
    whole = (targets + 2) * largest // 64 + (targets * largest // 8 if "drop by rank" in METHODS[method].stages else 0)
    return RUNTIME_BYTES + THREADS * (blocks + whole)


def available_memory_bytes() -> int | None:
    """Memory that this process can still get without swapping, limits of its control group included; None where unknown."""
    known = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no number: then there is no limit
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        known.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + int(used["file"]))
    return max(0, min(known)) if known else None


def _count(pivot: Checkpoint, targets: Sequence[Checkpoint], measured: bool):
    if not targets:
        yield Finding("bad", "", "targets", "There is no target to merge. Give at least one.", kind=RecipeError)
    seen = {pivot.origin: pivot.name}
    names = {pivot.name}
    for target in targets:
        if target.origin == pivot.origin and not measured:
            yield Finding("warning", target.name, "duplicate", "The pivot is also a target: it counts as one of the models.")
        elif target.origin in seen:
            text = f"The same folder is given twice ({seen[target.origin]} and {target.name}). Leave one out."
            yield Finding("bad", target.name, "duplicate", text, kind=RecipeError)
        elif target.name in names:
            text = f"Two models are called {target.name}. Give one of them another name."
            yield Finding("bad", target.name, "duplicate", text, kind=RecipeError)
        seen[target.origin] = target.name
        names.add(target.name)


def _files(pivot: Checkpoint, donor: Checkpoint):
    """What the result will lack of the small files that belong to a model."""
    if not has_tokenizer(donor):
        yield Finding("warning", donor.name, "vocabulary", "It has no tokenizer files, so the result has none. Lay some into its "
                      "folder, or choose a donor that has a tokenizer.")
    for text in left_out(donor, pivot.config):
        yield Finding("warning", donor.name, "files", text)


def _output(out: str | os.PathLike | None, written: int, free: int):
    if out is not None and os.path.lexists(out):
        yield Finding("bad", "", "output", f"{out} exists already. Choose another folder; nothing is ever overwritten.",
                      kind=OutputError)
    if out is not None and written * 1.02 > free:
        text = f"The result needs {bytes_text(written)}, the disk of {out} has {bytes_text(free)} free."
        yield Finding("bad", "", "disk", f"{text} Free some space or choose another disk.", kind=ResourceError)


def _memory(needed: int, available: int | None):
    if available is not None and needed > available:
        yield Finding("bad", "", "memory", f"The work needs {bytes_text(needed)} of memory, {bytes_text(available)} are free. "
                      "Close other programs, or merge into a folder instead of memory.", kind=ResourceError)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not os.path.exists(path):
        path = path.parent
    return path
