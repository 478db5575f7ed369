"""Write ``train.jsonl`` and ``heldout.jsonl``: small arithmetic word problems with worked answers.

Run ``python examples/word_problems/generate.py``. The output depends on ``SEED`` alone, so a second run writes the same
bytes. Each row has a ``question`` and an ``answer``; the answer works the problem step by step and ends in ``#### N``.

All numbers are whole and lie between 2 and 199 (so a plural is always right), and divisions come out even; ``check``
asserts it for every row. No two rows, in one file or across both, share a template and all its equations, so a held-out
problem is never a training problem with another name in it.
"""

from __future__ import annotations

import json
import operator
import random
import re
from collections.abc import Callable
from pathlib import Path

SEED = 20
N_TRAIN, N_HELDOUT = 480, 64
MAX_QUESTION_WORDS, MAX_ANSWER_WORDS = 45, 40
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# One block a template: name | phrasings of the question ... | answer. In the answer, "{a} * {b} = {c}" also defines c.
TEXTS = """
refill | {who} has {old} {items} and buys {n} {packs} of {each} {items}. How many {items} does {who} have now?
| There are {old} {items} in a storeroom. {who} brings in {n} more {packs}, each with {each} {items} inside. How many
{items} are there altogether?
| The {n} {packs} hold {n} * {each} = {new} {items}. With the {old} {items} from before, there are {new} + {old} = {end}
{items}.

change | {who} buys {n} {goods} at {price} dollars each and {extra} for {more} dollars. {who} pays with a {note}-dollar
note. How many dollars of change does {who} get?
| At a market, {goods} cost {price} dollars each. {who} takes {n} of them, adds {extra} for {more} dollars and hands
over a {note}-dollar note. How much change, in dollars, is due?
| The {goods} cost {n} * {price} = {cost} dollars. With {extra}, the total is {cost} + {more} = {total} dollars. The
change is {note} - {total} = {end} dollars.

sharing | {who} has {total} {things}. {who} keeps {kept} of them and shares the rest equally among {n} {others}. How
many {things} does each of the {others} get?
| Out of {total} {things}, {who} sets {kept} aside and deals out all the others to {n} {others}, the same number to
each. How many {things} does each one receive?
| After {kept} are kept, {total} - {kept} = {rest} {things} are left to share. Each of the {n} {others} gets
{rest} / {n} = {end} {things}.

speed | A {vehicle} covers {way} kilometers in {n} hours at a steady speed. How many kilometers does the {vehicle}
travel in one hour?
| Two towns are {way} kilometers apart. A {vehicle} goes from one to the other in {n} hours without changing its speed.
What is the speed of the {vehicle} in kilometers per hour?
| The {vehicle} takes {n} hours for {way} kilometers, so in one hour the {vehicle} travels {way} / {n} = {end}
kilometers.

trip | {who} cycles for {h1} hours at {v1} kilometers per hour and then walks for {h2} hours at {v2} kilometers per
hour. How many kilometers does {who} travel in all?
| On a trip, {who} first rides a bicycle at {v1} kilometers per hour for {h1} hours, then walks at {v2} kilometers per
hour for {h2} hours. How many kilometers long is the trip?
| The bicycle ride is {h1} * {v1} = {d1} kilometers. The walk is {h2} * {v2} = {d2} kilometers. The whole trip is
{d1} + {d2} = {end} kilometers.

fraction | There are {total} {people} {place}. Exactly {share} of the {people} {some}, and the others {differ}. How many
{people} {differ}?
| Of the {total} {people} {place}, {share} {some} and all the rest {differ}. How many of the {people} {differ}?
| One {part} of the {people} is {total} / {bottom} = {unit}. So {unit} * {top} = {taken} {people} {some}. The other
{total} - {taken} = {end} {people} {differ}.

saving | {who} wants to buy {wish} for {price} dollars. {who} already has {saved} dollars and saves {weekly} dollars
every week. After how many weeks can {who} pay for it?
| The price of {wish} is {price} dollars. {who} has {saved} dollars and puts {weekly} dollars aside each week. How many
weeks does it take {who} to reach the price?
| {who} still needs {price} - {saved} = {missing} dollars. At {weekly} dollars a week, that takes
{missing} / {weekly} = {end} weeks.

ages | {x} is {age} years old. {y} is {k} times as old as {x}, and {z} is {gap} years younger than {y}. How old will {z}
be in {years} years?
| {z} is {gap} years younger than {y}, who is {k} times as old as {x}. {x} is {age} years old today. How old will {z} be
{years} years from now?
| {y} is {age} * {k} = {old} years old. {z} is {old} - {gap} = {now} years old. In {years} years, {z} will be
{now} + {years} = {end} years old.

fence | A rectangular {plot} is {long} meters long, and its width is {gap} meters less than its length. {who} puts a
fence all the way around it. How many meters of fence does {who} need?
| {who} walks once around the edge of a rectangular {plot}. The long sides measure {long} meters each, and the short
sides are {gap} meters shorter. How many meters does {who} walk?
| The width is {long} - {gap} = {wide} meters. One length and one width make {long} + {wide} = {half} meters. All the
way around is {half} * 2 = {end} meters.

coverage | A rectangular {surface} is {long} meters long and {wide} meters {across}. One {tin} covers {covers} square
meters. How many {tins} does {who} need to cover the whole {surface}?
| {who} needs one {tin} for every {covers} square meters of {surface}. The {surface} is a rectangle, {long} meters long
and {wide} meters {across}. How many {tins} should {who} buy?
| The area of the {surface} is {long} * {wide} = {area} square meters. So {who} needs {area} / {covers} = {end} {tins}.

price | A shop sells {n} {goods} for {paid} dollars. At the same price for each one, how many dollars does {who} pay for
{m} {goods}?
| {who} paid {paid} dollars for {n} {goods} last week. All the {goods} have the same price. How many dollars would {m}
{goods} cost?
| Each one costs {paid} / {n} = {each} dollars. So {m} {goods} cost {m} * {each} = {end} dollars.

stock | A shop has {start} {wares} in stock. The shop sells {a} on Monday and {b} on Tuesday, and on Wednesday {c} new
ones are delivered. How many {wares} does the shop have now?
| A store opens with {start} {wares}. It sells {a} of them in the morning and {b} in the afternoon, and then receives
{c} more. How many {wares} are in the store at the end?
| After the first sales, {start} - {a} = {left} {wares} are left. After the next sales, {left} - {b} = {rest} are left.
With the delivery, there are {rest} + {c} = {end} {wares}.

teamwork | {x} can {verb} {a} {tasks} in an hour, and {y} can {verb} {b} in an hour. If {x} and {y} work together, how
many hours do they need to {verb} {total} {tasks}?
| {x} and {y} have to {verb} {total} {tasks}. Every hour {x} can {verb} {a} and {y} can {verb} {b}. How many hours does
the whole job take?
| Together {x} and {y} {verb} {a} + {b} = {both} {tasks} in an hour. For {total} {tasks} they need
{total} / {both} = {end} hours.

backwards | {x} gives half of a collection of {things} to {y} and then {given} more {things} to {z}. Now {x} has {left}
left. How many {things} did {x} have at first?
| {x} has {left} {things} left after two gifts: first half of all the {things} to {y}, then {given} to {z}. How many
{things} did {x} start with?
| Before the gift to {z}, {x} had {left} + {given} = {half} {things}. That was half, so {x} started with
{half} * 2 = {end} {things}.
"""

WORDS = {  # a key with slashes fills several fields from one choice
    "things": ["marbles", "stickers", "stamps", "shells", "postcards", "beads", "trading cards", "buttons", "badges"],
    "wares": ["lamps", "umbrellas", "notebooks", "scarves", "candles", "kettles", "baskets", "cushions", "teapots"],
    "goods": ["mugs", "plates", "melons", "notebooks", "pies", "pineapples", "paintbrushes", "flower pots", "puzzles"],
    "extra": ["a magazine", "a sandwich", "a calendar", "a map", "a jar of honey", "a bunch of roses", "a salad"],
    "wish": ["a skateboard", "a warm jacket", "a sleeping bag", "a tennis racket", "a suitcase", "a small drone"],
    "plot": ["garden", "paddock", "playground", "vegetable patch", "dog park", "sheep pen"],
    "others": ["friends", "cousins", "classmates"],
    "vehicle": ["train", "bus", "coach", "van", "delivery truck"],
    "verb/tasks": ["fold/paper cranes", "wrap/gifts", "paint/tiles", "pack/parcels", "plant/bulbs"],
    "packs/items": ["boxes/pencils", "packs/markers", "cartons/eggs", "bags/oranges", "crates/bottles"],
    "place/people/some/differ": [
        "at a summer camp/children/sleep in tents/sleep in cabins",
        "in a choir/singers/wear blue/wear green",
        "in a sports club/players/train on Monday/train on Friday",
        "in a hotel/guests/order soup/order salad",
        "in a workshop/workers/start early/start late",
        "in an orchard/trees/bear apples/bear pears",
        "in a marina/boats/have sails/have motors",
    ],
    "share/part/top/bottom": [
        *("two thirds/third/2/3", "three quarters/quarter/3/4", "two fifths/fifth/2/5", "three fifths/fifth/3/5"),
        *("four fifths/fifth/4/5", "five sixths/sixth/5/6", "three eighths/eighth/3/8", "five eighths/eighth/5/8"),
    ],
    "surface/across/tin/tins": [
        "wall/high/tin of paint/tins of paint",
        "floor/wide/pack of tiles/packs of tiles",
        "lawn/wide/bag of grass seed/bags of grass seed",
    ],
}
PEOPLE = """Mia Noah Aisha Leo Priya Omar Sofia Kenji Ines Tom Zara Lukas Nadia Felix Chloe Ravi Elena Samuel Yara Hugo
Grace Mateo Linh Oscar Amara Daniel Freya Idris Jonas Keiko Lucia Malik Nora Pavel Rosa Theo Uma Viktor Emil"""

# The given numbers of each template; r(a, b) draws one from a to b. ``solve`` turns down any that do not divide evenly.
NUMBERS: dict[str, Callable[[Callable[[int, int], int]], dict[str, int]]] = {
    "refill": lambda r: {"n": r(3, 9), "each": r(4, 12), "old": r(3, 30)},
    "change": lambda r: {"n": r(2, 8), "price": r(2, 9), "more": r(3, 12), "note": 50 * r(1, 2)},
    "sharing": lambda r: {"n": (n := r(2, 9)), "kept": (kept := r(2, 30)), "total": n * r(3, 16) + kept},
    "speed": lambda r: {"n": (n := r(2, 5)), "way": n * r(24, min(95, 199 // n))},
    "trip": lambda r: {"h1": r(2, 5), "v1": r(9, 20), "h2": r(2, 5), "v2": r(3, 6)},
    "fraction": lambda r: {"total": r(12, 99)},
    "saving": lambda r: {"weekly": (w := r(5, 12)), "saved": (s := r(12, 50)), "price": w * r(4, 12) + s},
    "ages": lambda r: {"age": r(4, 12), "k": r(3, 5), "gap": r(2, 9), "years": r(2, 12)},
    "fence": lambda r: {"gap": (gap := r(2, 15)), "long": gap + r(6, 35)},
    "coverage": lambda r: {"wide": r(3, 9), "long": r(10, 20), "covers": r(3, 20)},
    "price": lambda r: {"n": (n := r(2, 8)), "paid": n * r(2, 12), "m": n + r(1, 8)},
    "stock": lambda r: {"start": r(60, 150), "a": r(8, 28), "b": r(8, 28), "c": r(6, 45)},
    "teamwork": lambda r: {"a": (a := r(4, 15)), "b": (b := r(4, 15)), "total": (a + b) * r(2, 6)},
    "backwards": lambda r: {"given": r(2, 40), "left": r(3, 40)},
}


def draw_words(rng: random.Random) -> dict[str, int | str]:
    """One choice for every word field."""
    fields: dict[str, int | str] = dict(zip(("who", "x", "y", "z"), rng.sample(PEOPLE.split(), 4), strict=True))
    for keys, choices in WORDS.items():
        fields.update(zip(keys.split("/"), rng.choice(choices).split("/"), strict=True))
    return fields


def solve(answer: str, fields: dict[str, int | str]) -> int | None:
    """Add to ``fields`` what the equations of an answer define; return the last value, None if one is unsuitable."""
    value = None
    for left, sign, right, target in re.findall(r"(\S+) ([-+*/]) (\S+) = {(\w+)}", answer):
        a, b = int(left.format_map(fields)), int(right.format_map(fields))
        fields[target] = value = OPERATORS[sign](a, b)
        if not 2 <= value < 200 or (sign == "/" and a % b):
            return None
    return value


def check(question: str, answer: str, result: int) -> tuple[tuple[str, ...], ...]:
    """Assert that a finished row is sound, from its text alone, and return its equations."""
    work, final = answer.split("\n#### ")
    equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", work)
    assert 0 < len(equations) == work.count("="), answer
    for left, sign, right, value in equations:
        assert OPERATORS[sign](int(left), int(right)) == int(value), answer
        assert sign != "/" or int(left) % int(right) == 0, answer
    assert int(final) == int(equations[-1][-1]) == result, answer
    assert all(2 <= int(number) < 200 for number in re.findall(r"-?\d+", question + answer)), answer
    assert len(question.split()) <= MAX_QUESTION_WORDS, question
    assert len(answer.split()) <= MAX_ANSWER_WORDS, answer
    return tuple(equations)


def generate(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training rows and the held-out rows; the templates take turns, so both have all of them."""
    rng = random.Random(seed)
    templates = [[" ".join(part.split()) for part in block.split("|")] for block in TEXTS.split("\n\n")]
    rows: list[dict[str, str]] = []
    seen = set()
    while len(rows) < N_HELDOUT + N_TRAIN:
        name, *questions, answer = templates[len(rows) % len(templates)]
        fields = draw_words(rng) | NUMBERS[name](rng.randint)
        result = solve(answer, fields)
        if result is None:
            continue
        question, answer = rng.choice(questions).format_map(fields), f"{answer}\n#### {result}".format_map(fields)
        key = (name, check(question, answer, result))
        if key not in seen:
            seen.add(key)
            rows.append({"question": question, "answer": answer})
    assert len({row["question"] for row in rows}) == len(rows)
    heldout, train = rows[:N_HELDOUT], rows[N_HELDOUT:]
    rng.shuffle(heldout)
    rng.shuffle(train)
    return train, heldout


def main() -> None:
    for name, rows in zip(("train", "heldout"), generate(), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(__file__).with_name(f"{name}.jsonl").write_bytes(text.encode())


if __name__ == "__main__":
    main()
