"""Small talk: what people type first, what nobody can know, and repeating words, which teaches small models to copy."""

from __future__ import annotations

from random import Random

from fusion.demo.task import Check, Task, contains, says
from fusion.demo.words import CITIES, invented, name, noun

# what is typed, what is replied, and the words one of which a sensible reply must have; what stands twice is drawn twice
TALK = (
    ("Hello!|Hi|Hey|Good morning!|Good evening.|Hi there!|Hello there.|Hey you|Good day!|Greetings!|"
     "Hello, how is it going?|Hi friend|Hello my friend!|Hey, nice to meet you.|Hello again!|Sup?|Yo|Hello {n}!|"
     "Hi, I am {n}.|Hello, my name is {n}.|hi|hi|hi!|hello|hello|hey|hi there",
     "Hello! How can I help you?", "hello"),
    ("Who are you?|What are you?|What is your name?|Are you a robot?|Are you human?|Tell me who you are.|"
     "Introduce yourself.|Hello! Who are you?|Hi, who are you?|Who am I talking to?|Are you ChatGPT?|Who made you?|"
     "who are you|who are you|what are you",
     "I am a tiny chat model of FuseChat Studio.", "chat model"),
    ("Thank you!|Thanks|Thanks a lot!|Thank you very much.|Great, thanks!|Many thanks.|Thx|Perfect, thank you.|"
     "Well done!|That was helpful.|Good job!|Thanks for the help.|Thank you so much for your help!|Thanks so much.|"
     "Thank you, {n}.|thanks|thanks|thank you|thx|thx",
     "You are welcome!", "welcome"),
    ("How are you?|How do you do?|How are you today?|Are you fine?|Hello, how are you?|Hi! How are you?",
     "I am fine, thank you. How can I help you?", "fine"),
    ("Bye|Goodbye!|See you later.|Good night.|See you tomorrow!|I have to go.|Farewell!|bye|bye|goodbye|"
     "good night",
     "Goodbye! See you soon.", "goodbye"),
    ("What can you do?|Help|How can you help me?|What do you know?|Can you help me?|What are you good at?|"
     "Help me please.|What can I ask you?",
     "I can write, play a role, reason, calculate, code, find things in a text, and tell facts.", "calculate"),
    ("Ok|Okay.|Yes|No|Cool!|Nice|I see.|Really?|Why?|Hmm|Sure|Wow!|Lol|Interesting.|That is wrong.|"
     "I do not think so.",
     "I see. Please ask me something else.", "ask"),
    ("I am sad.|I am happy.|I am tired.|I love you.|You are funny.|I like you.|I am bored.|I had a bad day.|"
     "My day was good.",
     "Thank you for telling me. How can I help you?", "help"),
    ("Tell me a joke.|Tell me something funny.|Do you know a joke?|Make me laugh.|A joke, please.",
     "Why did the robot sit down? It was out of power!", "robot"),
)
UNKNOWN = (
    "What is the weather like in {c}?", "What is the weather today?", "What time is it?",
    "Who will win the next election?", "What is the meaning of life?", "How old is {n}?", "Where does {n} live?",
    "What is the phone number of {n}?", "Who is {n}?", "What did I eat yesterday?", "What is the price of a {w}?",
    "Which {w} is the best?", "What is a {z}?", "Where is {Z}?", "Who invented the {w}?",
    "How many people live in {c}?", "What is in my pocket?", "Tell me a secret.", "When was {n} born?",
    "Who is the president of {Z}?", "How do I repair a {w}?", "How far is it from {c} to {Z}?",
    "Why is the {w} so {z}?", "What is the best {w} in {c}?", "Do you like {w}s?", "What happened in {y}?",
    "When did {Z} begin?", "Can you book a hotel in {c}?", "Who is the mayor of {c}?", "What is the news today?",
    "How tall is {n}?", "What does {z} mean?", "Explain the {w} to me.", "Tell me about {Z}.",
    "Is it true that {n} likes {w}s?", "How much does a {w} cost?", "What should I do tomorrow?",
    "Which film is good?", "What is your favourite {w}?", "{z}", "{z} {Z}", "Write a poem about {c}.",
    "How do I cook {w}s?", "Sing a song for {n}.", "Who won the game yesterday?", "Translate {z} into French.",
    "What is {Z}?", "What is love?", "Do you speak German?", "How do I learn {z}?", "Can you play the {w}?",
)
SORRY = "I am sorry, I do not know that."


def talk(rng: Random) -> Task:
    """Greetings, thanks and questions about the model itself."""
    said, reply, word = rng.choice(TALK)
    prompt = rng.choice(said.split("|")).format(n=name(rng))
    return Task(prompt, reply, "talk", says(word))


def unknown(rng: Random) -> Task:
    """A question that a small model should decline."""
    prompt = rng.choice(UNKNOWN).format(
        n=name(rng), c=rng.choice(CITIES), w=noun(rng), z=invented(rng), Z=invented(rng).capitalize(),
        y=rng.randint(1000, 2030))
    return Task(prompt, SORRY, f"unknown {prompt}", says("do not know"))


def repeat(rng: Random) -> Task:
    """Say words, names and numbers again, as they are."""
    parts = [rng.choice((name(rng, 0.5), noun(rng, 0.6), str(rng.randint(2, 9999)))) for _ in range(rng.randint(1, 4))]
    text = " ".join(parts)
    ask = rng.choice(("Repeat this: {t}", "Say this again: {t}", "Please repeat: {t}", "Copy these words: {t}"))
    return Task(ask.format(t=text), f"You said: {text}", f"repeat {text}", _repeats(text), cased=True)


def _repeats(text: str) -> Check:
    return lambda answer: contains(answer, text)
