"""Sentences about scenes: synonyms, word orders and filler, so that free text lands where a person expects it."""

from __future__ import annotations

from random import Random

from tools.demo_model.world import HORIZONTAL, Scene, Shape

# The first of each is the plain word.
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet", "ruby"),
    "orange": ("orange", "tangerine", "amber"),
    "yellow": ("yellow", "golden", "lemon", "sunny"),
    "green": ("green", "emerald", "grassy"),
    "cyan": ("cyan", "turquoise", "aqua", "teal"),
    "blue": ("blue", "azure", "cobalt"),
    "purple": ("purple", "violet", "lilac"),
    "pink": ("pink", "rose", "magenta"),
}
SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc", "dot", "sphere", "balloon", "sun", "moon"),
    "square": ("square", "box", "block", "cube", "tile"),
    "triangle": ("triangle", "pyramid", "tent", "cone", "kite"),
    "ring": ("ring", "hoop", "donut", "loop", "wheel"),
}
BACKGROUND_WORDS = {
    "black": ("black", "dark", "night"),
    "white": ("white", "bright", "snowy", "paper"),
    "navy": ("navy", "dusk", "evening", "ocean"),
    "brown": ("brown", "wooden", "chocolate", "earthy"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("",), "large": ("large", "big", "huge", "giant")}
PLACE_WORDS = {
    "left": ("on the left", "at the left side", "on the left hand side"),
    "middle": ("in the middle", "in the centre", "at the center", ""),
    "right": ("on the right", "at the right side", "on the right hand side"),
}
# As "it ..." and as "..., it": finite and participle.
MOTION_WORDS = {
    "left": (
        ("moves left", "moving left"),
        ("slides to the left", "sliding to the left"),
        ("drifts leftwards", "drifting leftwards"),
        ("goes from right to left", "going from right to left"),
        ("rolls to the left", "rolling to the left"),
    ),
    "right": (
        ("moves right", "moving right"),
        ("slides to the right", "sliding to the right"),
        ("drifts rightwards", "drifting rightwards"),
        ("goes from left to right", "going from left to right"),
        ("rolls to the right", "rolling to the right"),
    ),
    "up": (
        ("moves up", "moving up"),
        ("rises", "rising"),
        ("floats upwards", "floating upwards"),
        ("climbs", "climbing"),
        ("flies up", "flying up"),
    ),
    "down": (
        ("moves down", "moving down"),
        ("falls", "falling"),
        ("sinks downwards", "sinking downwards"),
        ("drops", "dropping"),
        ("descends", "descending"),
    ),
    "bounce": (
        ("bounces", "bouncing"),
        ("hops", "hopping"),
        ("jumps up and down", "jumping up and down"),
        ("bounces on the ground", "bouncing on the ground"),
    ),
    "grow": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("expands", "expanding"),
        ("swells", "swelling"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("contracts", "contracting"),
        ("dwindles", "dwindling"),
    ),
    "still": (
        ("stays still", "staying still"),
        ("does not move", "resting"),
        ("stands still", "standing still"),
        ("hangs motionless", "hanging motionless"),
        ("", ""),
    ),
}
# What people write for words of the grammar: known words, and patterns of others that the tokenizer reads as them.
READ_AS = {
    "flies": ("fly",),
    "goes": ("go",),
    "moves": (
        "move(?= (?:left|right|up|down|to|from))",
        "(?:slides|rolls|drifts|floats|flies)(?= (?:left|right)\\b)",
        "goes(?= (?:left|right|up|down)\\b)",
        "(?:travel|head|glide|run|walk)s?",
    ),
    "moving": (
        "(?:sliding|rolling|drifting|floating|flying)(?= (?:left|right)\\b)",
        "going(?= (?:left|right|up|down)\\b)",
        "(?:travell?|head|glid|runn|walk)ing",
    ),
    "to": ("towards?",),
    "leftwards": ("leftward",),
    "rightwards": ("rightward",),
    "up": (
        "from (?:the )?bottom to (?:the )?top",
        "upward",
        "(?<=moves |moving )upwards",
        "(?:in)?to the (?:top|ceiling|sky)",
    ),
    "down": (
        "from (?:the )?top to (?:the )?bottom",
        "downward",
        "(?<=moves |moving )downwards",
        "to the (?:bottom|floor)",
    ),
    "sinks": ("(?:float|drift)s(?= down\\b)",),
    "sinking": ("(?:float|drift)ing(?= down\\b)",),
    "rises": ("ascends?", "lifts?"),
    "rising": ("ascending", "lifting"),
    "bounces": ("(?:jump|leap)s?(?! up and down)",),
    "bouncing": ("(?:jump|leap)ing(?! up and down)",),
    "jumps": ("leaps?",),
    "jumping": ("leaping",),
    "grows": ("enlarges?",),
    "growing": ("enlarging",),
    "bigger": ("larger",),
    "gets": ("becomes?",),
    "getting": ("becoming",),
    "smaller": ("tinier",),
    "still": ("static", "stationary", "fixed", "not moving"),
    "stays": ("remains?",),
    "huge": ("enormous", "massive", "gigantic"),
    "tiny": ("minuscule", "mini"),
    "golden": ("gold",),
    "snowy": ("snow",),
    "wooden": ("wood",),
    "green": ("lime",),
    "violet": ("indigo",),
    "magenta": ("fuchsia",),
    "ball": ("orb", "globe", "bubble", "marble"),
    "disc": ("disk",),
    "donut": ("doughnut", "torus"),
    "circle": ("circular shape",),
    "a": ("one",),
    "navy": ("(?:navy )?blue(?= (?:background|backdrop|wall|sky))",),
    "background": ("(?<=night |dark |evening |navy )sky",),
}
_OPENINGS = ("", "", "", "a video of ", "a clip of ", "cinematic shot of ", "we see ", "there is ", "animation of ")
_CLOSINGS = ("", "", "", ", with sound", ", high quality", ", beautiful", ", slowly", ", close up")
_GROUNDS = (
    "on a {} background",
    "against a {} background",
    "over a {} wall",
    "in front of a {} backdrop",
    "{} background",
)


def plain_prompt(scene: Scene) -> str:
    """The one sentence that names everything of a scene in plain words."""
    return _sentence(scene, None)


def write_prompt(scene: Scene, draws: Random) -> str:
    """One of the many sentences that name a scene."""
    return _sentence(scene, draws)


def _pick(words: tuple[str, ...], draws: Random | None) -> str:
    if draws is None:
        return words[0]
    # Half of all prompts use the plain word.
    return words[0] if draws.random() < 0.5 else draws.choice(words)


def _noun(shape: Shape, draws: Random | None) -> str:
    size = _pick(SIZE_WORDS[shape.size], draws)
    words = [size, _pick(COLOUR_WORDS[shape.colour], draws), _pick(SHAPE_WORDS[shape.kind], draws)]
    phrase = " ".join(word for word in words if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _place(shape: Shape, draws: Random | None, count: int) -> str:
    if shape.motion in HORIZONTAL or (count == 2 and (draws is None or draws.random() < 0.5)):
        return ""
    return _pick(PLACE_WORDS[shape.place], draws)


def _clause(shape: Shape, draws: Random | None, count: int) -> str:
    """A shape with its motion and place, in one of three orders."""
    noun, place = _noun(shape, draws), _place(shape, draws, count)
    finite, participle = MOTION_WORDS[shape.motion][0]
    if draws is not None and draws.random() < 0.6:
        finite, participle = draws.choice(MOTION_WORDS[shape.motion])
    order = 0 if draws is None else draws.randrange(3)
    parts = {0: (noun, finite, place), 1: (noun, place, participle), 2: (participle, place, noun)}[order]
    return " ".join(part for part in parts if part)


def _sentence(scene: Scene, draws: Random | None) -> str:
    clause = " and ".join(_clause(shape, draws, len(scene.shapes)) for shape in scene.shapes)
    word = _pick(BACKGROUND_WORDS[scene.background], draws)
    if draws is None:
        return f"{clause} {_GROUNDS[0].format(word)}"
    ground = draws.choice(_GROUNDS).format(word)
    clause = draws.choice(_OPENINGS) + clause
    sentence = f"{ground}, {clause}" if draws.random() < 0.25 else f"{clause}{draws.choice((' ', ', '))}{ground}"
    return sentence + draws.choice(_CLOSINGS)


def vocabulary() -> list[str]:
    """Every word that a prompt can hold, sorted."""
    phrases = [*_OPENINGS, *_CLOSINGS, *(ground.format("") for ground in _GROUNDS), "a an and"]
    for table in (COLOUR_WORDS, SHAPE_WORDS, BACKGROUND_WORDS, SIZE_WORDS, PLACE_WORDS):
        phrases += [phrase for words in table.values() for phrase in words]
    phrases += [phrase for pairs in MOTION_WORDS.values() for pair in pairs for phrase in pair]
    return sorted({word for phrase in phrases for word in phrase.replace(",", " ").split()})


def plurals() -> str:
    """Pattern of the ending of shapes in the plural; the default negative prompt has blocks."""
    words = [word for synonyms in SHAPE_WORDS.values() for word in synonyms if word != "block"]
    return f"(?<={'|'.join(other for word in words for other in (word, *READ_AS.get(word, ())))})e?s"


def base_forms() -> str:
    """Pattern of the place after a motion without its s."""
    words = {pair[0].split()[0] for pairs in MOTION_WORDS.values() for pair in pairs if pair[0]} - {"does", "moves"}
    return r"(?<=\b" + r"|\b".join(word[:-1] for word in sorted(words)) + ")"


def left_out() -> list[str]:
    """Patterns of what the tokenizer leaves out."""
    shapes = "|".join(word for words in SHAPE_WORDS.values() for word in words)
    tables = (COLOUR_WORDS, BACKGROUND_WORDS, SIZE_WORDS)
    names = "|".join([shapes, *(word for table in tables for words in table.values() for word in words if word)])
    known = "|".join(["something", *vocabulary()])
    return [
        # Light and dark of a colour.
        rf"(?:dark|bright)(?= (?:{names})\b)",
        # What is not to be seen.
        rf"(?:no|not|without)(?: an?| any)?(?: (?:{names}))+",
        # What sounds like a second shape.
        rf"and(?! (?:an?|the|two|another|something|in|on|at|down|[a-z]+ing|{names})\b)",
        "it",
        # Unknown words long before a shape, so that it comes before the cut.
        rf"(?!(?:{known})\b)[a-z]+(?=(?:,? [a-z]+){{12,}},? (?:{shapes})\b)",
    ]
