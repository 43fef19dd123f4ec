"""Word problems as data: sentences with places for numbers and words, and the expression that answers them.

A number is a letter: drawn, or made of drawn ones where `made` says so, which is how quotients come out whole. A number
that is in the text but not in the expression does not matter for the answer. All numbers are 2 or more, so that what is
counted is in the plural. Words are fields of `KINDS` and of people: A, B, and He, he, his, him of A.
"""

from typing import NamedTuple

__all__ = ["HER", "HIM", "KINDS", "NAMES", "TEMPLATES", "Template"]


class Template(NamedTuple):
    """One kind of problem."""

    expression: str  # of + - * / % and letters; as many operations as steps
    text: str
    made: tuple[tuple[str, str], ...] = ()  # (letter, expression of drawn letters)


HER = {"He": "She", "he": "she", "his": "her", "him": "her"}
HIM = {x: x for x in HER}
NAMES = (
    *((name, HER) for name in ("Anna", "Clara", "Fatima", "Grace", "Hana", "Ines", "Lucy", "Maria", "Nora", "Priya",
                               "Ruth", "Sofia", "Tessa", "Yuki", "Zoe")),
    *((name, HIM) for name in ("Adam", "Ben", "Carlos", "David", "Emil", "George", "Hugo", "Ivan", "Kofi", "Leo",
                               "Martin", "Omar", "Peter", "Ravi", "Tom")),
)  # fmt: skip

# {(singular, plural): words}; a field with 2 at its end is another word of the same kind. None begins with a vowel
# where a template says "a" before it (box, vehicle, place).
KINDS = {
    ("thing", "things"): (
        ("marble", "marbles"), ("sticker", "stickers"), ("pencil", "pencils"), ("shell", "shells"),
        ("button", "buttons"), ("bead", "beads"), ("stamp", "stamps"), ("crayon", "crayons"), ("balloon", "balloons"),
        ("toy car", "toy cars"), ("book", "books"), ("candle", "candles"), ("postcard", "postcards"),
        ("eraser", "erasers"), ("notebook", "notebooks"), ("tennis ball", "tennis balls"), ("ribbon", "ribbons"),
        ("paper clip", "paper clips"), ("magnet", "magnets"), ("puzzle", "puzzles"),
    ),
    ("fruit", "fruits"): (
        ("apple", "apples"), ("pear", "pears"), ("peach", "peaches"), ("plum", "plums"), ("lemon", "lemons"),
        ("orange", "oranges"), ("cherry", "cherries"), ("strawberry", "strawberries"), ("mango", "mangoes"),
    ),
    ("cake", "cakes"): (
        ("cookie", "cookies"), ("muffin", "muffins"), ("pancake", "pancakes"), ("pie", "pies"), ("bun", "buns"),
        ("waffle", "waffles"), ("loaf of bread", "loaves of bread"),
    ),
    ("box", "boxes"): (
        ("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("crate", "crates"), ("bucket", "buckets"),
        ("sack", "sacks"),
    ),
    ("animal", "animals"): (
        ("cow", "cows"), ("sheep", "sheep"), ("goat", "goats"), ("goose", "geese"), ("horse", "horses"),
        ("duck", "ducks"), ("rabbit", "rabbits"),
    ),
    ("vehicle", "vehicles"): (("bus", "buses"), ("train", "trains"), ("ferry", "ferries"), ("tram", "trams")),
    ("place", "places"): (
        ("museum", "museums"), ("zoo", "zoos"), ("library", "libraries"), ("theater", "theaters"),
        ("castle", "castles"), ("school", "schools"),
    ),
}  # fmt: skip

T_IS_PRODUCT = (("t", "b * q"),)

TEMPLATES = (
    # One step: something changes.
    Template("a - b", "{A} had {a} {things}. {He} gave {b} of them to {B}. How many {things} does {A} have now?"),
    Template("a + b", "{A} has {a} {things}, and {B} gives {him} {b} more. How many {things} does {A} have then?"),
    Template("a - b", "{A} wants to read {a} pages this week. So far {he} has read {b} pages. "
             "How many pages are left to read?"),
    Template("a - b", "There were {a} pigeons on the roof of a {place}. After some of them flew away, {b} were still "
             "there. How many pigeons flew away?"),
    Template("a - b", "After {A} was given {b} {things} for {his} birthday, {he} had {a} of them. "
             "How many {things} did {A} have before?"),
    Template("a - b", "{A} had {a} {things} and {c} {things2}. {He} lost {b} of the {things}. "
             "How many {things} does {he} still have?"),
    # Parts and a whole.
    Template("a + b", "The {place} had {a} visitors on Saturday and {b} visitors on Sunday. "
             "How many visitors came on the two days together?"),
    Template("a + b", "During {c} days of holidays, {a} adults and {b} children came to the {place}. "
             "How many people came?"),
    Template("a - b", "Of the {a} {animals} on a farm, {b} are brown and the others are white. "
             "How many white {animals} are there?"),
    # Comparison.
    Template("a - b", "{A} picked {a} {fruits} and {B} picked {b}. How many more {fruits} did {A} pick than {B}?"),
    Template("a - b", "The red team scored {a} points, and the blue team scored {b}. "
             "By how many points did the red team win?"),
    Template("a + b", "{A} has {a} {things}. {B} has {b} more {things} than {A}. How many {things} does {B} have?"),
    Template("a - b", "{A} has {a} {things}, which is {b} more than {B} has. How many {things} does {B} have?"),
    Template("a - b", "{A} has {a} {things} and {c} {things2}, while {B} has {b} {things}. "
             "How many more {things} does {A} have than {B}?"),
    Template("a * b", "{A} baked {a} {cakes}, and {B} baked {b} times as many. How many {cakes} did {B} bake?"),
    # Equal groups, prices, rates.
    Template("a * b", "There are {a} {boxes} in a storeroom, and each {box} holds {b} {things}. "
             "How many {things} are there in all?"),
    Template("a * b", "{A} buys {a} {things}. Each one costs {b} dollars. How many dollars does {he} pay?"),
    Template("a * b", "A machine makes {a} {things} every minute. How many {things} does it make in {b} minutes?"),
    Template("a * b", "A farmer has {c} {animals} and {a} fields. There are {b} trees in every field. "
             "How many trees does the farmer have?"),
    Template("t / b", "{A} shares {t} {things} equally among {b} friends. How many {things} does each friend get?",
             T_IS_PRODUCT),
    Template("t / b", "{A} puts {t} {fruits} into {boxes}, {b} in each. How many {boxes} does {he} need?",
             T_IS_PRODUCT),
    Template("t / b", "A {vehicle} traveled {t} miles in {b} hours, always at the same speed. "
             "How many miles did it travel each hour?", T_IS_PRODUCT),
    Template("t / b", "{A} made {t} sandwiches and {c} {cakes} for a party. The sandwiches are divided equally among "
             "{b} tables. How many sandwiches are on each table?", T_IS_PRODUCT),
    Template("a % b", "{A} packs {a} {things} into {boxes}, {b} in each, and fills as many {boxes} as {he} can. "
             "How many {things} are left over?"),
    # Two steps: sums and differences.
    Template("a - b + c", "{A} had {a} {things}. {He} gave {b} of them to {B} and then bought {c} new ones. "
             "How many {things} does {A} have now?"),
    Template("a + b - c", "A bakery made {a} {cakes} in the morning and {b} {cakes} in the afternoon. By the evening "
             "it had sold {c} of them. How many {cakes} were left?"),
    Template("a - b - c", "There were {a} people on a {vehicle}. At the first stop {b} of them got off, and at the "
             "second stop {c} got off. Nobody got on. How many people were still on the {vehicle}?"),
    Template("a + b + c", "{A} found {a} shells on Friday, {b} shells on Saturday and {c} shells on Sunday. "
             "How many shells did {he} find in the three days?"),
    Template("a - (b + c)", "{A} is saving for a bike that costs {a} dollars. {He} saved {b} dollars in May and {c} "
             "dollars in June. How many more dollars does {he} need?"),
    Template("a + (a + b)", "{A} has {a} {things}. {B} has {b} more {things} than {A}. "
             "How many {things} do they have together?"),
    Template("a + b - c", "A farm had {a} {animals} and {d} dogs. In spring {b} more {animals} were born, and in "
             "summer {c} {animals} were sold. How many {animals} does the farm have now?"),
    # Two steps with a product.
    Template("a * b + c", "{A} bought {a} {boxes} with {b} {things} in each. At home {he} already had {c} {things}. "
             "How many {things} does {A} have now?"),
    Template("a * b - c", "{A} filled {a} {boxes} with {b} {fruits} each. Later {he} threw {c} of the {fruits} away "
             "because they were bad. How many good {fruits} were left?"),
    Template("a + b * c", "{A} pays {a} dollars for a ticket to the {place} and buys {b} {things} there for {c} "
             "dollars each. How many dollars does {he} spend?"),
    Template("t - b * c", "{A} has {t} dollars and buys {b} {things} that cost {c} dollars each. "
             "How many dollars does {he} have left?", (("t", "b * c + q"),)),
    Template("t - b * c", "{A} has {t} {things}. {He} fills {b} {boxes} with {c} {things} each. "
             "How many {things} are left over?", (("t", "b * c + q"),)),
    Template("(a + b) * c", "{a} adults and {b} children visit the {place}. Everyone pays {c} dollars to get in. "
             "How many dollars do they pay in all?"),
    Template("(a - b) * c", "{A} picked {a} {fruits} and kept {b} for {his} family. {He} sold the rest for {c} dollars "
             "each. How many dollars did {A} get?"),
    Template("a + a * b", "{A} has {a} {things}, and {B} has {b} times as many. "
             "How many {things} do they have altogether?"),
    Template("a * b - a", "{A} has {a} {things}, and {B} has {b} times as many. "
             "How many more {things} does {B} have than {A}?"),
    Template("a * b - c", "{A} worked for {a} hours and was paid {b} dollars an hour. {He} then spent {c} dollars on a "
             "gift for {B}. How many dollars were left?"),
    Template("a * b + c", "The {place} has {a} rooms with {b} chairs in each room, and {c} chairs in the yard. It also "
             "has {d} tables. How many chairs does the {place} have?"),
    # Two steps with a quotient.
    Template("(a + b) / c", "{A} has {a} red {things} and {b} blue {things}. {He} puts all of them into {c} {boxes}, "
             "the same number in each. How many {things} are in each {box}?", (("a", "c * q - b"),)),
    Template("(t - b) / c", "{A} had {t} {things}. {He} kept {b} and shared the rest equally among {c} friends. "
             "How many {things} did each friend get?", (("t", "c * q + b"),)),
    Template("t / b + c", "{A} shares {t} {things} equally among {b} friends. {B}, who is one of these friends, had "
             "{c} {things} before. How many {things} does {B} have now?", T_IS_PRODUCT),
    Template("t / b - c", "{A} divided {t} {fruits} equally among {b} {boxes}, and then took {c} {fruits} out of one "
             "{box}. How many {fruits} were left in that {box}?", T_IS_PRODUCT),
    Template("t / b * c", "{A} paid {t} dollars for {b} {things} of the same price. "
             "How many dollars would {he} pay for {c} of these {things}?", T_IS_PRODUCT),
)  # fmt: skip
