"""Task-vector merging as one pipeline: Δⱼ = θⱼ − θ₀ → sparsify → rescale → weigh → elect sign → normalise → λ → θ₀ + Δ.

Sparsifiers first learn what they must know of the whole tensor, then zero what they drop block by block.
Price: one pass, two more to rank magnitudes exactly, one more to rescale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from fusion import compiled
from fusion.methods.draws import begin, draw, uniform
from fusion.methods.lanes import lane_sum
from fusion.methods.method import per_target
from fusion.methods.select import MAGNITUDE, Cut, Selection, Top, magnitude_bits
from fusion.methods.stack import Block, Stack, row_length, steady, stored

Divide = Callable[[np.ndarray], np.ndarray]
NO_TABLE = np.empty(0, np.float32)
NOTHING = 1e-30  # a share of all changes this small is none: the factor to make up for it would not fit into float32
TABLED = 8  # targets whose sets are few enough for a table
CANCELLED = 1e-6  # a sum of weights this small against their magnitudes is rounding


class KeepAll:
    """Drops nothing; what the other sparsifiers have in common."""

    ruled = True  # whether `rules` says what it drops

    def rules(self, start: int, keys: tuple[int, ...]) -> np.ndarray:
        """What is dropped of the block that begins at `start`, once in a pass: [J, 5] int64 for `twins._dropped`."""
        return np.zeros((len(keys), 5), np.int64)

    def learn(self, tensor: Stack) -> None:
        """Read the tensor as often as it takes to know what to drop."""
        self.multiple = 1

    def start(self) -> None:
        """Begin a pass over the tensor in order."""

    def drops(self, j: int) -> bool:
        """Whether anything of target `j` may be dropped."""
        return False

    def keep(self, j: int, start: int, deltas: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        """Which of the next changes [n] of target `j` stay, [n] bool."""
        return np.ones(deltas.shape, bool)

    def note(self, j: int, start: int, mask: np.ndarray) -> None:
        """Take in what `keep` said, which will be asked once more: worth keeping where it is dear."""


class KeepLargest(KeepAll):
    """Keeps the `density`·n largest changes of each target after the `gamma`·n very largest, counted down, at least one."""

    def __init__(self, density: float | np.ndarray, gamma: float | np.ndarray = 0.0):
        self.density, self.gamma = density, gamma

    def learn(self, tensor: Stack) -> None:
        """Find the cuts exactly, in two passes."""
        size, self.multiple = math.prod(tensor.shape), 1
        self.cuts: dict[int, tuple[Cut, Cut]] = {}
        density, gamma = per_target(self.density, tensor.count), per_target(self.gamma, tensor.count)
        chosen = {j: Selection() for j in range(tensor.count) if density[j] < 1}
        if not chosen:
            return
        counts = count_changes(tensor, [(j, -1) for j in chosen])
        for selection, its in zip(chosen.values(), counts, strict=True):
            selection.size, selection.upper = size, its[:selection.upper.size]
        for j, selection in chosen.items():
            kept = max(1, int(density[j] * size)) if density[j] > 0 else 0
            skipped = min(int(gamma[j] * size), size - kept)
            selection.aim((skipped, skipped + kept if kept else skipped))
        bins = [(j, upper) for j, selection in chosen.items() for upper in selection.bins]
        for (j, upper), its in zip(bins, count_changes(tensor, bins), strict=True):
            chosen[j].lower[upper] = its
        self.cuts = {j: selection.cuts() for j, selection in chosen.items()}

    def start(self) -> None:
        self.tops = {j: (Top(skipped), Top(kept)) for j, (skipped, kept) in self.cuts.items()}
        self.left: np.ndarray | None = None

    def rules(self, start: int, keys: tuple[int, ...]) -> np.ndarray:
        """See KeepAll; the same array for a whole pass, in which is counted down what is left of equal magnitudes."""
        if self.left is None:
            self.left = super().rules(start, keys)
            for j, (skipped, kept) in self.cuts.items():
                bits = [min(cut.bits, int(MAGNITUDE)) for cut in (kept, skipped)]  # that of no number: NaN at most
                self.left[j] = 1, bits[0], kept.equal, bits[1], skipped.equal
        return self.left

    def drops(self, j: int) -> bool:
        return j in self.cuts

    def keep(self, j: int, start: int, deltas: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        bits = magnitude_bits(deltas)
        skipped, kept = self.tops[j]
        inside = kept.mask(bits)
        if skipped.cut.equal:
            inside &= ~skipped.mask(bits)
        return inside


class DropAtRandom(KeepAll):
    """Keeps each change with the chance `density`."""

    def __init__(self, density: float | np.ndarray):
        self.density = density

    def learn(self, tensor: Stack) -> None:
        self.multiple, self.chance = 1, per_target(self.density, tensor.count)

    def rules(self, start: int, keys: tuple[int, ...]) -> np.ndarray:
        rules = super().rules(start, keys)
        for j in filter(self.drops, range(len(keys))):
            rules[j, :4] = 2, *begin(keys[j], start), int(self.chance[j] * 2.0 ** 32)
        return rules

    def drops(self, j: int) -> bool:
        return bool(self.chance[j] < 1)

    def keep(self, j: int, start: int, deltas: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        return draw(keys[j], start, deltas.size) < np.uint32(self.chance[j] * 2.0 ** 32)


class DropByRank(DropAtRandom):
    """Keeps each change with a chance from `density` − `epsilon` to `density` + `epsilon`, by its rank in its row."""

    ruled = False

    def __init__(self, density: float | np.ndarray, epsilon: float | np.ndarray):
        self.density, self.epsilon = density, epsilon

    def learn(self, tensor: Stack) -> None:
        self.multiple, self.chance = row_length(tensor), per_target(self.density, tensor.count)
        self.spread = np.minimum(per_target(self.epsilon, tensor.count), np.minimum(self.chance, 1 - self.chance))
        self.noted: dict[tuple[int, int], np.ndarray] = {}

    def keep(self, j: int, start: int, deltas: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        noted = self.noted.pop((j, start), None)
        if noted is not None:
            return np.unpackbits(noted, count=deltas.size).view(bool)
        place = ranks(deltas.reshape(-1, self.multiple))
        place *= np.float32(2 * self.spread[j] / max(self.multiple - 1, 1))
        place += np.float32(self.chance[j] - self.spread[j] if self.multiple > 1 else self.chance[j])
        return uniform(keys[j], start, deltas.size) < place.reshape(-1)

    def note(self, j: int, start: int, mask: np.ndarray) -> None:
        if self.drops(j):
            self.noted[j, start] = np.packbits(mask)  # one bit for each number; sorting again would take ten times the time


def ranks(rows: np.ndarray) -> np.ndarray:
    """The rank of each number's magnitude in its row, 0 = smallest, equal ones in order; [rows, columns] float32."""
    columns = np.arange(rows.shape[1], dtype=np.uint64)
    order = np.sort(magnitude_bits(rows).astype(np.uint64) << np.uint64(32) | columns, axis=1)
    order &= np.uint64(0xFFFFFFFF)
    out = np.empty(rows.shape, np.float32)
    np.put_along_axis(out, order.view(np.int64), columns.astype(np.float32)[None], axis=1)
    return out


def merge_deltas(tensor: Stack, weights: np.ndarray, sparsify: KeepAll, *, elect: bool = False, normalize: bool = False,
                 rescale: bool = False, factor: float = 1.0) -> Iterator[np.ndarray]:
    """Yield the blocks of θ₀ + λ·merge of the targets' changes; `weights` [J] factors, `factor` = λ.

    `elect`: only changes of the elected sign are added, and `normalize` divides by the weights of those. A sum of weights
    that is 0 but for rounding divides nothing.
    """
    weights = np.asarray(weights, np.float64)
    sparsify.learn(tensor)
    scaled = weights * l1_ratio(tensor, sparsify) if rescale else weights
    if not elect and normalize:
        scaled = scaled / divisor(weights.sum(), weights)
    divide = partial(divisor, weights=weights) if normalize else None
    sparsify.start()
    if elect and sparsify.ruled and (divide is None or len(weights) <= TABLED):
        table = agreeing_weights(weights, divide) if divide else NO_TABLE
        yield from elected(tensor, scaled, table, sparsify, factor=factor)
        return
    for block in steady(tensor, sparsify.multiple):
        deltas = drop(block, sparsify, tensor.keys)
        if elect:
            deltas *= scaled.astype(np.float32)[:, None]
            merged = sum_agreeing(deltas, majority(deltas), weights, divide)
        else:
            merged = weighted_sum(deltas, scaled)
        if factor != 1:
            merged *= np.float32(factor)
        merged += block.pivot
        yield merged


def elected(tensor: Stack, factors: np.ndarray, table: np.ndarray, sparsify: KeepAll, *, factor: float = 1.0,
            vote_first: bool = False) -> Iterator[np.ndarray]:
    """Yield the blocks of θ₀ + λ·Σ of the kept changes of the elected sign, straight from stored numbers; see `twins.elect`."""
    factors, merged = factors.astype(np.float32), np.empty(min(compiled.most(), math.prod(tensor.shape)), np.float32)
    for part in stored(tensor):
        rules = sparsify.rules(part.start, tensor.keys)
        yield merged[:part.run("elect", rules, factors, vote_first, table, float(factor), merged)]


def count_changes(tensor: Stack, bins: Sequence[tuple[int, int]]) -> np.ndarray:
    """A pass that counts the changes of a target in bins of their magnitude's bits for each (target, upper bits); see the twin."""
    counts = np.zeros((len(bins), 1 << 16), np.int64)
    targets, uppers = np.array(bins, np.int64).reshape(-1, 2).T.copy()
    for part in stored(tensor) if bins else ():
        part.run("count_changes", targets, uppers, counts)
    return counts


def changes(tensor: Stack) -> Iterator[np.ndarray]:
    """A pass over the targets' changes: blocks [J, n] float32."""
    for block in steady(tensor):
        yield np.subtract(block.models, block.pivot, out=block.models)


def drop(block: Block, sparsify: KeepAll, keys: tuple[int, ...]) -> np.ndarray:
    """The changes of a block, [J, n], with what `sparsify` drops set to 0."""
    deltas = np.subtract(block.models, block.pivot, out=block.models)
    for j, its in enumerate(deltas):
        if sparsify.drops(j):
            its *= sparsify.keep(j, block.start, its, keys)
    return deltas


def l1_ratio(tensor: Stack, sparsify: KeepAll) -> np.ndarray:
    """Σ|Δⱼ| of all changes ÷ Σ|Δⱼ| of the kept ones for each target, [J]; 1 where nothing is kept."""
    if not any(sparsify.drops(j) for j in range(tensor.count)):
        return np.ones(tensor.count)
    sparsify.start()
    whole, kept = ruled_sizes(tensor, sparsify) if sparsify.ruled else sizes(tensor, sparsify)
    return np.divide(whole, kept, out=np.ones(tensor.count), where=kept > NOTHING * whole)


def ruled_sizes(tensor: Stack, sparsify: KeepAll) -> np.ndarray:
    """Σ|Δⱼ| of all changes and of the kept ones, [2, J]."""
    out = np.zeros((tensor.count, 2))
    for part in stored(tensor):
        part.run("sizes", sparsify.rules(part.start, tensor.keys), out)
    return out.T


def sizes(tensor: Stack, sparsify: KeepAll) -> tuple[np.ndarray, np.ndarray]:
    """The same where every block must be asked what is kept of it."""
    whole, kept = np.zeros(tensor.count), np.zeros(tensor.count)
    for block in steady(tensor, sparsify.multiple):
        deltas = np.subtract(block.models, block.pivot, out=block.models)
        for j, its in enumerate(deltas):
            mask = sparsify.keep(j, block.start, its, tensor.keys) if sparsify.drops(j) else True
            sparsify.note(j, block.start, mask)
            size = np.abs(its, out=its)
            whole[j] += lane_sum(size)
            size *= mask
            kept[j] += lane_sum(size)
    return whole, kept


def weighted_sum(deltas: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Σⱼ fⱼ·Δⱼ of `deltas` [J, n] (used up), in the order of the targets, float32."""
    deltas *= factors.astype(np.float32)[:, None]
    for its in deltas[1:]:
        deltas[0] += its
    return deltas[0]


def majority(deltas: np.ndarray) -> np.ndarray:
    """Sign bits [n] uint32 of the sum of `deltas` [J, n] in the order of the targets; 0 counts as +."""
    sign = np.empty(deltas.shape[1], np.uint32)
    compiled.loops().majority(np.ascontiguousarray(deltas), sign)
    return sign


def sum_agreeing(deltas: np.ndarray, sign: np.ndarray, weights: np.ndarray, divide: Divide | None) -> np.ndarray:
    """Add those of `deltas` [J, n] (weighed already, used up) that have the elected `sign` [n], in the order of the targets.

    `divide` turns the sum of the `weights` [J] of those that were added into what the result is divided by; None: nothing.
    """
    few = len(weights) <= TABLED
    table = agreeing_weights(weights, divide) if divide and few else np.empty(0, np.float32)
    below = divide(many_agreeing(deltas, sign, weights)).astype(np.float32) if divide and not few else None
    total = np.empty(deltas.shape[1], np.float32)
    compiled.loops().add_agreeing(np.ascontiguousarray(deltas), sign, table, total)
    return total if below is None else np.divide(total, below, out=total)


def agreeing_weights(weights: np.ndarray, divide: Divide) -> np.ndarray:
    """`divide` of the sum (float64) of every set of the weights [J], at the sum of 2ʲ over its members; [2ᴶ] float32."""
    sums = np.zeros(1 << len(weights))
    for j, weight in enumerate(weights):
        sums += (np.arange(sums.size) >> j & 1) * weight
    return divide(sums).astype(np.float32)


def many_agreeing(deltas: np.ndarray, sign: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum (float64) of the weights whose change is not 0 and has the elected sign, for each element [n]."""
    total = np.zeros(deltas.shape[1])
    for its, weight in zip(deltas, weights, strict=True):
        total += ((its.view(np.uint32) ^ sign).view(np.float32) > 0) * weight
    return total


def divisor(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`sums` of some of the `weights` with 1 where they are 0 but for rounding."""
    return np.where(np.abs(sums) <= CANCELLED * np.abs(weights).sum(), 1.0, sums)
