"""The loops over stored numbers on an accelerator, in torch; whatever is not here is done by the processor's loops.

    compiled.prepare(nbytes, "cuda")        # from here on `compiled.loops()` are these

Each operation is one of its own, as in `twins`, so nothing is fused and elements come out with the same bits; sums are added
in another order, so they may differ in the last bits of float64. Price: every byte goes to the device, the result comes back,
so large blocks; digests stay on the processor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from fusion import dtypes
from fusion.errors import ResourceError

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_MAGNITUDE = 0x7FFFFFFF


def pick(wish: str) -> str:
    """The device of a wish: "auto" is a GPU where there is one, else "cpu"; ResourceError for what torch does not find."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, dtype=torch.float64, device=wish)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ResourceError(f"there is no device {wish!r} with float64", where="device",
                            todo="Use auto or cpu, or install a torch that fits this machine's GPU.") from error
    return wish


class DeviceLoops:
    """The loops on `device`; those that `others` gives do what only the processor can, digests above all."""

    def __init__(self, device: str, others: Callable[[], ModuleType]):
        self.device, self._others = torch.device(device), others

    def __getattr__(self, name: str):
        return getattr(self._others(), name)

    def all_finite(self, row: np.ndarray, code: int, n: int) -> bool:
        """See `twins.all_finite`."""
        return bool(torch.isfinite(self._read(row, code, n)).all())

    def sum_changes(self, rows: np.ndarray, codes: np.ndarray, n: int, sums: np.ndarray) -> None:
        """See `twins.sum_changes`."""
        pivot, found = self._read(rows[0], codes[0], n), []
        wide = pivot.double()
        for row, code in zip(rows[1:], codes[1:], strict=True):
            moved = self._read(row, code, n)
            delta = moved.double() - wide
            found.append(torch.stack([delta.square().sum(), delta.abs().sum(), (moved != pivot).sum().double()]))
        nothing = torch.zeros_like(found[0][0])
        found.append(torch.stack([wide.square().sum(), nothing, nothing]))
        sums[:] = torch.stack(found).cpu().numpy()

    def weigh(self, rows: np.ndarray, codes: np.ndarray, n: int, weights: np.ndarray, code: int, out: np.ndarray) -> bool:
        """See `twins.weigh`."""
        base = int(np.argmax(weights))
        heaviest = self._read(rows[base], codes[base], n)
        shift = torch.zeros_like(heaviest)
        for j, weight in enumerate(weights):
            if j != base and weight:
                shift += (self._read(rows[j], codes[j], n) - heaviest) * float(np.float32(weight))
        stored = (heaviest + shift).to(_TYPES[dtypes.FLOATS[code]])
        out[:stored.nbytes] = stored.view(torch.uint8).cpu().numpy()
        return bool(torch.isfinite(stored).all())

    def squares(self, rows: np.ndarray, codes: np.ndarray, n: int, out: np.ndarray) -> None:
        """See `twins.squares`."""
        out += self._changes(rows, codes, n)[1].double().square().sum(dim=1).cpu().numpy()

    def sizes(self, rows: np.ndarray, codes: np.ndarray, n: int, drops: np.ndarray, out: np.ndarray) -> None:
        """See `twins.sizes`."""
        size = self._changes(rows, codes, n)[1].abs_()
        whole = size.double().sum(dim=1)
        for its, drop in zip(size, drops, strict=True):
            self._drop(its, drop)
        out += torch.stack([whole, size.double().sum(dim=1)], dim=1).cpu().numpy()

    def count_changes(self, rows: np.ndarray, codes: np.ndarray, n: int, targets: np.ndarray, uppers: np.ndarray,
                      out: np.ndarray) -> None:
        """See `twins.count_changes`."""
        pivot = self._read(rows[0], codes[0], n)
        for j, upper, its in zip(targets, uppers, out, strict=True):
            bits = (self._read(rows[j + 1], codes[j + 1], n) - pivot).view(torch.int32) & _MAGNITUDE
            high = bits >> 16
            chosen = high if upper < 0 else bits[high == int(upper)] & 0xFFFF
            its += torch.bincount(chosen, minlength=len(its)).cpu().numpy()

    def elect(self, rows: np.ndarray, codes: np.ndarray, n: int, drops: np.ndarray, factors: np.ndarray, vote_first: bool,
              table: np.ndarray, scale: float, out: np.ndarray) -> None:
        """See `twins.elect`."""
        pivot, deltas = self._changes(rows, codes, n)
        for its, drop in zip(deltas, drops, strict=True):
            self._drop(its, drop)
        sign = _majority(deltas) if vote_first else None
        deltas *= torch.from_numpy(factors).to(self.device)[:, None]
        total = self._add_agreeing(deltas, _majority(deltas) if sign is None else sign, table)
        if scale != 1:
            total *= float(np.float32(scale))
        out[:n] = (total + pivot).cpu().numpy()

    def _add_agreeing(self, deltas: torch.Tensor, sign: torch.Tensor, table: np.ndarray) -> torch.Tensor:
        agreeing = (deltas.view(torch.int32) ^ sign).view(torch.float32)
        total = agreeing[0].clamp_min(0) + 0.0  # so that there is but one zero
        for its in agreeing[1:]:
            total += its.clamp_min(0)
        if len(table):
            which = sum((its > 0).long() << j for j, its in enumerate(agreeing))
            total /= torch.from_numpy(table).to(self.device)[which]
        return (total.view(torch.int32) ^ sign).view(torch.float32)

    def _drop(self, values: torch.Tensor, drop: np.ndarray) -> None:
        """Multiply those of `values` [n] by 0 that `drop` [5] says; see `twins._dropped`."""
        if drop[0] == 1:
            bits = values.view(torch.int32) & _MAGNITUDE
            values *= _above(bits, drop[1:3]) & ~_above(bits, drop[3:5])
        elif drop[0] == 2:
            self._others().draw(int(drop[1]), int(drop[2]), drawn := np.empty(len(values), np.uint32))
            values *= torch.from_numpy(drawn < np.uint32(drop[3])).to(self.device)

    def _changes(self, rows: np.ndarray, codes: np.ndarray, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pivot [n] and the changes from it [J, n], float32."""
        pivot = self._read(rows[0], codes[0], n)
        return pivot, torch.stack([self._read(row, code, n) - pivot for row, code in zip(rows[1:], codes[1:], strict=True)])

    def _read(self, row: np.ndarray, code: int, n: int) -> torch.Tensor:
        """`n` stored numbers as float32 on the device; never the memory of `row`."""
        its = dtypes.FLOATS[code]
        there = torch.from_numpy(row[:n * dtypes.ITEM_BYTES[its]]).to(self.device, copy=True)
        return there.view(_TYPES[its]).float()


def _majority(deltas: torch.Tensor) -> torch.Tensor:
    """The sign bits [n] int32 of the sum of `deltas` [J, n] in the order of the targets; 0 counts as +."""
    total = deltas[0].clone()
    for its in deltas[1:]:
        total += its
    return (total < 0).int() << 31


def _above(bits: torch.Tensor, cut: np.ndarray) -> torch.Tensor:
    """Which magnitudes are above `cut` (bits, how many more with just these bits); what is left of these is counted down."""
    inside = bits > int(cut[0])
    if cut[1]:
        equal = torch.nonzero(bits == int(cut[0]))[:int(cut[1]), 0]
        inside[equal] = True
        cut[1] -= len(equal)
    return inside
