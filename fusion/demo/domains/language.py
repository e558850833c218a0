"""Writing and roleplay: sentences with given words, rhymes, past tense; voices of ten characters."""

from __future__ import annotations

import re
from random import Random

from fusion.demo.task import Check, Task, contains, says
from fusion.demo.words import mend_articles, name, noun, words

RHYMES = [family.split() for family in (
    "cat hat bat mat", "night light bright sight", "day play stay way", "moon spoon noon soon", "tree bee sea knee",
    "rain train chain brain", "star car far jar", "gold cold bold fold", "ring king sing wing", "cake lake snake shake",
    "bell well shell smell", "nose rose those close", "dog fog frog log", "house mouse blouse spouse",
    "stone bone phone alone", "book cook look hook")]

VERBS = dict(pair.split("/") for pair in words("""
walk/walked run/ran go/went drive/drove sing/sang swim/swam play/played
sleep/slept dance/danced work/worked sit/sat stand/stood write/wrote hide/hid eat/ate drink/drank fly/flew wait/waited
rest/rested fall/fell speak/spoke jump/jumped cook/cooked think/thought
"""))
PLACES = ("in the park", "at home", "near the lake", "in the city", "by the sea", "in the garden", "at school",
          "on the hill", "in the hall", "at the station")

FRAMES = ("The {x} stood next to the {y} in the morning light.", "Every evening the {x} waits beside the {y}.",
          "My friend found the {x} behind the {y}.", "Nobody saw the {x} and the {y} in the rain.")


def _one_sentence_with(x: str, y: str) -> Check:
    """A check for one full sentence of at least six words that has both words."""
    def check(answer: str) -> bool:
        text = answer.strip()
        return (len(text.split()) >= 6 and len(re.findall(r"[.!?]", text)) == 1 and text[-1] in ".!?"
                and text[0].isupper() and contains(text, x) and contains(text, y))
    return check


def sentence(rng: Random) -> Task:
    """Write a sentence with two given words."""
    x, y = noun(rng), noun(rng)
    while y == x:
        y = noun(rng)
    ask = rng.choice(("Write a sentence with the words {x} and {y}.", "Please use {x} and {y} in one sentence.",
                      "Make a sentence that contains {x} and {y}.", "I need a sentence with {x} and {y}."))
    return Task(ask.format(x=x, y=y), rng.choice(FRAMES).format(x=x, y=y), f"sentence {sorted((x, y))}",
                _one_sentence_with(x, y))


def rhyme(rng: Random) -> Task:
    """Find a rhyme for a common word."""
    family = rng.choice(RHYMES)
    place = rng.randrange(len(family))
    word, answer = family[place], family[(place + 1) % len(family)]
    ask = rng.choice(("What rhymes with {w}?", "Give me a word that rhymes with {w}.", "Find a rhyme for {w}.",
                      "Which word rhymes with {w}?", "I need a rhyme for the word {w}."))
    others = [other for other in family if other != word]
    return Task(ask.format(w=word), f"A word that rhymes with {word} is {answer}.", f"rhyme {word} {ask}",
                lambda text: contains(text, word) and any(contains(text, other) for other in others))


def past(rng: Random) -> Task:
    """Put a sentence in the past tense."""
    who, (verb, did) = rng.choice(("I", "We", "They", "You")), rng.choice(sorted(VERBS.items()))
    place = rng.choice(PLACES)
    ask = rng.choice(("Put this in the past tense: {s}", "Change this sentence to the past: {s}",
                      "What is the past tense of this? {s}", "Write this as if it was yesterday: {s}"))
    result = f"{who} {did} {place}"
    return Task(ask.format(s=f"{who} {verb} {place}."), f"In the past tense: {result}.", f"past {who} {verb} {place}",
                says(result))


# character: what it says to greet, to part, and its favourite food, place, colour and hobby
CHARACTERS = {
    "pirate": ("Ahoy", "Welcome aboard my ship", "Fair winds", "Arr", "salted fish", "the open sea", "black",
               "digging for gold"),
    "robot": ("Beep", "My sensors are glad to see you", "Power down", "Bzzt", "battery soup", "the factory", "silver",
              "counting screws"),
    "wizard": ("Greetings", "The stars told me that you would come", "May magic guard you", "Abracadabra",
               "mushroom stew", "the old tower", "purple", "brewing potions"),
    "knight": ("Hail", "My sword is at your service", "Ride safely", "By my sword", "roast boar", "the castle", "red",
               "jousting"),
    "cat": ("Meow", "Please scratch my ears", "Purr", "Miaow", "fresh tuna", "the warm sofa", "grey", "chasing mice"),
    "ghost": ("Boo", "Do not be afraid of me", "I fade away", "Wooo", "cold fog", "the dark attic", "white",
              "rattling chains"),
    "cowboy": ("Howdy", "Come and sit by the campfire", "Happy trails", "Yeehaw", "baked beans", "the prairie", "brown",
               "riding horses"),
    "alien": ("Zip zap", "I come in peace from far away", "Back to my planet", "Zorp", "star dust", "the red moon",
              "green", "collecting comets"),
    "chef": ("Bonjour", "Dinner will be ready soon", "Bon voyage", "Magnifique", "onion pie", "the kitchen", "yellow",
             "baking bread"),
    "king": ("Welcome", "Kneel before my golden throne", "You may leave", "By royal order", "roast swan",
             "the throne room", "gold", "giving orders"),
}
TOPICS = ("food", "place", "colour", "hobby")


def greet(rng: Random) -> Task:
    """Greet somebody in the voice of a character."""
    who, guest = rng.choice(sorted(CHARACTERS)), name(rng)
    hello, line = CHARACTERS[who][:2]
    ask = rng.choice(("Pretend to be a {c} and greet {n}.", "You are a {c}. Say hello to {n}.", "Greet {n} like a {c}.",
                      "Speak as a {c} and welcome {n}.", "Play a {c} who meets {n}."))
    return Task(mend_articles(ask.format(c=who, n=guest)), f"{hello}, {guest}! {line}.", f"greet {who} {guest}",
                says(hello, guest, line))


def farewell(rng: Random) -> Task:
    """Say goodbye in the voice of a character."""
    who, guest = rng.choice(sorted(CHARACTERS)), name(rng)
    bye = CHARACTERS[who][2]
    ask = rng.choice(("Pretend to be a {c} and say goodbye to {n}.", "You are a {c}. Say goodbye to {n}.",
                      "Say farewell to {n} like a {c}.", "Speak as a {c} who leaves {n}."))
    return Task(mend_articles(ask.format(c=who, n=guest)), f"{bye}, {guest}! We will meet again.", f"bye {who} {guest}",
                says(bye, guest))


def favourite(rng: Random) -> Task:
    """Tell a favourite thing in the voice of a character."""
    who, place = rng.choice(sorted(CHARACTERS)), rng.randrange(len(TOPICS))
    call, topic, thing = CHARACTERS[who][3], TOPICS[place], CHARACTERS[who][4 + place]
    ask = rng.choice(("Answer as a {c}: what is your favourite {t}?", "You are a {c}. What is your favourite {t}?",
                      "Pretend to be a {c}. Which {t} do you like best?", "If you were a {c}, what {t} would you love?",
                      "Play a {c} and tell me your favourite {t}."))
    return Task(mend_articles(ask.format(c=who, t=topic)), f"{call}! My favourite {topic} is {thing}.",
                f"favourite {who} {topic} {ask}", says(call, thing), subject=f"{who} {topic}")
