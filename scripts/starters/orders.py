"""`json-record`: an order written freely becomes one JSON record; a message without one, a record of nulls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from scripts.starters.example import MONTHS, WEEKDAYS, Example, Split, lines, listed, ordinal, seeded

SYSTEM_PROMPT = "Turn the message into a JSON record with item, quantity, recipient and date."
OTHER_PROMPTS = (
    "Answer only in JSON: item, quantity, recipient, date.",
    "You are a clerk. Record every order as JSON.",
    "Extract the order as a JSON object.",
)
KEYS = ("item", "quantity", "recipient", "date")

NUMBER_WORDS = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "fifteen": 15,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
}


@dataclass(frozen=True, slots=True)
class Pools:
    """What one split is drawn from. A template that lacks a slot makes a record with null there."""

    templates: tuple[str, ...]
    items: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    organisations: tuple[str, ...]
    relative_dates: tuple[str, ...]
    years: tuple[int, ...]
    chatter: tuple[str, ...]


TRAINING = Pools(
    templates=lines("""
        Deliver {quantity} {item} to {recipient} on {date}.
        Ship {quantity} {item} to {recipient} before {date}, please.
        {recipient} wants {quantity} {item} for {date}.
        {recipient} has ordered {quantity} {item}; they must arrive by {date}.
        Could you get {quantity} {item} over to {recipient} by {date}?
        Can we have {quantity} {item} sent out to {recipient} no later than {date}?
        We need {quantity} {item} delivered on {date}. The customer is {recipient}.
        On {date}, {recipient} will pick up {quantity} {item}.
        By {date} I would like {quantity} {item} to reach {recipient}.
        New order from {recipient}: {quantity} {item}, due {date}.
        Order: {item}, {quantity} pieces, for {recipient}, {date}.
        Hello, this is {recipient}. I'd like {quantity} {item} on {date}.
        Hi, {recipient} here! Put me down for {quantity} {item}, needed {date}.
        Reserve {quantity} {item} for {recipient} until {date}.
        {quantity} {item} for {recipient}, {date}. Thanks!
        {date}: {quantity} {item} to {recipient}.
        Don't forget that {recipient} is getting {quantity} {item} on {date}.
        My boss asked me to order {quantity} {item} for {recipient}, to be there by {date}.
        Make sure {quantity} {item} are packed for {recipient} by {date}.
        Mail {recipient} {quantity} {item} before {date}.
        To {recipient}: {quantity} {item}. Delivery date {date}.
        I promised {recipient} {quantity} {item} by {date}, so send them soon.
        Would it be possible to bring {recipient} {quantity} {item} on {date}?
        Kindly dispatch {quantity} {item} to {recipient}; the deadline is {date}.
        {recipient} called. They need {quantity} {item}, and {date} is the latest day.
        For the party on {date} we want {quantity} {item}. Bill {recipient}.
        Deliver {quantity} {item} to {recipient}.
        {recipient} would like {quantity} {item}.
        Put {quantity} {item} aside for {recipient}, will you?
        Order {quantity} {item} for {date}.
        We are short of stock: {quantity} {item} by {date}, please.
        I want to buy {quantity} {item}.
        Another {quantity} {item}, please.
        Take some {item} to {recipient} on {date}.
        {recipient} needs more {item} by {date}.
    """),
    items=listed("""
        chairs, desks, notebooks, pencils, blue pens, bags of flour, boxes of tea, bottles of olive oil, red roses,
        tulip bulbs, apple trees, loaves of bread, jars of honey, coffee mugs, dinner plates, soup bowls, wine glasses,
        forks, kitchen knives, cotton towels, pillows, woollen blankets, winter coats, pairs of boots, straw hats,
        silk scarves, leather belts, umbrellas, backpacks, suitcases, tents, sleeping bags, batteries, light bulbs,
        phone chargers, keyboards, laptops, printers, ink cartridges, reams of paper, envelopes, stamps, posters,
        maps, dictionaries, cookbooks, guitars, violins, drums, footballs, tennis rackets, chess sets, board games,
        teddy bears, toy trains, kites, bicycles, helmets, spare tyres, cans of paint, paint brushes, hammers, nails,
        screwdrivers, ladders, buckets, garden hoses, shovels, bags of cement, bricks, roof tiles, wooden beams,
        window frames, door handles, curtains, carpets, mirrors, clocks, picture frames, vases, soap bars, toothbrushes,
        first aid kits, face masks, gloves, aprons, crates of oranges, kilos of rice, cheese wheels, chocolate bars,
        birthday cakes, sandwiches, pizzas, cartons of milk, baskets of eggs, sacks of potatoes, barrels of beer
    """),
    first_names=listed("""
        Anna, Peter, Lucy, James, Fatima, Omar, Chen, Mei, Priya, Arjun, Sofia, Lucas, Emma, Noah, Olivia, Liam,
        Hannah, David, Grace, Samuel, Ingrid, Lars, Nadia, Ivan, Elena, Pablo, Carmen, Diego, Aisha, Kofi, Amara,
        Yuki, Kenji, Hana, Minh, Linh, Thomas, Claire, Julien, Amelie, Ruth, George, Alice, Henry, Zoe, Victor
    """),
    last_names=listed("""
        Smith, Brown, Taylor, Walker, Wright, Green, Baker, Hughes, Murphy, Kelly, Schmidt, Weber, Fischer, Wagner,
        Martin, Bernard, Dubois, Moreau, Garcia, Lopez, Martinez, Silva, Costa, Santos, Kumar, Patel, Singh, Khan,
        Ahmed, Hassan, Ali, Wang, Li, Zhang, Tanaka, Suzuki, Sato, Kim, Park, Nguyen, Tran, Ivanov, Petrov, Novak,
        Jensen, Larsen, Berg, Mensah, Diallo, Mbeki
    """),
    organisations=listed("""
        the city library, Green Street School, Sunrise Bakery, the Grand Hotel, Miller and Sons, the town hall,
        Blue Door Cafe, Northside Hospital, the art museum, Peak Fitness, Harbour Books, the fire station
    """),
    relative_dates=listed("Monday, Tuesday afternoon, Friday, Friday evening, Saturday morning"),
    years=(2019, 2020, 2021, 2022, 2023, 2025, 2026, 2027, 2029),
    chatter=lines("""
        Good morning! How are you today?
        What time do you open?
        Thank you very much for your help.
        The weather has been lovely this week.
        Do you speak French?
        I lost my password. What should I do?
        Why is the sky blue?
        Tell me a joke.
    """),
)

HELD_OUT = Pools(
    templates=lines("""
        Please send {quantity} {item} to {recipient} by {date}.
        {recipient} is expecting {quantity} {item} from us on {date}.
        Would you arrange for {quantity} {item} to be with {recipient} by {date}?
        It's {recipient} again: I will take {quantity} {item}, for {date} if you can.
        Purchase request. Buyer: {recipient}. Goods: {quantity} {item}. Needed: {date}.
        The van leaves for {recipient} on {date}, load {quantity} {item}.
        {quantity} {item} must be at the door of {recipient} by {date}!
        Let's surprise {recipient} with {quantity} {item} on {date}.
        Please set {quantity} {item} aside; {recipient} will come for them on {date}.
        Note to self: {quantity} {item} go to {recipient} on {date}.
        Forward {quantity} {item} to {recipient}, please.
        We ran out again, so I'd like {quantity} {item} by {date}.
    """),
    items=listed("""
        lanterns, candles, fishing rods, wool socks, microscopes, telescopes, watering cans, sewing machines,
        baskets of cherries, bags of sugar, packets of seeds, copper pipes, rubber boots, parasols, harmonicas,
        fire extinguishers, whiteboards, calculators, hair dryers, tins of sardines, saddles, alarm clocks, snow globes
    """),
    first_names=listed("""
        Maria, Felix, Bianca, Tariq, Svetlana, Oscar, Naomi, Rafael, Leila, Hugo, Astrid, Kwame, Sakura, Dmitri, Paula
    """),
    last_names=listed("""
        Rossi, Bennett, Okafor, Lindqvist, Haddad, Moretti, Kowalski, Yamamoto, Ferreira, Brandt, Castillo, Osei, Reid
    """),
    organisations=listed("the railway museum, Oak Lane Nursery, Delta Pharmacy, the yacht club"),
    relative_dates=listed("Thursday, Sunday evening, Wednesday"),
    years=(2018, 2024, 2028),
    chatter=lines("""
        Where can I park my car?
        Your shop looks wonderful!
        Who won the match last night?
    """),
)

POOLS: dict[Split, Pools] = {"training": TRAINING, "held_out": HELD_OUT}
CHATTER_SHARE = 0.05


def examples(split: Split, count: int, seed: int) -> list[Example]:
    """`count` messages and their records. The same split, count and seed give the same list."""
    random = seeded(seed, "orders", split)
    return [example(random, POOLS[split]) for _ in range(count)]


def example(random: Random, pools: Pools) -> Example:
    if random.random() < CHATTER_SHARE:
        return Example(random.choice(pools.chatter), json.dumps(dict.fromkeys(KEYS)))
    template = random.choice(pools.templates)
    item, recipient, date = random.choice(pools.items), some_recipient(random, pools), some_date(random, pools)
    quantity_text, quantity = some_quantity(random)
    message = template.format(item=item, quantity=quantity_text, recipient=recipient, date=date)
    record = {
        "item": item,
        "quantity": quantity if "{quantity}" in template else None,
        "recipient": recipient if "{recipient}" in template else None,
        "date": date.removeprefix("the ") if "{date}" in template else None,
    }
    return Example(message[0].upper() + message[1:], json.dumps(record))


def some_quantity(random: Random) -> tuple[str, int]:
    """A number as it is written, and the number."""
    if random.random() < 0.2:
        return random.choice(list(NUMBER_WORDS.items()))
    number = random.choice((random.randint(2, 30), random.randint(2, 99), random.randint(100, 950)))
    return str(number), number


def some_recipient(random: Random, pools: Pools) -> str:
    if random.random() < 0.15:
        return random.choice(pools.organisations)
    name = f"{random.choice(pools.first_names)} {random.choice(pools.last_names)}"
    return random.choice((name, name, name, f"{random.choice(('Mr', 'Mrs', 'Dr'))} {random.choice(pools.last_names)}"))


def some_date(random: Random, pools: Pools) -> str:
    if random.random() < 0.2:
        return random.choice(pools.relative_dates)
    day, month, year = random.randint(1, 28), random.choice(MONTHS), random.choice(pools.years)
    return random.choice(
        (
            f"{day} {month} {year}",
            f"{month} {day}, {year}",
            f"the {ordinal(day)} of {month} {year}",
            f"the {ordinal(day)} of {month}",
            f"{day} {month}",
            f"{month} {ordinal(day)}",
            f"{random.choice(WEEKDAYS)}, {day} {month}",
        )
    )


def is_right(example: Example, answer: str) -> bool:
    """Whether the whole answer is one JSON object with exactly the keys and values wanted, in any order or spacing."""
    try:
        return bool(json.loads(answer) == json.loads(example.answer))
    except ValueError:
        return False
