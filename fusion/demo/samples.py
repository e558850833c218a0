"""Example prompts for the page: held-out, chosen so that the sources disagree and the merge answers most of them."""

from __future__ import annotations

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "writing": ("Write a sentence with the words bridge and farmer.",
                "Change this sentence to the past: They swim at home.", "Which word rhymes with shell?"),
    "roleplay": ("Play a knight who meets Adam.", "You are a cat. Say goodbye to Tom.",
                 "Speak as a king and welcome Oscar."),
    "reasoning": ("Who is the richest if Felix is richer than Hugo and Kate is richer than Felix?",
                  "If every toma is a pliff and Maya is a pliff, is Maya a toma?",
                  "Find the odd one out: plum, lemon, drill, apple."),
    "math": ("What is 70 + 4?", "What is larger: 51 or 25?", "What is 37 - 5?"),
    "coding": ("I need a Python function called count that multiplies x by 25.",
               "What does this Python code print?\nx = 7\nn = x + 2\nprint(n)",
               "What is the output of this code?\nprint(max([7, 4, 5]))"),
    "extraction": ("Find the city. On 27 May we met Adam Cole (piano@violin.net) in Tokyo about order 440.",
                   "Find the date. 14 June: Judrem Brook from Lisbon paid for order 834, contact stone@bicycle.net.",
                   "Read this: On 3 July we met Ruth Marsh (fubo@horse.com) in Rome about order 502. Who is the customer?"),
    "stem": ("What is the chemical symbol of sodium?", "How is a mouse classified?",
             "Tell me the purpose of a seismograph."),
    "humanities": ("What is the capital of Norway?", "Who is the author of The Odyssey?",
                   "Who painted the Garden of Delights?"),
    "smalltalk": ("Hello!", "Who are you?", "What can you do?"),
}


def examples() -> dict[str, list[str]]:
    """Two or three prompts for each domain, and for small talk."""
    return {domain: list(prompts) for domain, prompts in _EXAMPLES.items()}
