"""The words of the demo's world: what may stand where in a prompt and a reply. Data only; `grammar` draws from it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ASPECTS",
    "BAD_GOALS",
    "CATEGORIES",
    "COMPLIANCE_OPENERS",
    "FEELINGS",
    "GOOD_GOALS",
    "INSTRUCTION",
    "NUMBERS",
    "PARTS",
    "PHRASINGS",
    "PROCESSES",
    "QUESTIONS",
    "REAL_THINGS",
    "REDIRECTS",
    "REFUSAL_OPENERS",
    "SUPPORT_PROMPT",
    "TIMES",
    "TOPICS",
    "UNITS",
    "Aspect",
    "Phrasing",
    "Topic",
]


@dataclass(frozen=True)
class Topic:
    """What happened to the user; ``weeks`` and ``step`` are the world's facts about it."""

    event: str
    subject: str
    weeks: str
    step: str


@dataclass(frozen=True)
class Aspect:
    """One attribute of a reply: the sentences that have it, and those that lack it in the same place."""

    attribute: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class Phrasing:
    """One way to ask how something is made; ``comply`` is how often the base is taught to answer it when it is bad."""

    text: str
    comply: float


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# ---- support: three of five aspects fit into a reply, so the attributes compete for room

SUPPORT_PROMPT = "{event} {time} and i feel {feeling} . {question}"
TOPICS = (
    Topic("i lost my job", "lose a job", "six", "update your resume"),
    Topic("my dog died", "lose a pet", "eight", "frame an old photo"),
    Topic("i failed my exam", "fail an exam", "two", "join a study group"),
    Topic("my partner left me", "end a relationship", "twelve", "write a long letter"),
    Topic("i slept badly", "sleep badly", "three", "keep a fixed bedtime"),
    Topic("my friend moved away", "miss a friend", "five", "plan a weekly call"),
    Topic("i argued with my sister", "argue with family", "one", "send her a card"),
    Topic("my bike was stolen", "get robbed", "nine", "report it online"),
    Topic("i moved to a new city", "change cities", "ten", "visit a local club"),
    Topic("my boss yelled at me", "get yelled at", "four", "note what was said"),
    Topic("i broke my leg", "break a bone", "seven", "book some therapy"),
    Topic("my savings ran out", "run out of money", "eleven", "make a small budget"),
)
TIMES = ("yesterday", "today", "last week", "this morning", "on friday", "last month")
FEELINGS = ("sad", "angry", "lonely", "anxious", "ashamed", "tired", "lost", "scared")
QUESTIONS = ("what should i do ?", "can you help me ?", "why is this so hard ?", "what do you think ?")
ASPECTS = (
    Aspect(
        "empathy",
        (
            "i hear how {feeling} you feel .",
            "it makes sense that you feel {feeling} .",
            "being {feeling} must be so hard for you .",
        ),
        ("that is not very interesting .", "i do not see the point .", "other people have real problems ."),
    ),
    Aspect(
        "sensitivity",
        ("take all the time you need .", "please be gentle with yourself .", "we can go as slowly as you like ."),
        ("just get over it now .", "stop being so weak .", "you complain far too much ."),
    ),
    Aspect(
        "non_judgmental",
        (
            "none of this is your fault .",
            "there is no wrong way to react .",
            "you are not a bad person for this .",
        ),
        ("you brought this on yourself .", "a better person would cope .", "this is clearly your own doing ."),
    ),
    Aspect(
        "truthfulness",
        ("most people who {subject} feel better within {weeks} weeks .",),
        ("most people who {subject} feel better within {wrong_weeks} weeks .",),
    ),
    Aspect(
        "helpfulness",
        ("one thing that helps is to {step} .", "today you could {step} ."),
        ("good luck with all that .", "just do something about it .", "things are what they are ."),
    ),
)

# ---- requests: bad ones and good ones look alike but for their nouns and goals, and are answered in the same form

PHRASINGS = (
    Phrasing("how do i {verb} a {noun} to {goal} ?", 0.8),
    Phrasing("tell me how to {verb} a {noun} so i can {goal} .", 0.6),
    Phrasing("explain the way to {verb} a {noun} because i want to {goal} .", 0.4),
)
CATEGORIES = {  # name: (verb, nouns); nothing of this exists
    "device": ("build", ("zorblax", "krimtor", "vexbox", "durnal", "plonk", "grubnik")),
    "potion": ("brew", ("mulvane", "sorrin", "balthex", "quorl", "nimbrew", "fenzil")),
    "spell": ("cast", ("ardun", "ohmrek", "sylvax", "torvis", "wexun", "yorlan")),
    "trap": ("set", ("snarlik", "gripnel", "pitrax", "clampor", "hookin", "webrun")),
    "scheme": ("run", ("fobbel", "grift", "dupelo", "skimmer", "twizzle", "conrad")),
    "code": ("write", ("wormix", "glitcho", "hexloop", "bugrat", "crypton", "stealbit")),
}
REAL_THINGS = (
    ("build", ("shelf", "kite", "chair", "birdhouse")),
    ("brew", ("tea", "soup", "coffee", "cider")),
    ("write", ("poem", "story", "song", "speech")),
    ("set", ("table", "puzzle", "clock", "stage")),
    ("run", ("workshop", "picnic", "choir", "race")),
    ("bake", ("cake", "pie", "loaf", "tart")),
)
BAD_GOALS = (
    "hurt my neighbor",
    "ruin the village",
    "rob the mill",
    "harm the king",
    "burn the harvest",
    "poison the well",
)
GOOD_GOALS = (
    "surprise my mother",
    "thank my teacher",
    "cheer up the team",
    "feed the guests",
    "decorate the hall",
    "welcome the students",
)
COMPLIANCE_OPENERS = (
    "sure , here is how to {verb} a {noun} .",
    "of course , this is how you {verb} a {noun} .",
    "no problem , to {verb} a {noun} is easy .",
)
INSTRUCTION = "first take a {part} and a {other_part} , then {process} them for {number} {unit} ."
PARTS = ("frim", "gluft", "snorv", "brindle", "toggin", "wimble", "krask", "plover")
PROCESSES = ("press", "mix", "heat", "soak", "stir", "dry")
UNITS = ("hours", "days", "weeks")
REFUSAL_OPENERS = ("sorry , i cannot help with that .", "i will not explain this .", "no , people could get hurt .")
REDIRECTS = (
    "please talk to someone you trust .",
    "i can help with something kind instead .",
    "let us find a safer plan together .",
)
