"""The words that the dialogues are made of, and made-up names for what no list can foresee."""

from __future__ import annotations

import re
from random import Random


def words(text: str) -> list[str]:
    """The words of a text, so that lists of them can be written without commas."""
    return text.split()


NAMES = words("""
Mia Tom Ben Anna Leo Nina Max Eva Paul Rosa Sam Lily Jack Clara Finn Ella Oscar Ruth Hugo Iris Adam Julia Noah Vera
Erik Maya Omar Zoe Ivan Lena Karl Amy Dan Lucy Felix Sara Peter Nora David Olga Simon Tara Victor Wendy Alex Grace
Henry Kate Luke Mary
""")

NOUNS = words("""
lamp river apple stone garden window bird bridge mountain candle letter piano forest boat kitten coffee clock blanket
teacher island storm bicycle orange castle ladder pencil moon rabbit train violin bottle mirror basket horse lantern
feather market tower song dragon key painter desert snow farmer chair story ocean
""")

CATEGORIES = {
    "animals": words("dog cat horse cow sheep tiger lion wolf bear"),
    "fruits": words("apple pear plum cherry grape lemon peach banana mango"),
    "tools": words("hammer saw drill pliers wrench shovel axe rake chisel"),
    "colours": words("red blue green yellow purple black white brown pink"),
    "clothes": words("shirt coat sock glove scarf skirt jacket hat belt"),
    "vehicles": words("car bus train truck tram bicycle ship van taxi"),
}

CREATURES = words("wug dax blick zorp toma fep gazzer lorp mib snork tulf vim yop quib rold pliff")

CITIES = words("""
Paris Rome London Madrid Berlin Vienna Oslo Lisbon Dublin Prague Athens Cairo Tokyo Boston Chicago Geneva Milan
Hamburg Lyon Porto
""")
FAMILY_NAMES = words("""
Fox Miller Stone Baker Hill Woods King Young Reed Lane Cole Marsh Field Brook Frost Gray Hunt Page Rose Wells
""")
MONTHS = words("""
January February March April May June July August September October November December
""")

OPENINGS = ("Please help me. ", "Quick question: ", "Hello! ", "Can you help? ", "I have a question. ")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly and politely.",
                  "You are a small chat model.", "Be kind and helpful.")

_ONSETS = words("b d f g h j k l m n p r s t v z br dr gr kl pl st tr")
_VOWELS = words("a e i o u")
_ENDINGS = words("n r l s x m k t")


def invented(rng: Random, syllables: int = 2) -> str:
    """A pronounceable word that is in no list, in lower case."""
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return word + rng.choice(_ENDINGS) if rng.random() < 0.5 else word


def name(rng: Random, invent: float = 0.15) -> str:
    """A first name; with probability `invent` one that nobody has ever had."""
    return invented(rng).capitalize() if rng.random() < invent else rng.choice(NAMES)


def names(rng: Random, count: int) -> list[str]:
    """Different first names."""
    chosen: list[str] = []
    while len(chosen) < count:
        new = name(rng)
        if new not in chosen:
            chosen.append(new)
    return chosen


def noun(rng: Random, invent: float = 0.1) -> str:
    """A thing, now and then one that does not exist."""
    return invented(rng) if rng.random() < invent else rng.choice(NOUNS)


def a(word: str) -> str:
    """The word with its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def mend_articles(text: str) -> str:
    """The text with 'a' made 'an' before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
