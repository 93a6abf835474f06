"""Generated mathematics with worked answers: the part of the demo's target field that needs no files.

Two endless families, arithmetic drills and word problems, each a pure function of its seed. Every
equation that a solution states is true as written; the tests evaluate them one by one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple


class Problem(NamedTuple):
    """A question, the worked steps (one a line, in order) and the final answer."""

    question: str
    steps: list[str]
    answer: str


def _natural(rng: random.Random, digits: int) -> int:
    """A number of one to `digits` digits, small ones as likely as large ones."""
    return rng.randrange(2, 10 ** rng.randint(1, digits))


# Arithmetic drills


def _addition(rng: random.Random) -> Problem:
    a, b = _natural(rng, 5), _natural(rng, 5)
    steps, carry, place, rest = [], 0, 1, (a, b)
    while any(rest):
        x, y = rest[0] % 10, rest[1] % 10
        total = x + y + carry
        steps.append(f"{place}s: {x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry, place, rest = total // 10, place * 10, (rest[0] // 10, rest[1] // 10)
    return Problem(f"Work out {a} + {b}.", [*steps, f"So {a} + {b} = {a + b}."], str(a + b))


def _subtraction(rng: random.Random) -> Problem:
    a, b = sorted((_natural(rng, 5), _natural(rng, 5)), reverse=True)
    tens = b // 10 * 10
    steps = [
        f"Take away {tens} first: {a} - {tens} = {a - tens}.",
        f"Then take away {b - tens}: {a - tens} - {b - tens} = {a - b}.",
        f"Check: {a - b} + {b} = {a}.",
    ]
    return Problem(f"Work out {a} - {b}.", steps, str(a - b))


def _multiplication(rng: random.Random) -> Problem:
    a, b = rng.randrange(3, 200), rng.randrange(11, 100)
    tens, ones = b // 10 * 10, b % 10
    steps = [
        f"{b} = {tens} + {ones}.",
        f"{a} * {tens} = {a * tens}.",
        f"{a} * {ones} = {a * ones}.",
        f"{a * tens} + {a * ones} = {a * b}.",
    ]
    return Problem(f"Work out {a} * {b}.", steps, str(a * b))


def _division(rng: random.Random) -> Problem:
    divisor, number = rng.randrange(3, 30), rng.randrange(100, 9999)
    steps, rest = [], 0
    for digit in str(number):
        value = rest * 10 + int(digit)
        quotient, rest = divmod(value, divisor)
        steps.append(f"{value} = {divisor} * {quotient} + {rest}.")
    quotient = number // divisor
    steps.append(f"{number} = {divisor} * {quotient} + {rest}.")
    return Problem(f"Divide {number} by {divisor}.", steps, f"{quotient} remainder {rest}")


def _common_divisor(rng: random.Random) -> Problem:
    factor = rng.randrange(2, 40)
    a, b = factor * rng.randrange(2, 90), factor * rng.randrange(2, 90)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    steps.append(f"The last remainder that is not zero is {x}.")
    return Problem(f"Find the greatest common divisor of {a} and {b}.", steps, str(x))


def _fractions(rng: random.Random) -> Problem:
    a, b = (Fraction(rng.randrange(1, 12), rng.randrange(2, 13)) for _ in range(2))
    sign = rng.choice("+-")
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    common = math.lcm(a.denominator, b.denominator)
    x, y = int(a * common), int(b * common)
    result, top = (a + b, x + y) if sign == "+" else (a - b, x - y)
    steps = [
        f"The common denominator is {common}.",
        f"{a} = {x}/{common} and {b} = {y}/{common}.",
        f"{x}/{common} {sign} {y}/{common} = {top}/{common} = {result}.",
    ]
    return Problem(f"Simplify {a} {sign} {b}.", steps, str(result))


def _linear_equation(rng: random.Random) -> Problem:
    a, x, b = rng.randrange(2, 20), rng.randrange(1, 50), rng.randrange(1, 100)
    name = rng.choice("xyznt")
    total = a * x + b
    steps = [
        f"Subtract {b} from both sides: {a}*{name} = {total} - {b}, and {total} - {b} = {a * x}.",
        f"Divide by {a}: {name} = {a * x} / {a}, and {a * x} / {a} = {x}.",
        f"Check: {a} * {x} + {b} = {total}.",
    ]
    return Problem(f"Solve {a}*{name} + {b} = {total} for {name}.", steps, f"{name} = {x}")


def _percentage(rng: random.Random) -> Problem:
    percent, base = rng.choice((5, 10, 12, 15, 20, 25, 30, 40, 60, 75)), 20 * rng.randrange(2, 200)
    share = Fraction(percent * base, 100)
    steps = [f"{percent} % means {percent} / 100.", f"{base} * {percent} / 100 = {share}."]
    return Problem(f"What is {percent} % of {base}?", steps, str(share))


def _series(rng: random.Random) -> Problem:
    first, step, count = rng.randrange(1, 30), rng.randrange(2, 15), rng.randrange(5, 40)
    last = first + step * (count - 1)
    shown = ", ".join(str(first + step * i) for i in range(4))
    total = Fraction(count * (first + last), 2)
    steps = [
        f"Each term is {step} more than the one before.",
        f"The last term is {first} + {step} * ({count} - 1) = {last}.",
        f"The sum is {count} * ({first} + {last}) / 2 = {total}.",
    ]
    return Problem(f"Add the first {count} terms of {shown}, ...", steps, str(total))


def _brackets(rng: random.Random) -> Problem:
    a, b, c, d = (rng.randrange(2, 30) for _ in range(4))
    inner = a + b
    steps = [
        f"Brackets first: {a} + {b} = {inner}.",
        f"Then the product: {inner} * {c} = {inner * c}.",
        f"Then the difference: {inner * c} - {d} = {inner * c - d}.",
    ]
    return Problem(f"Evaluate ({a} + {b}) * {c} - {d}.", steps, str(inner * c - d))


def _prime_factors(rng: random.Random) -> Problem:
    number = rng.randrange(12, 2000)
    steps, rest, factors, p = [], number, [], 2
    while p * p <= rest:
        if rest % p:
            p += 1
            continue
        steps.append(f"{rest} / {p} = {rest // p}.")
        factors.append(p)
        rest //= p
    factors.append(rest)
    steps.append(f"{rest} is prime.")
    product = " * ".join(map(str, factors))
    return Problem(f"Write {number} as a product of primes.", [*steps, f"{product} = {number}."], product)


def _binary(rng: random.Random) -> Problem:
    number = rng.randrange(5, 600)
    steps, rest = [], number
    while rest:
        steps.append(f"{rest} = 2 * {rest // 2} + {rest % 2}.")
        rest //= 2
    return Problem(f"Write {number} in binary.", [*steps, "Read the remainders upwards."], f"{number:b}")


# Word problems

_PEOPLE = "Ada Ben Chen Dora Emil Fatima Goran Hana Ivan Jana Kofi Lena Mina Noor Omar Petra Rosa Sami Tara Yusuf"
_GOODS = "apples books candles eggs lemons marbles nails oranges pencils plums ribbons seeds shells stamps tiles"
_BOXES = "bags baskets boxes crates jars packets shelves trays"
_PLACES = "the market|the school|the harbour|the workshop|the library|the farm|the station|the garden"


def _pick(rng: random.Random, words: str) -> str:
    return rng.choice(words.split("|") if "|" in words else words.split())


def _boxes(rng: random.Random) -> Problem:
    who, goods, box, place = (_pick(rng, words) for words in (_PEOPLE, _GOODS, _BOXES, _PLACES))
    boxes, each = rng.randrange(3, 25), rng.randrange(4, 40)
    lost = rng.randrange(1, boxes * each // 2)
    question = (
        f"{who} brings {boxes} {box} to {place}. Each holds {each} {goods}. "
        f"On the way {lost} {goods} are lost. How many {goods} arrive?"
    )
    steps = [
        f"At first there are {boxes} * {each} = {boxes * each} {goods}.",
        f"After the loss there are {boxes * each} - {lost} = {boxes * each - lost} {goods}.",
    ]
    return Problem(question, steps, f"{boxes * each - lost} {goods}")


def _sharing(rng: random.Random) -> Problem:
    who, other, goods = _pick(rng, _PEOPLE), _pick(rng, _PEOPLE), _pick(rng, _GOODS)
    children, each, left = rng.randrange(3, 15), rng.randrange(3, 20), rng.randrange(0, 3)
    total = children * each + left
    question = (
        f"{who} and {other} have {total} {goods} and share them equally among {children} children. "
        f"How many does each child get, and how many are left over?"
    )
    steps = [f"{children} * {each} = {children * each}.", f"{total} - {children * each} = {left}."]
    return Problem(question, steps, f"each child gets {each}, and {left} are left over")


def _shopping(rng: random.Random) -> Problem:
    who, first, second = _pick(rng, _PEOPLE), _pick(rng, _GOODS), _pick(rng, _GOODS)
    n, m, p, q = rng.randrange(2, 12), rng.randrange(2, 12), rng.randrange(2, 30), rng.randrange(2, 30)
    cost = n * p + m * q
    paid = -(-cost // 50) * 50
    question = (
        f"{who} buys {n} {first} at {p} cents each and {m} {second} at {q} cents each, "
        f"and pays with {paid} cents. How much change does {who} get?"
    )
    steps = [
        f"The {first} cost {n} * {p} = {n * p} cents.",
        f"The {second} cost {m} * {q} = {m * q} cents.",
        f"Together that is {n * p} + {m * q} = {cost} cents.",
        f"The change is {paid} - {cost} = {paid - cost} cents.",
    ]
    return Problem(question, steps, f"{paid - cost} cents")


def _journey(rng: random.Random) -> Problem:
    who, place = _pick(rng, _PEOPLE), _pick(rng, _PLACES)
    speed, hours, vehicle = rng.randrange(4, 90), rng.randrange(2, 9), _pick(rng, "bus cart train truck van")
    distance = speed * hours
    if rng.random() < 0.5:
        question = f"A {vehicle} takes {who} to {place} at {speed} km an hour for {hours} hours. How far is it?"
        return Problem(question, [f"The distance is {speed} * {hours} = {distance} km."], f"{distance} km")
    question = f"It is {distance} km to {place}. {who}'s {vehicle} does {speed} km an hour. How long does it take?"
    return Problem(question, [f"The time is {distance} / {speed} = {hours} hours."], f"{hours} hours")


def _ages(rng: random.Random) -> Problem:
    who, other = rng.sample(_PEOPLE.split(), 2)
    age, factor, years = rng.randrange(4, 20), rng.randrange(2, 5), rng.randrange(2, 15)
    question = (
        f"{who} is {age} years old. {other} is {factor} times as old. "
        f"How old will {other} be in {years} years, and what will their ages add up to?"
    )
    steps = [
        f"{other} is {factor} * {age} = {factor * age} now.",
        f"In {years} years {other} will be {factor * age} + {years} = {factor * age + years}.",
        f"{who} will be {age} + {years} = {age + years}.",
        f"Together: {factor * age + years} + {age + years} = {factor * age + age + 2 * years}.",
    ]
    return Problem(question, steps, f"{factor * age + years} years; {factor * age + age + 2 * years} in all")


def _area(rng: random.Random) -> Problem:
    who, thing = _pick(rng, _PEOPLE), _pick(rng, "field|garden|floor|wall|roof|courtyard")
    width, length, price = rng.randrange(3, 40), rng.randrange(3, 60), rng.randrange(2, 12)
    area = width * length
    question = (
        f"The {thing} that {who} wants to cover is {length} m long and {width} m wide. "
        f"A square metre costs {price} coins. What does the whole {thing} cost, and how long is its edge?"
    )
    steps = [
        f"The area is {length} * {width} = {area} square metres.",
        f"The cost is {area} * {price} = {area * price} coins.",
        f"The edge is 2 * ({length} + {width}) = {2 * (length + width)} m.",
    ]
    return Problem(question, steps, f"{area * price} coins, and {2 * (length + width)} m")


def _saving(rng: random.Random) -> Problem:
    who, goal = _pick(rng, _PEOPLE), _pick(rng, "bicycle|guitar|kite|lamp|telescope|tent|boat|clock")
    start, weekly, weeks = rng.randrange(0, 60), rng.randrange(3, 25), rng.randrange(3, 30)
    price = start + weekly * weeks
    question = (
        f"{who} has {start} coins and saves {weekly} more each week. The {goal} costs {price} coins. "
        f"After how many weeks can {who} buy the {goal}?"
    )
    steps = [
        f"{who} still needs {price} - {start} = {price - start} coins.",
        f"That takes {price - start} / {weekly} = {weeks} weeks.",
    ]
    return Problem(question, steps, f"{weeks} weeks")


def _workers(rng: random.Random) -> Problem:
    job = _pick(rng, "paint a fence|build a wall|dig a ditch|mend a roof|sort the mail|load a ship")
    workers, days, more = rng.randrange(2, 10), rng.randrange(2, 15), rng.randrange(2, 5)
    work = workers * days * more
    question = f"{workers} workers need {days * more} days to {job}. How long do {workers * more} workers need?"
    steps = [
        f"The job is {workers} * {days * more} = {work} days of work.",
        f"{workers} * {more} = {workers * more}, and {work} / {workers * more} = {days}.",
    ]
    return Problem(question, steps, f"{days} days")


def _average(rng: random.Random) -> Problem:
    who, goods, count = _pick(rng, _PEOPLE), _pick(rng, _GOODS), rng.randrange(3, 7)
    values = [rng.randrange(5, 80) for _ in range(count - 1)]
    values.append(rng.randrange(5, 40) * count - sum(values) % count)
    total = sum(values)
    question = f"{who} counts the {goods} sold on {count} days: {', '.join(map(str, values))}. What is the average?"
    steps = [
        f"The sum is {' + '.join(map(str, values))} = {total}.",
        f"The average is {total} / {count} = {total // count}.",
    ]
    return Problem(question, steps, f"{total // count} {goods} a day")


def _compare(rng: random.Random) -> Problem:
    (who, other), goods = rng.sample(_PEOPLE.split(), 2), _pick(rng, _GOODS)
    have, more = rng.randrange(5, 90), rng.randrange(2, 60)
    given = rng.randrange(1, have)
    question = (
        f"{who} has {have} {goods}, and {other} has {more} more than {who}. "
        f"{who} gives {given} {goods} to {other}. How many more does {other} have now?"
    )
    steps = [
        f"{other} starts with {have} + {more} = {have + more} {goods}.",
        f"After the gift {who} has {have} - {given} = {have - given}.",
        f"{other} has {have + more} + {given} = {have + more + given}.",
        f"The difference is {have + more + given} - {have - given} = {more + 2 * given}.",
    ]
    return Problem(question, steps, f"{more + 2 * given} {goods}")


_FAMILIES: dict[str, tuple[Callable[[random.Random], Problem], ...]] = {
    "arithmetic": (
        _addition,
        _subtraction,
        _multiplication,
        _division,
        _common_divisor,
        _fractions,
        _linear_equation,
        _percentage,
        _series,
        _brackets,
        _prime_factors,
        _binary,
    ),
    "word_problems": (
        _boxes,
        _sharing,
        _shopping,
        _journey,
        _ages,
        _area,
        _saving,
        _workers,
        _average,
        _compare,
    ),
}
_LAYOUTS = (("Problem {n}. ", "Solution. ", "Answer: "), ("Q{n}: ", "A: ", "Result: "), ("{n}) ", "", "= "))


def documents(family: str, seed: int) -> Iterator[str]:
    """Endless documents of about 1 kB, each 3 to 9 problems in one layout.

    family: "arithmetic" or "word_problems". The same family and seed give the same documents.
    """
    rng = random.Random(f"{family} {seed}")
    while True:
        kinds = rng.sample(_FAMILIES[family], rng.randint(1, 3))
        layout = rng.choice(_LAYOUTS)
        yield "\n\n".join(_typeset(rng.choice(kinds)(rng), n, layout) for n in range(1, rng.randint(3, 9) + 1))


def _typeset(problem: Problem, number: int, layout: tuple[str, str, str]) -> str:
    question, solution, answer = layout
    lines = [question.format(n=number) + problem.question, solution + "\n".join(problem.steps)]
    return "\n".join([*lines, answer + problem.answer])
