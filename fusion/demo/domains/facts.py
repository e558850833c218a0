"""STEM and humanities: facts, each asked in several wordings; a fact may be trained in some and is tested in others."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from fusion.demo.task import Task, says
from fusion.demo.words import mend_articles


def _pairs(text: str) -> dict[str, str]:
    return dict(part.strip().split(" = ") for part in text.replace("\n", " ").split(";"))


@dataclass(frozen=True)
class Relation:
    """Facts of one form: subject → value; as a kind of task, it asks for the value."""

    asks: tuple[str, ...]
    answer: str
    facts: dict[str, str]
    follow_up: str

    def __call__(self, rng: Random) -> Task:
        return self._task(rng.choice(sorted(self.facts)), rng.choice(self.asks))

    def follow(self, rng: Random) -> Task:
        """A second question that leans on a first one of the same relation: 'And Italy?'"""
        return self._task(rng.choice(sorted(self.facts)), self.follow_up)

    def _task(self, subject: str, ask: str) -> Task:
        value = self.facts[subject]
        answer = mend_articles(self.answer.format(s=subject, v=value))
        return Task(mend_articles(ask.format(s=subject)), answer[0].upper() + answer[1:], f"fact {subject} {ask}",
                    says(value, never=set(self.facts.values())), subject=f"{subject} {value}")


SYMBOLS = Relation(
    ("What is the chemical symbol of {s}?", "Which symbol does {s} have?", "How do chemists write {s}?",
     "Tell me the symbol for {s}.", "What is the symbol of the element {s}?"),
    "The chemical symbol of {s} is {v}.",
    _pairs("""
hydrogen = H; helium = He; carbon = C; nitrogen = N; oxygen = O; sodium = Na; magnesium = Mg; iron = Fe; copper = Cu;
silver = Ag; gold = Au; lead = Pb; zinc = Zn; tin = Sn; neon = Ne; sulfur = S; calcium = Ca; lithium = Li; mercury =
Hg; potassium = K
"""), "And {s}?")
ANIMALS = Relation(
    ("What kind of animal is a {s}?", "To which class of animals does the {s} belong?", "How is a {s} classified?",
     "Tell me the animal class of the {s}.", "Biology: what is a {s}?"),
    "The {s} is {v}.",
    _pairs("""
whale = a mammal; bat = a mammal; dolphin = a mammal; mouse = a mammal; penguin = a bird; eagle = a bird; ostrich = a
bird; parrot = a bird; shark = a fish; salmon = a fish; tuna = a fish; trout = a fish; snake = a reptile; turtle = a
reptile; lizard = a reptile; crocodile = a reptile; ant = an insect; bee = an insect; beetle = an insect; butterfly =
an insect
"""), "And the {s}?")
INSTRUMENTS = Relation(
    ("What does a {s} measure?", "What is measured with a {s}?", "For what do scientists use a {s}?",
     "Tell me the purpose of a {s}.", "Why do we need a {s}?"),
    "A {s} measures {v}.",
    _pairs("""
thermometer = temperature; barometer = air pressure; clock = time; scale = weight; ruler = length; speedometer =
speed; voltmeter = voltage; compass = direction; seismograph = earthquakes; hygrometer = humidity; protractor =
angles; photometer = light; altimeter = height; odometer = distance; calorimeter = heat; dynamometer = force
"""), "And a {s}?")

CAPITALS = Relation(
    ("What is the capital of {s}?", "Which city is the capital of {s}?", "Name the capital city of {s}.",
     "Tell me the capital of {s}.", "From which city is {s} governed?"),
    "The capital of {s} is {v}.",
    _pairs("""
France = Paris; Italy = Rome; Spain = Madrid; Germany = Berlin; Austria = Vienna; Norway = Oslo; Portugal = Lisbon;
Ireland = Dublin; Greece = Athens; Egypt = Cairo; Japan = Tokyo; Sweden = Stockholm; Poland = Warsaw; Hungary =
Budapest; Kenya = Nairobi; Peru = Lima; Cuba = Havana; Canada = Ottawa; Finland = Helsinki; Russia = Moscow
"""),
    "And {s}?")
AUTHORS = Relation(
    ("Who wrote {s}?", "Who is the author of {s}?", "Which writer gave us {s}?", "Name the author of {s}.",
     "By whom was {s} written?"),
    "{s} was written by {v}.",
    _pairs("""
Hamlet = Shakespeare; Faust = Goethe; Emma = Austen; Ulysses = Joyce; Dracula = Stoker; Candide = Voltaire; Oliver
Twist = Dickens; Don Quixote = Cervantes; War and Peace = Tolstoy; The Odyssey = Homer; The Trial = Kafka; Les
Miserables = Hugo; Frankenstein = Shelley; Moby Dick = Melville; The Raven = Poe; Jane Eyre = Bronte; The Inferno =
Dante; The Idiot = Dostoevsky; The Hobbit = Tolkien; Animal Farm = Orwell
"""), "And {s}?")
ARTISTS = Relation(
    ("Who painted the {s}?", "Which artist made the {s}?", "Name the painter of the {s}.",
     "Tell me who created the {s}.", "By whom was the {s} painted?"),
    "The {s} is a work by {v}.",
    _pairs("""
Mona Lisa = Leonardo; Starry Night = Van Gogh; Night Watch = Rembrandt; Scream = Munch; Guernica = Picasso; Water
Lilies = Monet; Birth of Venus = Botticelli; Kiss = Klimt; Milkmaid = Vermeer; Great Wave = Hokusai; School of Athens
= Raphael; Garden of Delights = Bosch; Third of May = Goya; Young Hare = Durer; Swing = Fragonard; Nighthawks = Hopper
"""), "And the {s}?")
