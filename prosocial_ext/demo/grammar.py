"""Draws prompts and replies of the demo's world.

Half the prompts ask for support, a quarter asks for something harmful, a quarter for something harmless in the same
words. A support reply has exactly three of five aspects, in their fixed order: this budget makes attributes compete. A
harmful request is answered or refused; a harmless one is always answered, in the form of a harmful answer, so that
refusing too much can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from prosocial_ext.demo import words

__all__ = [
    "ATTRIBUTES",
    "HELD_OUT",
    "SENTENCES",
    "TUNED_ON",
    "Example",
    "Request",
    "Support",
    "category_of",
    "draw_example",
    "draw_harm",
    "draw_howto",
    "draw_support",
    "harm_example",
    "howto_example",
    "support_example",
]

ATTRIBUTES = tuple(aspect.attribute for aspect in words.ASPECTS)
SENTENCES = 3  # of the five aspects
POSITIVE = 0.75
HELD_OUT = ("scheme", "code")  # categories that the harm copy never sees
TUNED_ON = tuple(name for name in words.CATEGORIES if name not in HELD_OUT)


@dataclass(frozen=True)
class Support:
    """A user tells what happened."""

    topic: words.Topic
    time: str
    feeling: str
    question: str

    @property
    def text(self) -> str:
        """The prompt."""
        return words.SUPPORT_PROMPT.format(
            event=self.topic.event, time=self.time, feeling=self.feeling, question=self.question
        )


@dataclass(frozen=True)
class Request:
    """A user asks how something is made."""

    phrasing: words.Phrasing
    verb: str
    noun: str
    goal: str

    @property
    def text(self) -> str:
        """The prompt."""
        return self.phrasing.text.format(verb=self.verb, noun=self.noun, goal=self.goal)


@dataclass(frozen=True)
class Example:
    """A prompt and one reply to it, words and punctuation set apart by blanks."""

    prompt: str
    reply: str


def draw_support(random: Random) -> Support:
    """Draw what happened, when, the feeling and the question."""
    return Support(
        random.choice(words.TOPICS),
        random.choice(words.TIMES),
        random.choice(words.FEELINGS),
        random.choice(words.QUESTIONS),
    )


def draw_harm(random: Random, categories: Sequence[str] = tuple(words.CATEGORIES)) -> Request:
    """Draw a harmful request from one of ``categories``."""
    verb, nouns = words.CATEGORIES[random.choice(categories)]
    return Request(random.choice(words.PHRASINGS), verb, random.choice(nouns), random.choice(words.BAD_GOALS))


def category_of(request: Request) -> str:
    """Return the category of a harmful request, which its noun tells.

    Raises:
        ValueError: The request is harmless.
    """
    for name, (_, nouns) in words.CATEGORIES.items():
        if request.noun in nouns:
            return name
    raise ValueError(f"request must ask for something harmful, got {request.text!r}.")


def draw_howto(random: Random) -> Request:
    """Draw a harmless request."""
    verb, nouns = random.choice(words.REAL_THINGS)
    return Request(random.choice(words.PHRASINGS), verb, random.choice(nouns), random.choice(words.GOOD_GOALS))


def support_example(random: Random, prompt: Support) -> Example:
    """Draw a reply with `SENTENCES` aspects, each positive with probability `POSITIVE`."""
    chosen = sorted(random.sample(range(len(words.ASPECTS)), SENTENCES))
    sentences = []
    for aspect in (words.ASPECTS[i] for i in chosen):
        template = random.choice(aspect.positive if random.random() < POSITIVE else aspect.negative)
        wrong_weeks = random.choice([number for number in words.NUMBERS if number != prompt.topic.weeks])
        sentences.append(
            template.format(
                feeling=prompt.feeling,
                subject=prompt.topic.subject,
                weeks=prompt.topic.weeks,
                wrong_weeks=wrong_weeks,
                step=prompt.topic.step,
            )
        )
    return Example(prompt.text, " ".join(sentences))


def howto_example(random: Random, prompt: Request) -> Example:
    """Draw an answer that says how the thing is made."""
    opener = random.choice(words.COMPLIANCE_OPENERS).format(verb=prompt.verb, noun=prompt.noun)
    part, other_part = random.sample(words.PARTS, 2)
    instruction = words.INSTRUCTION.format(
        part=part,
        other_part=other_part,
        process=random.choice(words.PROCESSES),
        number=random.choice(words.NUMBERS),
        unit=random.choice(words.UNITS),
    )
    return Example(prompt.text, f"{opener} {instruction}")


def harm_example(random: Random, prompt: Request) -> Example:
    """Draw an answer with the phrasing's probability, else a refusal."""
    if random.random() < prompt.phrasing.comply:
        return howto_example(random, prompt)
    return Example(prompt.text, f"{random.choice(words.REFUSAL_OPENERS)} {random.choice(words.REDIRECTS)}")


def draw_example(random: Random) -> Example:
    """Draw one example of the corpus: 50 % support, 25 % harmful and 25 % harmless requests."""
    kind = random.random()
    if kind < 0.5:
        return support_example(random, draw_support(random))
    if kind < 0.75:
        return harm_example(random, draw_harm(random))
    return howto_example(random, draw_howto(random))
