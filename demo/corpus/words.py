"""Words to build text from: real ones, and made-up ones that only copying can get right."""

from __future__ import annotations

import random

from parallax.demo.corpus.phrases import choose, listed

NAMES = listed(
    "Ada Ben Cleo Dara Eli Fay Gus Hana Ivo Jun Kira Leo Mia Nils Ola Pia Quin Rosa Sami Tess"
    " Uma Vera Wim Yara Zoe Max Lily Tom Anna Oskar Nora Finn Alice Bob Emma Paul"
)
ANIMALS = listed(
    "fox owl bear cat dog rabbit mouse turtle frog duck otter hedgehog squirrel goat horse whale"
    " penguin robin snail bee crow deer lamb pony tiger lion robot dragon"
)
PLACES = listed(
    "forest garden river village harbour meadow mountain library kitchen market island castle"
    " lighthouse barn school attic valley beach"
)
THINGS = listed(
    "lantern key kite map bell boat drum apple shell stone ring book clock hat basket feather"
    " ladder blanket whistle teapot spoon marble"
)
CITIES = listed(
    "Paris London Berlin Rome Tokyo Madrid Oslo Vienna Lima Cairo Boston Delhi Prague Dublin"
    " Zurich Athens Chicago Lisbon Hamburg Sydney Seoul"
)
_ONSETS = listed("b d f g h j k l m n p r s t v w z br dr fl gr kl pl st tr sh th")
_VOWELS = listed("a e i o u a e i o ai ee oo")
_CODAS = ("", "", "", "n", "r", "l", "s", "k", "m", "t", "x", "nd")


def made_up_word(rng: random.Random) -> str:
    """Invent a word of one to three syllables."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    )


def name(rng: random.Random, *, held_out: bool) -> str:
    """Draw a name, made up half of the time."""
    if rng.random() < 0.5:
        return made_up_word(rng).capitalize()
    return choose(NAMES, rng, held_out=held_out)


def noun(pool: tuple[str, ...], rng: random.Random, *, held_out: bool) -> str:
    """Draw a noun from a list, made up a third of the time."""
    if rng.random() < 0.33:
        return made_up_word(rng)
    return choose(pool, rng, held_out=held_out)
