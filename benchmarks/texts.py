"""Texts of the kinds that people search in: questions, sentences, paragraphs, some code and other languages."""

from __future__ import annotations

import random

SENTENCES = (
    "The ferry leaves the eastern harbour at six every morning.",
    "How do I reset the password of my account?",
    "The committee will publish its report on water quality next Tuesday.",
    "Bread rises because yeast turns sugar into carbon dioxide.",
    "What is the capital of Mongolia?",
    "Our warranty covers defects in materials for a period of 24 months from the date of purchase.",
    "She tuned the violin, closed her eyes and waited for the conductor.",
    "def area(radius): return 3.14159 * radius ** 2",
    "SELECT name, price FROM products WHERE stock > 0 ORDER BY price DESC LIMIT 10;",
    "The mitochondrion is often described as the powerhouse of the cell.",
    "Shares of the company fell by 7.3% after it lowered its forecast for the third quarter.",
    "Please send the invoice to accounts@example.com before the end of the month.",
    "The trail climbs through oak forest, crosses two streams and ends at a small lake.",
    "Is it safe to take ibuprofen together with aspirin?",
    "In 1928, Alexander Fleming noticed that a mould had killed the bacteria on one of his plates.",
    "Das Museum ist montags geschlossen.",
    "¿Dónde está la estación de tren más cercana?",
    "Le fromage doit reposer au moins trois semaines dans une cave fraîche.",
    "彼女は毎朝六時に起きて走ります。",
    "Съешь же ещё этих мягких французских булок.",
    "The defendant argued that the contract had never been signed by an authorised representative.",
    "Photosynthesis stores the energy of light in chemical bonds.",
    "Turn left at the bakery, then walk straight on until you see the church.",
    "The patch fixes a race between the writer and the thread that rotates the log files.",
    "Interest rates, which had been near zero for a decade, began to climb.",
    "A good night's sleep improves memory, mood and the immune system.",
    "The orchestra will play Brahms' fourth symphony and a new piece by a local composer.",
    "Error 404: the page that you are looking for has been moved or deleted.",
    "To make the sauce, melt the butter, whisk in the flour, and slowly add the milk.",
    "Glaciers in the region have lost almost a third of their mass since 1960.",
    "Which of these two phones has the better battery?",
    "The bridge was closed to lorries heavier than 7.5 tonnes.",
    "He collected stamps, coins, postcards and, for reasons nobody understood, broken clocks.",
    "Version 2.1.0 adds dark mode, faster search and support for Arabic 🎉",
    "The patient reported mild headaches, but no fever and no loss of appetite.",
    "Two teaspoons of baking powder are enough for 500 g of flour.",
    "The satellite passes over the pole every ninety-eight minutes.",
    "I would like to change my flight from Lisbon to Oslo on 14 March.",
    "Wool keeps its warmth even when it is wet.",
    "The committee's minutes (see appendix B) were approved without amendment.",
)
LONGEST = 14
"""Sentences of the longest text."""


def sample_texts(count: int, seed: int = 7) -> list[str]:
    """Different texts, the same ones each time: half of them one sentence, the others up to `LONGEST` of them."""
    chance = random.Random(seed)  # noqa: S311 (nothing here is secret)
    texts: list[str] = []
    while len(texts) < count:
        sentences = 1 if len(texts) % 2 else chance.randint(2, LONGEST)
        text = " ".join(chance.sample(SENTENCES, sentences))
        if sentences == 1:
            text = f"{chance.choice(('', 'Note: ', 'Re: ', '> ', f'{len(texts)}. '))}{text}"
        if text not in texts:
            texts.append(text)
    return texts
