"""Extraction: find one field in a short message that holds several."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from fusion.demo.task import Task, says
from fusion.demo.words import CITIES, FAMILY_NAMES, MONTHS, NOUNS, invented, name

MESSAGES = (
    "Order {order} for {person} in {city} will arrive on {date}. Write to {email}.",
    "{date}: {person} from {city} paid for order {order}, contact {email}.",
    "Please send order {order} to {person}, {city}, before {date}. Mail: {email}.",
    "On {date} we met {person} ({email}) in {city} about order {order}.",
)
QUESTIONS = {
    "order": (("What is the order number?", "Which order number is named?", "Find the order number."),
              "The order number is {}."),
    "person": (("Who is the customer?", "What is the full name of the person?", "Find the name of the person."),
               "The name is {}."),
    "city": (("Which city is named?", "What is the city?", "Find the city."), "The city is {}."),
    "date": (("What is the date?", "Which date is named?", "Find the date."), "The date is {}."),
    "email": (("What is the e-mail address?", "Which e-mail address is given?", "Find the e-mail address."),
              "The e-mail address is {}."),
}


def _fields(rng: Random) -> dict[str, str]:
    user = rng.choice(NOUNS) if rng.random() < 0.7 else invented(rng)
    return {"order": str(rng.randint(100, 999)), "person": f"{name(rng)} {rng.choice(FAMILY_NAMES)}",
            "city": rng.choice(CITIES) if rng.random() < 0.8 else invented(rng).capitalize(),
            "date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
            "email": f"{user}@{rng.choice(NOUNS)}.{rng.choice(('com', 'org', 'net'))}"}


@dataclass(frozen=True)
class Find:
    """The kind of task that asks for one field of the message."""

    field: str

    def __call__(self, rng: Random) -> Task:
        fields = _fields(rng)
        message = rng.choice(MESSAGES).format(**fields)
        asks, says_it = QUESTIONS[self.field]
        layout = rng.choice(("{q} {m}", "Read this: {m} {q}", "Here is a message: {m} {q}"))
        prompt = layout.format(q=rng.choice(asks), m=message)
        wrong = [value for field, value in fields.items() if field != self.field]
        return Task(prompt, says_it.format(fields[self.field]), f"find {sorted(fields.values())}",
                    says(fields[self.field], never=wrong), cased=True)
