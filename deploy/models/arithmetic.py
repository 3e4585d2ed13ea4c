"""Generated arithmetic with worked steps: an endless, exactly known domain.

Every problem is decided by its kind and two or three numbers. A hash of those picks its split, so
a held-out problem is never seen in training, in whichever wording. Same seed, same text.
"""

import hashlib
import random
from collections.abc import Callable, Iterator

PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands", "Hundred thousands")
NAMES = ("Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Lin")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "stamps", "shells", "cards", "tickets")
BOXES = ("boxes", "bags", "baskets", "shelves", "rows", "crates")
HELD_OUT_PERIOD, TEST_TURNS, VALID_TURN = 32, (3, 17), 9
# (unit, larger unit, how many of the first make one of the second)
UNITS = (
    ("minutes", "hours", 60),
    ("days", "weeks", 7),
    ("cents", "dollars", 100),
    ("eggs", "dozens", 12),
)


def arithmetic_documents(split: str, num_chars: int, seed: int) -> list[str]:
    """Documents of four to nine problems each, `num_chars` characters in all (or just over)."""
    rng = random.Random(f"{split}-{seed}")
    documents: list[str] = []
    total = 0
    while total < num_chars:
        problems = [_draw_problem(rng, split) for _ in range(rng.randint(4, 9))]
        document = "\n\n".join(problems) + "\n"
        documents.append(document)
        total += len(document)
    return documents


def _draw_problem(rng: random.Random, split: str) -> str:
    while True:
        kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        identity, text = KINDS[kind][1](rng)
        digest = hashlib.sha256(f"{kind[:3]} {identity}".encode()).digest()
        turn = int.from_bytes(digest[:4]) % HELD_OUT_PERIOD
        drawn = "test" if turn in TEST_TURNS else "valid" if turn == VALID_TURN else "train"
        if drawn == split:
            return text


def _number(rng: random.Random, max_digits: int) -> int:
    digits = rng.randint(1, max_digits)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 2, 10**digits)


def _digits(value: int) -> list[int]:
    return [int(digit) for digit in reversed(str(value))]


def addition_steps(a: int, b: int) -> Iterator[str]:
    """Column addition from the ones upwards, each carry spelled out."""
    a_digits, b_digits, carry = _digits(a), _digits(b), 0
    for place in range(max(len(a_digits), len(b_digits))):
        digits = [d[place] for d in (a_digits, b_digits) if place < len(d)]
        total = sum(digits) + carry
        terms = [str(digit) for digit in digits] + ([f"{carry} carried"] if carry else [])
        carry = total // 10
        written = f"write {total % 10}, carry 1" if carry else f"write {total % 10}"
        yield f"{PLACES[place]}: {' + '.join(terms)} = {total}, {written}."
    if carry:
        yield "The last carry gives the leading 1."


def subtraction_steps(a: int, b: int) -> Iterator[str]:
    """Column subtraction of b <= a, each borrow spelled out."""
    a_digits, b_digits, borrow = _digits(a), _digits(b), 0
    for place, upper in enumerate(a_digits):
        lower = b_digits[place] if place < len(b_digits) else 0
        text = f"{PLACES[place]}: {upper}" + (" - 1 borrowed" if borrow else "") + f" - {lower}"
        value = upper - borrow - lower
        borrow = int(value < 0)
        if borrow:
            yield f"{text} is below 0, borrow 10, write {value + 10}."
        else:
            yield f"{text} = {value}, write {value}."


def multiplication_steps(a: int, b: int) -> Iterator[str]:
    """Partial products of a with each digit of b, then their running sum."""
    total = 0
    for place, digit in enumerate(_digits(b)):
        scale = 10**place
        part = a * digit * scale
        factor = digit if place == 0 else f"{digit * scale}"
        yield f"{a} * {factor} = {part}."
        if place:
            yield f"{total} + {part} = {total + part}."
        total += part


def _sum(rng: random.Random) -> tuple[object, str]:
    a, b = _number(rng, 5), _number(rng, 5)
    head = rng.choice([f"Question: {a} + {b} = ?", f"Question: What is {a} plus {b}?"])
    return (a, b), "\n".join([head, *addition_steps(a, b), f"Answer: {a + b}"])


def _sum_short(rng: random.Random) -> tuple[object, str]:
    a, b = _number(rng, 3), _number(rng, 3)
    return (a, b), f"{a} + {b} = {a + b}"


def _difference(rng: random.Random) -> tuple[object, str]:
    b, a = sorted((_number(rng, 5), _number(rng, 5)))
    head = rng.choice([f"Question: {a} - {b} = ?", f"Question: What is {a} minus {b}?"])
    return (a, b), "\n".join([head, *subtraction_steps(a, b), f"Answer: {a - b}"])


def _product(rng: random.Random) -> tuple[object, str]:
    a, b = _number(rng, 3), _number(rng, 2)
    head = rng.choice([f"Question: {a} * {b} = ?", f"Question: What is {a} times {b}?"])
    return (a, b), "\n".join([head, *multiplication_steps(a, b), f"Answer: {a * b}"])


def _quotient(rng: random.Random) -> tuple[object, str]:
    b, quotient = rng.randint(2, 12), _number(rng, 2)
    rest = rng.randrange(b)
    a = b * quotient + rest
    lines = [
        f"Question: Divide {a} by {b}.",
        f"{b} * {quotient} = {b * quotient}.",
        f"{a} - {b * quotient} = {rest}, which is less than {b}.",
        f"Answer: {quotient}" + (f" remainder {rest}" if rest else " exactly"),
    ]
    return (a, b), "\n".join(lines)


def _story_gain(rng: random.Random) -> tuple[object, str]:
    a, b, c = _number(rng, 3), _number(rng, 2), _number(rng, 2)
    c = min(c, a + b)
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    lines = [
        f"Question: {name} has {a} {thing}. {other} gives {name} {b} more, and then {name} loses "
        f"{c} of them. How many {thing} does {name} have now?",
        f"After the gift {name} has {a} + {b} = {a + b} {thing}.",
        f"After the loss {name} has {a + b} - {c} = {a + b - c} {thing}.",
        f"Answer: {a + b - c}",
    ]
    return (a, b, c), "\n".join(lines)


def _story_boxes(rng: random.Random) -> tuple[object, str]:
    a, b, c = rng.randint(2, 12), rng.randint(2, 40), _number(rng, 2)
    name, thing, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    lines = [
        f"Question: {name} fills {a} {box} with {b} {thing} each and keeps {c} {thing} aside. "
        f"How many {thing} are there in all?",
        f"The {box} hold {a} * {b} = {a * b} {thing}.",
        f"With the rest there are {a * b} + {c} = {a * b + c} {thing}.",
        f"Answer: {a * b + c}",
    ]
    return (a, b, c), "\n".join(lines)


def _units(rng: random.Random) -> tuple[object, str]:
    small, large, factor = rng.choice(UNITS)
    count = rng.randint(2, 60)
    lines = [
        f"Question: How many {small} are there in {count} {large}?",
        f"One of the {large} is {factor} {small}, so we multiply {count} by {factor}.",
        *multiplication_steps(factor, count),
        f"Answer: {count * factor} {small}",
    ]
    return (count, factor), "\n".join(lines)


def _series(rng: random.Random) -> tuple[object, str]:
    start, step = _number(rng, 2), rng.randint(2, 15)
    terms = [start + step * idx for idx in range(5)]
    lines = [
        f"Question: What comes next: {', '.join(map(str, terms[:4]))}?",
        f"{terms[1]} - {terms[0]} = {step}, so each number is {step} more than the one before.",
        f"{terms[3]} + {step} = {terms[4]}.",
        f"Answer: {terms[4]}",
    ]
    return (start, step), "\n".join(lines)


def _divisor(rng: random.Random) -> tuple[object, str]:
    a, b = rng.randint(10, 200), rng.randint(4, 99)
    lines = [f"Question: What is the greatest common divisor of {a} and {b}?"]
    x, y = max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    return (a, b), "\n".join([*lines, f"Answer: {x}"])


def _bracket(rng: random.Random) -> tuple[object, str]:
    a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 12)
    lines = [
        f"Question: ({a} + {b}) * {c} = ?",
        f"The bracket comes first: {a} + {b} = {a + b}.",
        f"Then {a + b} * {c} = {(a + b) * c}.",
        f"Answer: {(a + b) * c}",
    ]
    return (a, b, c), "\n".join(lines)


# Kind -> (how often, generator). The first three letters name the operation, so that the short
# and the long form of one sum fall into the same split.
KINDS: dict[str, tuple[int, Callable[[random.Random], tuple[object, str]]]] = {
    "sum long": (22, _sum),
    "sum short": (8, _sum_short),
    "difference": (18, _difference),
    "product": (16, _product),
    "quotient": (8, _quotient),
    "gain": (8, _story_gain),
    "boxes": (6, _story_boxes),
    "units": (5, _units),
    "series": (4, _series),
    "gcd": (6, _divisor),
    "bracket": (5, _bracket),
}
