"""Write the corpus of `nlg_e2e.py`: what is to be said of places, and how it is said.

The form is that of the E2E challenge, a meaning representation and a reference a row,
several rows a representation; the places and the sentences are the project's own, drawn
from the small grammar below. There are two domains: places to eat, which the tiny model
knows, and places to stay, of which it has read texts but never what they are made from.

    python examples/make_places.py --output DIR        # the files of assets/places
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import random
from collections.abc import Iterator
from pathlib import Path

Meaning = dict[str, str]

# fmt: off
AREAS = ["old town", "harbour", "north bank", "station quarter", "upper village"]
LANDMARKS = [
    "Linden Park", "the Clock Tower", "the Tram Depot", "Saint Anne's Bridge",
    "the Maritime Museum", "Miller's Market", "the Botanical Garden"]
FIRST = [
    "Copper", "Blue", "Silver", "Quiet", "Crooked", "Golden", "Merry", "Old", "Red",
    "Wandering", "Little", "Green", "Hungry", "Painted", "Broken", "Early", "Last",
    "Humble", "Winter", "Velvet", "Rolling", "Sleepy", "Iron", "White"]
EAT = [
    "Kettle", "Anchor", "Spoon", "Lantern", "Pear", "Heron", "Plough", "Sparrow",
    "Barrel", "Teapot", "Oven", "Walnut", "Fiddle", "Compass", "Pepper", "Tulip",
    "Badger", "Bell"]
STAY = [
    "Pillow", "Harbour View", "Mill House", "Otter", "Fir Tree", "Gatehouse", "Tide",
    "Lighthouse", "Feather", "Orchard", "Swan", "Crescent", "Boathouse", "Meadow",
    "Harvest Moon", "Nightingale"]
# fmt: on
STARS = {"2": "two", "3": "three", "4": "four", "5": "five"}

VALUES: dict[str, dict[str, list[str]]] = {
    "eat": {
        "kind": ["café", "pub", "tea room", "bakery", "diner", "canteen"],
        "food": ["Basque", "Greek", "Korean", "Lebanese", "Polish", "vegan"],
        "price": ["low", "moderate", "high"],
        "area": AREAS,
        "near": LANDMARKS,
    },
    "stay": {
        "kind": ["hotel", "hostel", "guest house", "campsite", "lodge"],
        "stars": list(STARS),
        "night": ["25 euros", "40 euros", "75 euros", "120 euros"],
        "breakfast": ["yes", "no"],
        "pets": ["yes", "no"],
        "area": AREAS,
        "near": LANDMARKS,
    },
}
# How a slot is said: before the noun, after it, and as a sentence. Where the wording
# depends on the value, the key is "slot=value".
BEFORE = {
    "price=low": ["cheap", "low-priced", "inexpensive"],
    "price=moderate": ["mid-priced", "moderately priced"],
    "price=high": ["expensive", "high-priced"],
    "stars": ["{stars_word}-star"],
    "pets=yes": ["pet-friendly"],
}
AFTER = {
    "food": ["serving {food} food", "with {food} dishes", "that cooks {food} food"],
    "area": ["in the {area}"],
    "near": ["near {near}", "close to {near}", "not far from {near}"],
    "night": ["for {night} a night", "at {night} a night"],
    "breakfast=yes": ["with breakfast included", "that serves breakfast"],
    "breakfast=no": ["without breakfast"],
    "pets=no": ["that takes no pets"],
}
SENTENCE = {
    "food": ["It serves {food} food.", "{food} food is on the menu."],
    "price=low": ["Prices are low.", "You pay little."],
    "price=moderate": ["Prices are moderate."],
    "price=high": ["Prices are high.", "It is not cheap."],
    "area": ["It lies in the {area}.", "You find it in the {area}."],
    "near": ["It is close to {near}.", "{near} is round the corner."],
    "stars": ["It has {stars_word} stars."],
    "night": ["A night costs {night}.", "Rooms start at {night}."],
    "breakfast=yes": ["Breakfast is included.", "It serves breakfast."],
    "breakfast=no": ["Breakfast is not served.", "There is no breakfast."],
    "pets=yes": ["Pets are welcome."],
    "pets=no": ["Pets are not allowed.", "It takes no pets."],
}
OPENINGS = [
    "{name} is {a_noun}{after}.",
    "{name} is {a_noun}{after}.",
    "There is {a_noun} called {name}{after}.",
    "Try {name}, {a_noun}{after}.",
]


def meanings(domain: str, rng: random.Random) -> Iterator[Meaning]:
    """Yield places without end: a name, a kind and two to four more slots."""
    values, nouns = VALUES[domain], EAT if domain == "eat" else STAY
    rest = [slot for slot in values if slot != "kind"]
    while True:
        slots = rng.sample(rest, rng.randint(2, 4))
        name = f"The {rng.choice(FIRST)} {rng.choice(nouns)}"
        chosen = {slot: rng.choice(values[slot]) for slot in values if slot in slots}
        yield {"name": name, "kind": rng.choice(values["kind"]), **chosen}


def say(meaning: Meaning, rng: random.Random) -> str:
    """Draw a text that says all of a meaning."""
    facts = {**meaning, "stars_word": STARS.get(meaning.get("stars", ""), "")}
    left = [slot for slot in meaning if slot not in ("name", "kind")]
    rng.shuffle(left)

    def take(forms: dict[str, list[str]], most: int) -> list[str]:
        said = []
        for slot in list(left):
            ways = forms.get(f"{slot}={meaning[slot]}") or forms.get(slot)
            if ways and len(said) < most and rng.random() < 0.7:
                said.append(rng.choice(ways).format(**facts))
                left.remove(slot)
        return said

    noun = " ".join([*take(BEFORE, 1), meaning["kind"]])
    after = "".join(f" {phrase}" for phrase in take(AFTER, 2))
    opening = rng.choice(OPENINGS)
    article = "an" if noun[0] in "aeiou" else "a"
    first = opening.format(
        name=meaning["name"], a_noun=f"{article} {noun}", after=after
    )
    rest = [
        rng.choice(SENTENCE.get(f"{slot}={meaning[slot]}") or SENTENCE[slot])
        for slot in left
    ]
    sentences = [sentence.format(**facts) for sentence in rest]
    return " ".join([first, *(text[0].upper() + text[1:] for text in sentences)])


def rows(
    domain: str, count: int, references: int, rng: random.Random, seen: set[str]
) -> list[tuple[str, str]]:
    """Return so many meanings that are not among those seen, each with its texts."""
    found: list[tuple[str, str]] = []
    for meaning in meanings(domain, rng):
        mr = ", ".join(f"{slot}[{value}]" for slot, value in meaning.items())
        if mr in seen:
            continue
        seen.add(mr)
        texts = dict.fromkeys(say(meaning, rng) for _ in range(8 * references))
        found += [(mr, text) for text in list(texts)[:references]]
        count -= 1
        if not count:
            break
    return found


def write(path: Path, found: list[tuple[str, str]]) -> None:
    """Write a table of two columns; the same rows make the same bytes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("mr", "ref"), *found])
    whole = text.getvalue().encode()
    path.write_bytes(gzip.compress(whole, mtime=0) if path.suffix == ".gz" else whole)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(0), set[str]()
    write(folder / "eat.test.csv", rows("eat", 60, 4, rng, seen))
    write(folder / "stay.test.csv", rows("stay", 80, 4, rng, seen))
    write(folder / "stay.valid.csv", rows("stay", 60, 2, rng, seen))
    write(folder / "stay.train.csv", rows("stay", 500, 2, rng, seen))
    write(folder / "eat.train.csv.gz", rows("eat", 4000, 2, rng, seen))
    texts = rows("stay", 4000, 1, rng, seen)  # read without their meanings
    write(folder / "stay.texts.csv.gz", [("", text) for _, text in texts])


if __name__ == "__main__":
    main()
