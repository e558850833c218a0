"""Example prompts for the page: held-out, chosen so that the sources disagree and the merge answers most of them."""

from __future__ import annotations

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "writing": ("Write a sentence with the words bridge and farmer.",
                "Change this sentence to the past: They swim at home.", "Which word rhymes with shell?"),
    "roleplay": ("Play a knight who meets Adam.", "You are a cat. Say goodbye to Tom.",
                 "Speak as a king and welcome Oscar."),
    "reasoning": ("Who is the richest if Felix is richer than Hugo and Kate is richer than Felix?",
                  "If every vim is a zorp and Peter is a zorp, is Peter a vim?",
                  "Please help me. Find the odd one out: bear, horse, wolf, glove."),
    "math": ("What is 40 - 3?", "How much is 24 plus 7?",
             "If Paul has 87 stamps and gets 6 more, how many stamps does Paul have?"),
    "coding": ("I need a Python function called count that multiplies x by 25.",
               "What does this Python code print?\nx = 7\nn = x + 2\nprint(n)",
               "What is the output of this code?\nprint(max([7, 4, 5]))"),
    "extraction": ("Read this: Order 448 for Erik Fox in Lisbon will arrive on 28 April. Write to bird@feather.com. "
                   "Which order number is named?",
                   "What is the date? On 25 May we met Tara Baker (coffee@candle.net) in Milan about order 700.",
                   "Here is a message: Please send order 516 to Anna Hill, Porto, before 18 August. "
                   "Mail: bridge@storm.com. Find the city."),
    "stem": ("What is the chemical symbol of sodium?", "How is a mouse classified?",
             "Tell me the purpose of a seismograph."),
    "humanities": ("What is the capital of Norway?", "Who is the author of The Odyssey?",
                   "Who painted the Garden of Delights?"),
    "smalltalk": ("Hello!", "Who are you?", "What can you do?"),
}


def examples() -> dict[str, list[str]]:
    """Two or three prompts for each domain, and for small talk."""
    return {domain: list(prompts) for domain, prompts in _EXAMPLES.items()}
