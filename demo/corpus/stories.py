"""Little stories about whom the request names."""

from __future__ import annotations

import random

from parallax.demo.corpus.document import Document, assistant, user
from parallax.demo.corpus.phrases import dressed, expand, listed
from parallax.demo.corpus.words import ANIMALS, NAMES, PLACES, THINGS, name, noun

_VERBS = (
    "[tell|write] [me|us|] [a|a little|a short|a small|one] story about {}",
    "[please|] tell [me|] a story about {}",
    "[can|could] you tell [me|] a [little|short|] story about {}",
    "i want a [little|short|] story about {}",
    "a story about {} please",
    "make up a [little|short|] story about {}",
)
_HELD_OUT_VERBS = (
    "[do you know|give me] a tale about {}",
    "i would love to hear a story about {}",
)
_PLAIN = (
    "tell [me|us] a story",
    "[write|tell] [me|] a [little|short|] story",
    "[can|could] you tell [me|] a story",
    "do you know a story",
    "story please",
    "once upon a time",
)
_ADJECTIVES = listed(
    "brave little red old clever tiny happy lazy blue quiet curious kind strong shy"
)
_OPENINGS = (
    "Once there was {a_animal} named {name} who lived in the {place}.",
    "{name} was {a_animal} in a small {place}.",
    "In the {place} lived {a_animal}. The name of the {animal} was {name}.",
)
_EVENTS = (
    "One day {name} found {a_thing}.",
    "One morning {name} lost {a_thing}.",
    "One evening {name} saw {a_thing} in the {place}.",
)
_TURNS = (
    "A friend came by and helped {name} to carry it.",
    "It was too heavy for one, so {name} called three friends.",
    "{name} did not know what to do, and asked the others.",
    "Nobody could move it alone, but together they could.",
)
_ENDS = (
    "In the evening they all sat in the {place} and were happy.",
    "From that day on the {animal} was never alone.",
    "And {name} kept the {thing} for ever.",
    "Together they were strong, and {name} slept well.",
)


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return a request for a story and a story of four sentences that keeps what it names."""
    who = rng.choice(NAMES) if rng.random() < 0.4 else name(rng, held_out=held_out)
    animal = noun(ANIMALS, rng, held_out=held_out)
    place = noun(PLACES, rng, held_out=held_out)
    thing = noun(THINGS, rng, held_out=held_out)
    kind = rng.choice(("plain", "animal", "name", "thing", "both", "place"))
    if held_out and kind == "plain":
        kind = "both"
    if kind not in ("animal", "both"):
        animal = rng.choice(ANIMALS)
    if kind not in ("name", "both"):
        who = rng.choice(NAMES)
    if kind != "thing":
        thing = rng.choice(THINGS)
    if kind != "place":
        place = rng.choice(PLACES)
    subject = {
        "plain": "",
        "animal": _with_article(animal),
        "name": who,
        "thing": _with_article(thing),
        "both": f"{_with_article(animal)} named {who}",
        "place": f"the {place}",
    }[kind]
    asks = _PLAIN if kind == "plain" else _HELD_OUT_VERBS if held_out else _VERBS
    described = _with_article(animal)
    if kind in ("animal", "both") and rng.random() < 0.3:
        adjective = rng.choice(_ADJECTIVES)
        subject = subject.replace(described, _with_article(f"{adjective} {animal}"))
        described = _with_article(f"{adjective} {animal}")
    ask = expand(rng.choice(asks), rng).format(subject)
    parts = (rng.choice(part) for part in (_OPENINGS, _EVENTS, _TURNS, _ENDS))
    story = " ".join(parts).format(
        name=who,
        animal=animal,
        a_animal=described,
        place=place,
        thing=thing,
        a_thing=_with_article(thing),
    )
    must = {
        "plain": (),
        "animal": (animal,),
        "name": (who,),
        "thing": (thing,),
        "both": (animal, who),
        "place": (place,),
    }[kind]
    return Document(
        "stories",
        [user(dressed(ask, rng, noise=not held_out)), assistant(story)],
        must=must,
    )
