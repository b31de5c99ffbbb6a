"""Composes those texts of the default calibration set that are drills rather than writing.

    python -m minitron_build.calibration.compose_default_set      # writes default_set/*.txt again, same bytes

Worked arithmetic, tables, logs, conversations and small stories, all from a fixed seed. What was written by
hand (prose, languages, code) lies beside them and is not touched. It knows no model and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

FOLDER = Path(__file__).with_name("default_set")
SEED = 20261125

NAMES = (
    "Amara Bjorn Chen Dalia Emeka Farah Goran Hana Ivo Jun Kofi Lena Mateo Nadia Omar Priya Quentin Rosa "
    "Sanjay Tove Ulla Viktor Wanda Ximena Yusuf Zofia"
).split()
TOWNS = (
    "Arnheim Bergen Cordoba Dakar Edirne Fukuoka Gdansk Hobart Izmir Jaipur Kigali Leeds Malmo Nantes Oaxaca "
    "Porto Quito Riga Split Tartu Utrecht Valparaiso Windhoek Yerevan Zadar"
).split()
GOODS = {
    "apples": "kg",
    "bolts": "boxes",
    "candles": "dozen",
    "copper wire": "m",
    "diesel": "litres",
    "envelopes": "packs",
    "flour": "kg",
    "green tea": "tins",
    "hinges": "pairs",
    "ink": "bottles",
    "lentils": "kg",
    "paper": "reams",
    "rope": "m",
    "salt": "kg",
    "tiles": "pallets",
    "window glass": "sheets",
}
JOBS = "baker clerk dentist diver engineer gardener librarian mason nurse pilot printer tailor teacher vet".split()
PLACES = (
    "the old harbour",
    "a room above the bakery",
    "the last platform of the station",
    "a greenhouse full of tomatoes",
    "the reading room of the town library",
    "a kitchen with blue tiles",
    "the deck of a ferry",
    "a workshop behind the church",
    "the archive in the cellar",
    "a bus stop in the rain",
)
OBJECTS = (
    "a brass key",
    "a letter without a stamp",
    "a map of a country that no longer exists",
    "half a photograph",
    "an umbrella with somebody else's name in it",
    "a list of eleven numbers",
    "a jar of grey sand",
    "the wrong suitcase",
    "a radio that picked up only one station",
    "a chess piece carved from bone",
)
WEATHER = (
    "It had rained since morning",
    "The fog came in before noon",
    "A dry wind blew from the hills",
    "It was so cold that the locks froze",
    "The heat stood in the streets",
    "Snow lay on the roofs",
    "The sky was the colour of slate",
)


def arithmetic(random: Random) -> Iterator[str]:
    """Worked sums, each with its check."""
    a, b = random.randint(1000, 99999), random.randint(100, 9999)
    yield f"Add {a:,} and {b:,}.\n{a:,} + {b:,} = {a + b:,}. Check: {a + b:,} - {b:,} = {a:,}."
    c, d = random.randint(12, 99), random.randint(12, 99)
    tens, ones = d // 10 * 10, d % 10
    yield (
        f"Multiply {c} by {d}. Split {d} into {tens} and {ones}: {c} x {tens} = {c * tens} and "
        f"{c} x {ones} = {c * ones}; together {c * tens} + {c * ones} = {c * d}."
    )
    e, f = random.randint(500, 9999), random.randint(7, 47)
    yield (
        f"Divide {e} by {f}.\n{f} goes into {e} {e // f} times, because {f} * {e // f} = {f * (e // f)}, and "
        f"{e} - {f * (e // f)} = {e % f} is left. So {e} = {f} * {e // f} + {e % f}, or about {e / f:.4f}."
    )
    percent, base = random.randint(3, 95), random.randint(4, 400) * 25
    yield f"What is {percent} % of {base}? {percent}/100 * {base} = {percent * base / 100:g}."


def algebra(random: Random) -> Iterator[str]:
    """Equations, quadratics, sequences, derivatives."""
    x, a, b = random.randint(-12, 12), random.randint(2, 15), random.randint(-40, 40)
    c = a * x + b
    sign = "+" if b >= 0 else "-"
    yield (
        f"Solve {a}x {sign} {abs(b)} = {c}.\n{'Subtract' if b >= 0 else 'Add'} {abs(b)} on both sides: "
        f"{a}x = {c - b}. Divide by {a}: x = {x}. Put it back: {a} * ({x}) {sign} {abs(b)} = {c}, as it should be."
    )
    p, q = random.randint(-9, 9), random.randint(1, 9)
    linear, constant = -(p + q), p * q
    yield (
        rf"The polynomial $x^2 {linear:+d}x {constant:+d}$ has the roots $x_1 = {p}$ and $x_2 = {q}$, since "
        rf"their sum is ${p + q}$ and their product ${p * q}$. Its minimum lies at $x = {(p + q) / 2:g}$, where "
        rf"it takes the value ${((p + q) / 2) ** 2 + linear * (p + q) / 2 + constant:g}$."
    )
    n, first, step = random.randint(5, 40), random.randint(1, 20), random.randint(2, 11)
    last = first + (n - 1) * step
    yield (
        f"An arithmetic sequence begins with {first} and grows by {step}. Its term number {n} is "
        f"{first} + {n - 1} * {step} = {last}, and the sum of the first {n} terms is "
        f"{n} * ({first} + {last}) / 2 = {n * (first + last) // 2}."
    )
    k, m = random.randint(2, 9), random.randint(2, 7)
    yield (
        rf"Let $f(x) = {k}x^{m} - {m}x$. Then $f'(x) = {k * m}x^{{{m - 1}}} - {m}$, and "
        rf"$\int_0^1 f(x)\,dx = \frac{{{k}}}{{{m + 1}}} - \frac{{{m}}}{{2}}$."
    )


def word_problem(random: Random) -> Iterator[str]:
    """Problems in words, with their steps."""
    name, other = random.sample(NAMES, 2)
    item, unit = random.choice(list(GOODS.items()))
    price, count, paid = random.randint(3, 60), random.randint(3, 24), 0
    paid = (price * count // 50 + 1) * 50
    yield (
        f"{name} buys {count} {unit} of {item} at {price} each and pays with {paid}. How much change is due?\n"
        f"Cost: {count} * {price} = {price * count}. Change: {paid} - {price * count} = {paid - price * count}."
    )
    slow, fast, hours = random.randint(40, 70), random.randint(71, 120), random.randint(2, 6)
    town, far = random.sample(TOWNS, 2)
    yield (
        f"Two trains leave {town} for {far} at the same time, one at {slow} km/h and one at {fast} km/h. After "
        f"{hours} hours they have covered {slow * hours} km and {fast * hours} km, so {(fast - slow) * hours} km "
        f"lie between them: ({fast} - {slow}) * {hours} = {(fast - slow) * hours}."
    )
    red, blue = random.randint(2, 9), random.randint(2, 9)
    total = red + blue
    yield (
        f"{other} draws two marbles from a bag with {red} red and {blue} blue ones, without putting the first "
        f"back. Both are red with probability {red}/{total} * {red - 1}/{total - 1} = "
        f"{red * (red - 1)}/{total * (total - 1)}, about {red * (red - 1) / (total * (total - 1)):.3f}."
    )


def markdown_table(random: Random) -> Iterator[str]:
    """Stock lists with sums."""
    town, rows = random.choice(TOWNS), []
    for item, unit in random.sample(list(GOODS.items()), random.randint(5, 9)):
        count, price = random.randint(1, 900), random.randint(5, 4000) / 100
        rows.append((item, count, unit, price, count * price))
    lines = [f"Stock at {town}", "| item | quantity | unit | price | value |", "|---|---:|---|---:|---:|"]
    lines += [f"| {i} | {n} | {u} | {p:.2f} | {v:,.2f} |" for i, n, u, p, v in rows]
    lines.append(f"| **total** | | | | **{sum(row[4] for row in rows):,.2f}** |")
    yield "\n".join(lines)


def csv_table(random: Random) -> Iterator[str]:
    """Measurements with a header."""
    lines = ["time,station,temperature_c,humidity_pct,wind_ms,ok"]
    hour = random.randint(0, 12)
    for step in range(random.randint(8, 16)):
        station = random.choice(TOWNS).lower()
        minute = step * 5
        lines.append(
            f"2026-{random.randint(1, 12):02d}-{random.randint(1, 28):02d}T{hour + minute // 60:02d}:"
            f"{minute % 60:02d}:00Z,{station},{random.uniform(-15, 35):.1f},{random.randint(20, 99)},"
            f"{random.uniform(0, 18):.2f},{random.choice(['true', 'true', 'false'])}"
        )
    yield "\n".join(lines)


def json_record(random: Random) -> Iterator[str]:
    """Nested objects."""
    record = {
        "id": f"{random.getrandbits(48):012x}",
        "customer": {
            "name": random.choice(NAMES),
            "town": random.choice(TOWNS),
            "since": random.randint(1990, 2026),
        },
        "items": [
            {
                "sku": f"{item[:3].upper()}-{random.randint(100, 999)}",
                "name": item,
                "quantity": random.randint(1, 40),
            }
            for item in random.sample(list(GOODS), random.randint(2, 4))
        ],
        "paid": random.random() < 0.5,
        "note": random.choice([None, "", "ring twice", "leave at the gate"]),
    }
    yield json.dumps(record, indent=random.choice([None, 2, 4]))


def log_lines(random: Random) -> Iterator[str]:
    """A server's log."""
    lines, clock = [], random.randint(0, 80000)
    messages: tuple[Callable[[], str], ...] = (
        lambda: f"INFO  request {random.getrandbits(32):08x} accepted, {random.randint(1, 4096)} tokens",
        lambda: f"INFO  first token after {random.uniform(8, 900):.1f} ms, queue {random.randint(0, 32)}",
        lambda: f"WARN  KV cache at {random.randint(80, 99)} %, {random.randint(1, 9)} requests wait",
        lambda: f"ERROR connection from 10.0.{random.randint(0, 255)}.{random.randint(1, 254)} reset by peer",
        lambda: (
            f"DEBUG batch of {random.randint(1, 64)}, step {random.randint(1, 99999)}, {random.uniform(3, 30):.2f} ms"
        ),
    )
    for _ in range(random.randint(8, 14)):
        clock += random.randint(0, 40)
        stamp = f"{clock // 3600:02d}:{clock // 60 % 60:02d}:{clock % 60:02d}.{random.randint(0, 999):03d}"
        lines.append(f"{stamp} {random.choice(messages)()}")
    yield "\n".join(lines)


def chat(random: Random) -> Iterator[str]:
    """A question to an assistant and its answer, in several layouts."""
    name, town = random.choice(NAMES), random.choice(TOWNS)
    item, unit = random.choice(list(GOODS.items()))
    count = random.randint(2, 30)
    pairs = (
        (
            f"How long will {count} {unit} of {item} last if we use {count / 4:g} a week?",
            f"Four weeks. {count} divided by {count / 4:g} is 4, provided that nothing is lost or spoiled; order "
            "again after the third week, so that a late delivery does not leave you without.",
        ),
        (
            f"Write a short note to {name} in {town}: the meeting is moved to Thursday, same time.",
            f"Dear {name},\nour meeting has been moved to Thursday; the time stays the same. Please let me know "
            "by tomorrow if that does not suit you.\nKind regards",
        ),
        (
            "Why does my program print 0.30000000000000004?",
            "Because 0.1 and 0.2 have no exact binary form. Each is rounded to the nearest double, the sum of the "
            "two is rounded once more, and the printed number is the shortest that reads back as that sum. "
            "Compare with a tolerance, or use decimal arithmetic where cents matter.",
        ),
        (
            f"Translate into French: {name} lives in {town} and works as a {random.choice(JOBS)}.",
            f"{name} habite à {town}. I left the profession out because its gender depends on {name}; tell me "
            "which form you need and I will add it.",
        ),
        (
            f"List three things to check before driving from {town} in winter.",
            "1. Tyres: at least four millimetres of tread, pressure measured cold.\n2. Battery: if it is older "
            "than five years, have it tested.\n3. Washer fluid: enough of it, and good to minus twenty degrees.",
        ),
    )
    question, answer = random.choice(pairs)
    layout = random.choice(
        ("User: {q}\nAssistant: {a}", "Q: {q}\nA: {a}", "<user>{q}</user>\n<reply>{a}</reply>")
    )
    yield layout.format(q=question, a=answer)


def conversation(random: Random) -> Iterator[str]:
    """Two people at a counter, in a workshop, on the telephone."""
    first, second = random.sample(NAMES, 2)
    thing, place = random.choice(OBJECTS), random.choice(PLACES)
    lines = [
        (first, f"Is this yours? I found {thing} in {place}."),
        (
            second,
            random.choice(("Not mine.", "It might be. Where exactly?", "I was hoping nobody would find it.")),
        ),
        (
            first,
            random.choice(
                ("It was on the floor.", "Under the bench, behind the radiator.", "It was just there.")
            ),
        ),
        (
            second,
            f"Then it belongs to the {random.choice(JOBS)}. Give it to {random.choice(NAMES)}, she sees him daily.",
        ),
        (
            first,
            random.choice(
                (
                    "And if he doesn't want it?",
                    "He told me that he had lost nothing.",
                    "I would rather keep it.",
                )
            ),
        ),
        (
            second,
            random.choice(
                (
                    "Everybody wants it back in the end.",
                    "Keep it until Friday, then.",
                    "Nobody ever has, on a Monday.",
                )
            ),
        ),
    ]
    style = random.randrange(3)
    if style == 0:
        yield "\n".join(f"{who.upper()}: {said}" for who, said in lines)
    elif style == 1:
        yield "\n".join(
            f'"{said}"' + (f" said {who}." if index < 2 else "") for index, (who, said) in enumerate(lines)
        )
    else:
        yield "\n".join(f"- {said}" for _, said in lines)


def story(random: Random) -> Iterator[str]:
    """A paragraph in which somebody finds something somewhere."""
    name, other = random.sample(NAMES, 2)
    job, town = random.choice(JOBS), random.choice(TOWNS)
    years = random.randint(2, 40)
    middle = random.choice(
        (
            f"{name} had been a {job} for {years} years and had never once been late",
            f"nobody in {town} could remember a time before {name}, the {job}",
            f"the {job}, whose name was {name}, had come from {town} with a single bag",
        )
    )
    turn = random.choice(
        (
            f"On the table lay {random.choice(OBJECTS)}, and beside it a note: do not ask {other}.",
            f"That was the day on which {other} brought {random.choice(OBJECTS)} and would not say from where.",
            f"In {random.choice(PLACES)} somebody had left {random.choice(OBJECTS)}.",
        )
    )
    end = random.choice(
        (
            "It took a week to find out what it meant, and a year to wish that it had meant something else.",
            f"{other} laughed when it was over. {name} did not, but kept the thing, and has it still.",
            "Everyone agreed that it had been an accident, except for the one person who had seen it.",
            f"They wrote to {random.choice(TOWNS)}, waited, wrote again, and on the third of the month got an answer.",
        )
    )
    yield f"{random.choice(WEATHER)}, and {middle}. {turn} {end}"


GREETINGS = {
    "de": (
        "Am {d}. {m} um {h}:{mm} Uhr fährt der Zug von {a} nach {b}; die Fahrkarte kostet {p} Euro.",
        "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    ),
    "fr": (
        "Le {d} {m} à {h} h {mm}, le train part de {a} pour {b} ; le billet coûte {p} euros.",
        "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    ),
    "es": (
        "El {d} de {m} a las {h}:{mm} sale el tren de {a} a {b}; el billete cuesta {p} euros.",
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    ),
    "it": (
        "Il {d} {m} alle {h}:{mm} parte il treno da {a} per {b}; il biglietto costa {p} euro.",
        "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    ),
    "pt": (
        "No dia {d} de {m}, às {h}h{mm}, parte o comboio de {a} para {b}; o bilhete custa {p} euros.",
        "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
    ),
    "nl": (
        "Op {d} {m} om {h}.{mm} uur vertrekt de trein van {a} naar {b}; het kaartje kost {p} euro.",
        "januari februari maart april mei juni juli augustus september oktober november december",
    ),
    "sv": (
        "Den {d} {m} klockan {h}.{mm} går tåget från {a} till {b}; biljetten kostar {p} euro.",
        "januari februari mars april maj juni juli augusti september oktober november december",
    ),
    "ru": (
        "{d} {m} в {h}:{mm} отправляется поезд из {a} в {b}; билет стоит {p} евро.",
        "января февраля марта апреля мая июня июля августа сентября октября ноября декабря",
    ),
    "zh": (
        "{m}{d}日{h}点{mm}分，从{a}开往{b}的列车发车，票价{p}欧元。",
        "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月",
    ),
    "ja": (
        "{m}{d}日{h}時{mm}分、{a}発{b}行きの列車が出ます。切符は{p}ユーロです。",
        "1月 2月 3月 4月 5月 6月 7月 8月 9月 10月 11月 12月",
    ),
}


def timetable(random: Random) -> Iterator[str]:
    """The same departure announced in several languages."""
    start, end = random.sample(TOWNS, 2)
    day, month, hour = random.randint(1, 28), random.randrange(12), random.randint(5, 23)
    values = {
        "d": day,
        "h": hour,
        "mm": f"{random.randrange(0, 60, 5):02d}",
        "a": start,
        "b": end,
        "p": random.randint(4, 180),
    }
    chosen = random.sample(list(GREETINGS.values()), 5)
    yield "\n".join(text.format(m=months.split()[month], **values) for text, months in chosen)


FILES: dict[str, tuple[int, tuple[Callable[[Random], Iterator[str]], ...]]] = {
    "mathematics.txt": (60_000, (arithmetic, algebra, word_problem)),
    "tables.txt": (65_000, (markdown_table, csv_table, json_record, log_lines)),
    "dialogue.txt": (50_000, (chat, conversation)),
    "stories.txt": (45_000, (story,)),
    "timetables.txt": (30_000, (timetable,)),
}
"""Each file: how many bytes at least, and the kinds of passages in turn."""


def compose(name: str) -> str:
    """The text of one file; the same for ever."""
    size_bytes, kinds = FILES[name]
    random, passages, done = Random(f"{SEED} {name}"), [], 0
    while done < size_bytes:
        for kind in kinds:
            for passage in kind(random):
                passages.append(passage)
                done += len(passage.encode()) + 2
    return "\n\n".join(passages) + "\n"


def main() -> None:
    """Write all composed files."""
    for name in FILES:
        (FOLDER / name).write_text(compose(name), encoding="utf-8")


if __name__ == "__main__":
    main()
