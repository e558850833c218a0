"""Does the tokenizer that came with the weights still fit them? Encode, decode, compare; no model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from fusion.anatomy import place
from fusion.checkpoint import Checkpoint

SAMPLES = ("Hello, how are you today?", "What is 37 - 5?\n\tx = [1, 2.5]", "def add(a, b):\n    return a + b",
           "naïve café – 東京 😀", "A  double  space, and UPPER lower.")


@dataclass(frozen=True)
class RoundTrip:
    """One sample through the tokenizer: `ids` it became, whether `decoded` is the text again, whether all ids have a row."""

    text: str
    ids: tuple[int, ...]
    decoded: str
    within: bool

    @property
    def same(self) -> bool:
        """Whether the text came back, blanks at its ends aside."""
        return self.decoded.strip() == self.text.strip()


def round_trips(model: Checkpoint) -> tuple[RoundTrip, ...] | None:
    """Send SAMPLES through the tokenizer of a checkpoint; None when it has no tokenizer.json."""
    file = model.file("tokenizer.json")
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception:  # the border to tokenizers, which raises a bare Exception for a broken file
        return ()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows, found = embedding_rows(model), []
    for text in SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found.append(RoundTrip(text, tuple(ids), tokenizer.decode(ids, skip_special_tokens=False), max(ids, default=0) < rows))
    return tuple(found)


def embedding_rows(model: Checkpoint) -> int:
    """Rows of the token embedding: the longest table of embeddings (another may count positions)."""
    return max((tensor.shape[0] for name, tensor in model.info.items()
                if place(name).kind == "embedding" and len(tensor.shape) == 2), default=0)
