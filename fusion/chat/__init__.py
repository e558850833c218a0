"""Chat with several models at once: one memory budget, one prompt, the same sampling for all.

    pool = ModelPool(budget_bytes=8 << 30)
    asked = [Request(partial(pool.lease, key, partial(load, folder)), messages) for key, folder in folders.items()]
    for replies in stream(asked, Sampling(temperature=0.7, seed=1), threading.Event()):
        show(replies)

Importing this package is cheap: torch and transformers are imported when the first model is loaded.
"""

from fusion.chat.export import Exchange, Transcript, conversation_jsonl
from fusion.chat.model import ChatModel, expected_bytes, from_parts, from_tensors, load
from fusion.chat.pool import ModelPool
from fusion.chat.prompt import Prompt, fit, render
from fusion.chat.sampling import Sampling
from fusion.chat.streaming import Reply, Request, stream
from fusion.chat.thoughts import Part

__all__ = ["ChatModel", "Exchange", "ModelPool", "Part", "Prompt", "Reply", "Request", "Sampling", "Transcript",
           "conversation_jsonl", "expected_bytes", "fit", "from_parts", "from_tensors", "load", "render", "stream"]
