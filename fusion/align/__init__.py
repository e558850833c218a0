"""Which source tokens correspond to which pivot tokens, and which pivot token stands for each source token: pure functions.

    links = warp(["I", " am", " going"], ["I", " am", " go", "ing"])
    links.of(2)                                    # [2, 3]: the source tokens of " going"
    table = map_vocabulary(source_surfaces, pivot_surfaces)
    ids, logprobs = remap(links, top_ids, top_logprobs, table)

Tokens are compared by their *surface*, the text a token stands for, whatever marks its tokenizer uses.
"""

from fusion.align.remap import LEAST, gathered, looked_up, remap, tell
from fusion.align.sequence import Alignment, by_offsets, warp
from fusion.align.surface import byte_piece, surface, surfaces, tokenizer_kind
from fusion.align.vocabulary import MAPPINGS, by_surface, count_pairs, map_vocabulary

__all__ = ["LEAST", "MAPPINGS", "Alignment", "by_offsets", "by_surface", "byte_piece", "count_pairs", "gathered", "looked_up",
           "map_vocabulary", "remap", "surface", "surfaces", "tell", "tokenizer_kind", "warp"]
