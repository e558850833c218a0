"""Reasoning and mathematics: orders, odd ones out, syllogisms; sums, differences, stories and comparisons."""

from __future__ import annotations

from random import Random

from fusion.demo.task import Task, contains, counts, says
from fusion.demo.words import CATEGORIES, CREATURES, a, name, names, words

# comparative: (superlative of the first, superlative of the last)
ORDERS = {"taller": ("tallest", "shortest"), "older": ("oldest", "youngest"), "faster": ("fastest", "slowest"),
          "richer": ("richest", "poorest")}


def order(rng: Random) -> Task:
    """Who of three is at the top or the bottom of a chain of two comparisons?"""
    first, middle, last = names(rng, 3)
    more, ends = rng.choice(sorted(ORDERS.items()))
    end = rng.randrange(2)
    facts = [f"{first} is {more} than {middle}", f"{middle} is {more} than {last}"]
    rng.shuffle(facts)
    ask = rng.choice(("If {p} and {q}, who is the {e}?", "We know that {p} and {q}. Who is the {e}?",
                      "Who is the {e} if {p} and {q}?"))
    answer = (first, last)[end]
    wrong = {first, middle, last} - {answer}
    return Task(ask.format(p=facts[0], q=facts[1], e=ends[end]), f"The {ends[end]} is {answer}.",
                f"order {sorted((first, middle, last))} {more} {end}", says(answer, never=wrong))


def odd_one_out(rng: Random) -> Task:
    """Which of four words is of another category than the rest?"""
    category, other = rng.sample(sorted(CATEGORIES), 2)
    odd = rng.choice([word for word in CATEGORIES[other] if word not in CATEGORIES[category]])
    rest = rng.sample(CATEGORIES[category], 3)
    shown = [odd, *rest]
    rng.shuffle(shown)
    ask = rng.choice(("Which word does not belong: {w}?", "Find the odd one out: {w}.",
                      "One of these words is different: {w}. Which one?"))
    return Task(ask.format(w=", ".join(shown)), f"The odd one out is {odd}, because the others are {category}.",
                f"odd {odd} {sorted(rest)}", says(odd, category, never=rest))


def syllogism(rng: Random) -> Task:
    """Does a conclusion follow from 'every X is a Y'?"""
    x, y = rng.sample(CREATURES, 2)
    who, follows = name(rng), rng.random() < 0.5
    given, asked = (x, y) if follows else (y, x)
    ask = rng.choice(("Every {x} is {y}. {n} is {g}. Is {n} {q}?", "If every {x} is {y} and {n} is {g}, is {n} {q}?",
                      "Every {x} is {y}, and {n} is {g}. Must {n} be {q}?"))
    answer = f"Yes, {who} is {a(y)}." if follows else f"We cannot know whether {who} is {a(x)}."
    yes = says("yes", who, y) if follows else says("cannot", who, x, never=("yes",))
    return Task(ask.format(x=x, y=a(y), n=who, g=a(given), q=a(asked)), answer,
                f"syllogism {x} {y} {who} {follows}", yes)


def _operands(rng: Random, sign: str) -> tuple[int, int, int]:
    """Two operands and their result; the result lies between 1 and 99."""
    while True:
        x, y = rng.randint(2, 89), rng.randint(2, 9)
        result = x + y if sign == "+" else x - y
        if 1 <= result <= 99:
            return x, y, result


def plus(rng: Random) -> Task:
    """A sum."""
    x, y, result = _operands(rng, "+")
    ask = rng.choice(("What is {x} + {y}?", "Please add {x} and {y}.", "Calculate {x} + {y}.",
                      "How much is {x} plus {y}?", "What is {x}+{y}?", "{x}+{y}"))
    return Task(ask.format(x=x, y=y), f"The result is {x} + {y} = {result}.", f"+ {x} {y}", counts(result))


def minus(rng: Random) -> Task:
    """A difference."""
    x, y, result = _operands(rng, "-")
    ask = rng.choice(("What is {x} - {y}?", "Please subtract {y} from {x}.", "Calculate {x} - {y}.",
                      "How much is {x} minus {y}?", "What is {x}-{y}?", "{x}-{y}"))
    return Task(ask.format(x=x, y=y), f"The result is {x} - {y} = {result}.", f"- {x} {y}", counts(result))


THINGS = words("apples books coins stamps pencils cookies marbles eggs cards shells")


def story(rng: Random) -> Task:
    """A one-step word problem: somebody gets or gives away some things."""
    sign, who, thing = rng.choice("+-"), name(rng), rng.choice(THINGS)
    x, y, result = _operands(rng, sign)
    asks = (("If {n} has {x} {t} and gets {y} more, how many {t} does {n} have?",
             "There are {x} {t}. Then {n} brings {y} more. How many {t} are there?") if sign == "+" else
            ("If {n} has {x} {t} and gives away {y}, how many {t} does {n} have?",
             "There are {x} {t}. Then {n} takes {y} of them. How many {t} are left?"))
    answer = f"There are {x} {sign} {y} = {result} {thing}."
    return Task(rng.choice(asks).format(n=who, x=x, y=y, t=thing), answer, f"{sign} {x} {y}",
                lambda text: counts(result)(text) and contains(text, thing))


def larger(rng: Random) -> Task:
    """Which of two numbers is larger or smaller?"""
    x, y = rng.sample(range(10, 100), 2)
    word, result = rng.choice((("larger", max(x, y)), ("smaller", min(x, y))))
    ask = rng.choice(("Which number is {w}, {x} or {y}?", "Tell me the {w} number of {x} and {y}.",
                      "What is {w}: {x} or {y}?"))
    return Task(ask.format(w=word, x=x, y=y), f"The {word} number is {result}.", f"larger {sorted((x, y))} {word}",
                counts(result))
