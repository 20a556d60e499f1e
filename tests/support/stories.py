"""The writer of `shipped:stories`: short made-up stories from a grammar, the same on every machine.

Write the files again with: PYTHONPATH=src:tests python -m support.stories
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from finetune.core.files import write_jsonl
from finetune.data.sources import SHIPPED

FOLDER = SHIPPED / "stories"
TRAIN, HELDOUT = 360, 20
# Nats a token that knowing only how often each token occurs comes to, with the example's vocabulary; tier 2 measures it.
UNIGRAM_ENTROPY = 5.191

# A word in braces stands for one of its lines, chosen anew each time; those of the hero and of SAME stay for the story.
GIRLS = ["Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Clara", "Ruby"]
BOYS = ["Tom", "Ben", "Max", "Leo", "Sam", "Oscar", "Finn", "Jack"]
ANIMALS = ("fox", "rabbit", "bear", "mouse", "duck", "hedgehog", "squirrel", "turtle")
FRIENDS = ["Pip", "Coco", "Momo", "Bobo", "Toto", "Kiki"]

WORDS: dict[str, tuple[str, ...]] = {
    "small": ("little", "small", "kind", "brave", "happy", "curious"),
    "open": (
        "Once upon a time, there was a {small} {kind} named {hero}. {home}",
        "Once upon a time, there was a {small} {kind} named {hero}. {loved}",
        "Once upon a time, a {small} {kind} named {hero} lived in a {house} {where}. {loved}",
        "Once upon a time, in a {house} {where}, there lived a {kind} named {hero}. {loved}",
        "Once upon a time, there lived a {small} {kind}. {His} name was {hero}. {home}",
    ),
    "home": ("{He} lived in a {house} {where}.", "{His} home was a {house} {where}."),
    "house": ("small house", "little house", "red house", "cosy house", "tiny house with a blue door"),
    "where": ("near the forest", "by the river", "on a green hill", "at the edge of the town", "by the sea"),
    "loved": (
        "{He} loved to play outside with {his} {toy}.",
        "{He} liked to sing songs in the morning.",
        "Every day, {he} went for a walk with {his} friend {friend}.",
        "{He} loved to help {his} {elder}.",
        "{He} had a {toy} that {he} took everywhere.",
    ),
    "toy": ("red ball", "blue kite", "little boat", "wooden train", "yellow drum", "soft teddy bear"),
    "elder": ("mother", "father", "grandmother", "grandfather"),
    "day": ("One day,", "One sunny day,", "One cold morning,", "One morning,", "One rainy day,", "One evening,"),
    "food": ("bread", "honey cake", "apple pie", "warm soup", "cookies", "sweet berries"),
    "cake": ("berry pie", "honey cake", "big pie", "chocolate cake", "pancake"),
    "place": ("the park", "the forest", "the garden", "the river", "the old bridge", "the market"),
    "animal": ("bird", "kitten", "puppy", "frog", "butterfly", "lamb"),
    "felt": ("{He} felt sad.", "{He} was very sad.", "{He} did not know what to do.", "{He} wanted to cry."),
    "glad": (
        "{hero} was very happy.", "{hero} smiled and felt warm inside.", "{hero} jumped up and down with joy.",
        "{hero} laughed and clapped {his} hands.", "{hero} had never been so happy.",
    ),
    "learned": (
        "{hero} learned that it is good to share.", "{hero} learned that friends help each other.",
        "{hero} learned that it is good to be kind.", "From that day on, {hero} was not afraid any more.",
        "{hero} learned to be careful.",
        "{hero} learned that good things take time.", "{hero} learned that it is good to tell the truth.",
    ),
    "last": (
        "They all lived happily ever after.", "And that night, {hero} slept very well.",
        "From that day on, they were best friends.", "Then they went home and had {food} for dinner.",
        "It was the best day ever.", "They played together until the sun went down.",
    ),
}  # fmt: skip

# Each plot is a row of steps; a step is one of several wordings. The last two steps of every story are above.
PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost": (
        ("{day} {hero} went to {place} with {his} {thing}.", "{day} {hero} took {his} {thing} to {place}."),
        ("{He} played there for a long time.", "{He} ran and jumped until {he} was tired.", "The sun was warm."),
        (
            "When {he} wanted to go home, the {thing} was gone! {felt}",
            "Then {he} looked around and could not find the {thing}. {felt}",
        ),
        (
            '"Why are you sad?" asked {friend}. "I lost my {thing}," said {hero}.',
            '{friend} came by and asked, "What is wrong?" "I cannot find my {thing}," said {hero}.',
        ),
        (
            "They looked under the bench and behind the trees. At last, {friend} found the {thing} in the grass.",
            "They looked everywhere. The {thing} was under a big leaf all the time!",
        ),
        ('"Thank you, {friend}!" said {hero}.', "{hero} gave {friend} a big hug."),
    ),
    "rescue": (
        (
            "{day} {hero} heard a small sound near {place}.",
            "{day} {hero} was walking to {place} when {he} heard a cry.",
        ),
        (
            "It was a little {beast} that could not get out of a deep hole.",
            "A little {beast} was stuck in a bush and could not move.",
            "There was a little {beast} that had hurt its leg.",
        ),
        ('"Do not be afraid," said {hero}. "I will help you."', '"Please help me," said the {beast}.'),
        (
            "{hero} ran to get {his} {elder}. Together they helped the {beast} very gently.",
            "{hero} took a long stick and a soft blanket and worked slowly. Soon the {beast} was free.",
        ),
        (
            '"Thank you," said the {beast}. "You are very kind."',
            "The {beast} was so happy that it danced around {hero}.",
        ),
    ),
    "share": (
        ("{day} {hero} baked a {meal} with {his} {parent}.", "{day} {his} {parent} gave {hero} a {meal}."),
        ("It smelled so good! {hero} wanted to eat it all.", '"This is all for me," said {hero}.'),
        (
            "Then {friend} came to the door. {friend} was hungry and had nothing to eat.",
            "Outside, {hero} saw {friend}, who was sitting alone in the cold.",
        ),
        (
            "{hero} thought about it. Then {he} cut the {meal} in two.",
            '{hero} looked at the {meal} and then at {friend}. "Do you want some?" {he} asked.',
        ),
        ("They sat down and ate together. It tasted even better than before.", "{friend} smiled and ate every bit."),
    ),
    "rain": (
        ("{day} {hero} and {friend} went to {place}.", "{day} {hero} wanted to play with {friend} in {spot}."),
        ("Suddenly, the sky became dark and it started to rain.", "But big grey clouds came, and the wind was loud."),
        ('"We will get wet!" said {friend}.', '"I am scared," said {friend}. "Take my hand," said {hero}.'),
        (
            "They ran to an old tree and hid under its branches.",
            "{hero} found a big leaf, and they held it over their heads.",
            "They saw a little house and knocked on the door. An old woman let them in and gave them {food}.",
        ),
        ("Soon the rain stopped, and there was a big rainbow in the sky.", "After a while, the sun came out again."),
    ),
    "afraid": (
        ("{hero} was afraid of the dark.", "There was one thing {hero} did not like. It was the dark."),
        ("{day} {he} heard a strange noise outside the window.", "One night, {he} heard a loud noise under the bed."),
        (
            '"Who is there?" asked {hero}. {His} heart was beating fast.',
            '"Help!" said {hero} and hid under the blanket.',
        ),
        (
            "{He} took a little light and looked. It was only a {beast} that wanted to come in.",
            "{His} {parent} came with a lamp. They looked, and it was only a {beast}!",
        ),
        ("{hero} laughed. The {beast} was not scary at all.", '"You are my friend now," {hero} said to the {beast}.'),
    ),
    "truth": (
        (
            "{day} {hero} was playing in the house and broke a big vase.",
            "{day} {hero} ran through the kitchen and broke a cup.",
        ),
        ("{He} was afraid and hid it under the bed.", "{He} put it in a box so that nobody could see it."),
        (
            '"What happened?" asked {his} {parent}. {hero} looked at the floor.',
            "Then {his} {parent} came home and looked for it everywhere.",
        ),
        ('"I broke it," said {hero}. "I am sorry."', '"It was me," said {hero} in a small voice. "I am so sorry."'),
        (
            '"Thank you for telling me," said {his} {parent} and gave {him} a hug.',
            '{His} {parent} smiled. "We can fix it together," {parent_he} said.',
        ),
    ),
    "seed": (
        (
            "{day} {hero} found a tiny seed on the way to {place}.",
            "{day} {his} {parent} gave {hero} a tiny seed.",
        ),
        ("{He} put it in the ground and gave it some water.", "{He} planted it in the garden behind the house."),
        (
            "Every day {he} looked, but nothing happened. {felt}",
            "{hero} waited and waited. It was hard to wait.",
        ),
        ('"You must be patient," said {friend}.', '"Give it time," said {his} {parent}.'),
        (
            "Then the sun came out, and a small green leaf came out of the ground.",
            "One week later, there was a beautiful {flower} in the garden.",
        ),
        ("Everybody came to look at it.", "{hero} showed it to all {his} friends."),
    ),
    "race": (
        ("{day} there was a big race in {spot}.", "{day} all the friends wanted to race to {place}."),
        (
            '"I am the fastest," said {friend}. {hero} was much slower.',
            "{hero} was not very fast, but {he} wanted to try.",
        ),
        ("They all started to run.", "One, two, three, and off they went!"),
        (
            "In the middle of the race, {friend} fell down and started to cry.",
            "Then {hero} saw that {friend} had stopped. {friend} had hurt a foot.",
        ),
        (
            "{hero} did not run on. {He} helped {friend} to stand up, and they walked to the end together.",
            "{hero} stopped and sat down next to {friend}. They forgot about the race.",
        ),
    ),
    "gift": (
        ("{day} it was the birthday of {friend}.", "Soon it was the birthday of {his} best friend, {friend}."),
        ("{hero} wanted to give a nice present, but {he} had no money.", "{hero} did not have a present. {felt}"),
        (
            "So {he} went to {place} and looked for something pretty.",
            "{He} thought and thought. Then {he} had a good idea.",
        ),
        (
            "{He} picked a big {flower} and made a card with a red heart on it.",
            "{He} painted a picture of the two of them under a big yellow sun.",
            "{He} found a shiny stone and put it in a little box.",
        ),
        ('"This is the best present of all!" said {friend}.', '{friend} opened it and said, "Oh, how beautiful!"'),
    ),
    "swim": (
        ("{day} {hero} and {his} {parent} went to the lake.", "{day} {hero} saw {his} friends swimming in the river."),
        ("{hero} wanted to swim too, but the water was cold and deep.", "{hero} did not know how to swim. {felt}"),
        ('"I will show you," said {friend}. "It is not hard."', '"Come in!" called {friend}. "I will hold your hand."'),
        (
            "First {he} put one foot in the water. Then {he} put in the other foot.",
            "{hero} tried and tried. {He} fell into the water, but {he} did not give up.",
        ),
        ("At the end of the day, {hero} could swim all alone.", '"Look at me!" said {hero}. "I can swim!"'),
    ),
}
MORE: dict[str, tuple[str, ...]] = {
    "spot": ("the park", "the forest", "the garden", "the big field"),
    "flower": ("flower", "red rose", "yellow flower", "sunflower"),
}
SAME = {"thing": "toy", "beast": "animal", "meal": "cake", "parent": "elder"}


def write(folder: Path = FOLDER) -> Path:
    """Write `train.jsonl` and `heldout.jsonl` (rows of `text`), no story twice, and return the folder."""
    stories = generate(TRAIN + HELDOUT)
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in stories[:TRAIN]])
    write_jsonl(folder / "heldout.jsonl", [{"text": text} for text in stories[TRAIN:]])
    return folder


def generate(count: int, seed: int = 0) -> list[str]:
    """So many different stories, plot after plot in turn."""
    chance = random.Random(seed)
    stories: dict[str, None] = {}
    plots = list(PLOTS)
    while len(stories) < count:
        stories[_story(plots[len(stories) % len(plots)], chance)] = None
    return list(stories)


def _story(plot: str, chance: random.Random) -> str:
    def one(lines: tuple[str, ...] | list[str]) -> str:
        return lines[int(chance.random() * len(lines))]  # `choice` may change between versions of Python

    fixed = {name: one(WORDS[of]) for name, of in SAME.items()}
    kind = one(("girl", "boy", "animal"))
    she = kind == "girl" or (kind == "animal" and chance.random() < 0.5)
    fixed |= {"he": "she", "his": "her", "him": "her"} if she else {"he": "he", "his": "his", "him": "him"}
    fixed["parent_he"] = "she" if "mother" in fixed["parent"] else "he"
    fixed["kind"] = one(ANIMALS) if kind == "animal" else kind
    fixed["hero"] = one(GIRLS if she else BOYS)
    fixed["friend"] = one(FRIENDS)
    fixed |= {name.capitalize(): fixed[name].capitalize() for name in ("he", "his")}
    texts = {**WORDS, **MORE}

    def fill(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: fixed.get(found[1]) or fill(one(texts[found[1]])), text)

    return " ".join(fill(one(step)) for step in (WORDS["open"], *PLOTS[plot], WORDS["glad"], _end(plot), WORDS["last"]))


def _end(plot: str) -> tuple[str, ...]:
    """What is learned from a plot."""
    words = {
        "lost": ("friends", "careful"), "rescue": ("kind", "friends"), "share": ("share",), "rain": ("friends", "afraid"),
        "afraid": ("afraid",), "truth": ("truth",), "seed": ("time",), "race": ("friends", "kind"),
        "gift": ("kind", "share"), "swim": ("afraid", "friends"),
    }[plot]  # fmt: skip
    return tuple(line for line in WORDS["learned"] if any(word in line for word in words))


if __name__ == "__main__":
    print(write())
