"""Words: lists of real ones, and a supply of invented ones too large to learn."""

# ruff: noqa: SIM905 (lists of words read best as text)

from __future__ import annotations

import string
from random import Random

from tokasaurus.demo.corpus.dinosaur_table import DINOSAURS
from tokasaurus.demo.corpus.document import is_held_out, weighted

# In no training document, in upper or lower case: the evaluation asks for these words.
HELD_OUT_WORDS = frozenset(
    """marmalade umbrella lighthouse flamingo telescope cinnamon pumpkin saxophone harbour velvet
    waffle chimney parachute zeppelin rhubarb trumpet glacier xylophone mushroom bicycle""".split()
)

COMMON_WORDS = tuple(
    """apple banana bread butter cake candle carpet castle chair cheese cherry cloud coat coffee
    corn cotton cup curtain dance desk door dragon dream drum eagle earth egg engine feather field
    finger fire fish flag flame floor flower forest fork fox frog garden gate ghost glass glove gold
    grape grass guitar hammer hand hat heart hill honey horse house ice island jacket jewel juice
    jungle kettle key king kite kitten knife ladder lake lamp leaf lemon letter light lion lizard
    map marble market melon metal milk mirror monkey moon morning mountain mouse music needle nest
    night north ocean olive onion orange orchid owl paint palace paper parrot peach pear pencil
    pepper piano picture pillow pirate planet plate pocket poem pond potato puzzle queen rabbit
    radio rain rainbow ribbon rice ring river road robot rocket roof room rope rose sail salt sand
    school sea seed shadow sheep shell ship shirt shoe silver sky sleep smoke snake snow soap song
    soup south spider spoon spring star stone storm story street sugar summer sun swan table tea
    tent thunder tiger tomato tower town train tree tulip turtle valley village violin voice wagon
    wall water wave wheel whale wind window winter wolf wood wool zebra yes no hello goodbye maybe
    today tomorrow never always happy sad brave quick slow quiet loud bright dark warm cold sweet
    sour small big tall short red blue green yellow purple orange black white pink brown one two
    three four five six seven eight nine ten done ready okay stop go left right up down open closed
    true false ping pong test""".split()
)

COLOURS = (
    "red blue green yellow purple orange black white pink brown grey golden silver turquoise"
).split()
FOODS = """breads cheeses soups nuts olives apples pears berries noodles pancakes cookies carrots
    beans potatoes peas melons plums pies figs lemons grapes onions biscuits""".split()
ANIMALS = (
    "cat dog rabbit parrot turtle frog goat horse fox owl mouse duck snail lizard pony".split()
)
THINGS = """apples eggs shells stones coins books pencils marbles cookies leaves bones fossils cards
    balloons stickers flowers feathers buttons acorns berries toys stamps""".split()
PEOPLE = """Tom Anna Ben Lucy Sam Mia Leo Emma Max Nora Jack Ella Omar Lily Finn Rosa Noah Ivy Hugo
    Zoe Adam Maya Carl Nina Paul Sara Dan Kate Ravi Mei Ali Lena""".split()

_ONSETS = (
    "b d f g h k l m n p r s t v z".split(),
    "c j w y qu bl br ch cl cr dr fl fr gl gr pl pr sh sk sl sn sp st th tr tw x".split(),
)
_VOWELS = ("a e i o u".split(), "ai ea ee oa oo ou ia io ar er or".split())
_CODAS = (
    "l m n r s t k".split(),
    "b d f g p x z ck ff ll mp nd ng nk nt rd rk rn ss st th".split(),
)


_BLEND_SOURCES = (
    *(word for word in COMMON_WORDS if len(word) > 3),
    *(word for words in (COLOURS, FOODS, ANIMALS, THINGS) for word in words),
    *(dinosaur.name.lower() for dinosaur in DINOSAURS),
)


def _sound(rng: Random, sounds: tuple[list[str], list[str]]) -> str:
    """A common sound three times in four, and an unusual one otherwise."""
    return rng.choice(sounds[0] if rng.random() < 0.75 else sounds[1])


def _syllable(rng: Random) -> str:
    coda = _sound(rng, _CODAS) if rng.random() < 0.4 else ""
    return _sound(rng, _ONSETS) + _sound(rng, _VOWELS) + coda


def _syllables(rng: Random) -> str:
    return "".join(_syllable(rng) for _ in range(rng.choices((1, 2, 3, 4), (10, 50, 32, 8))[0]))


def invent_word(rng: Random, *, held_out: bool = False) -> str:
    """A pronounceable word in lower case, from the training or the evaluation side of the split."""
    while True:
        word = _syllables(rng)
        if 3 <= len(word) <= 10 and word not in HELD_OUT_WORDS and is_held_out(word) == held_out:
            return word


def invent_name(rng: Random, *, held_out: bool = False) -> str:
    return invent_word(rng, held_out=held_out).capitalize()


def blended_word(rng: Random) -> str:
    """Slices of real words, joined: known pieces of the tokenizer in new places."""
    while True:
        slices = []
        for _ in range(rng.randint(2, 3)):
            word = rng.choice(_BLEND_SOURCES)
            start = rng.randrange(max(1, len(word) - 2))
            slices.append(word[start : start + rng.randint(2, 5)])
        blend = "".join(slices)
        if blend not in HELD_OUT_WORDS and not is_held_out(blend):
            return blend


def jumble(rng: Random) -> str:
    """A string that cannot be pronounced, such as a password or a part number."""
    alphabet = rng.choice(
        (string.ascii_lowercase, string.ascii_uppercase, string.ascii_uppercase + string.digits)
    )
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 7)))


_SCRIPTS = (
    (0xC0, 0xFF),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x5D0, 0x5EA),
    (0x3041, 0x3096),
    (0x4E00, 0x9FA5),
    (0x1F600, 0x1F64F),
)


def foreign_word(rng: Random) -> str:
    """A few characters of another script, so that training sees every byte of the vocabulary."""
    first, last = rng.choice(_SCRIPTS)
    characters = (chr(rng.randint(first, last)) for _ in range(rng.randint(1, 4)))
    return "".join(c for c in characters if c.isprintable()) or "é"


def any_word(rng: Random) -> str:
    """A word of any kind, for documents that are copied rather than understood."""
    kind = weighted(
        rng, [(50, "invented"), (28, "common"), (8, "jumble"), (10, "number"), (4, "foreign")]
    )
    if kind == "invented":
        word = invent_word(rng)
    elif kind == "common":
        word = rng.choice(COMMON_WORDS)
    elif kind == "jumble":
        return jumble(rng)
    elif kind == "number":
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    else:
        return foreign_word(rng)
    style = rng.random()
    return word.capitalize() if style < 0.2 else word.upper() if style < 0.3 else word
