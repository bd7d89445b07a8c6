"""README's figure: top-1 over the share of wrong labels, a curve per row. Usage: python
.github/figure.py RESULTS.jsonl OUT.png, where RESULTS is evaluate.py's --out of one folder for
checkpoints called runs/WRONG-ROW-SEED/last.pt."""

import collections
import functools
import json
import re
import statistics
import sys

from PIL import Image, ImageDraw, ImageFont

ROWS = {
    "clip": ("+ descriptions", (20, 90, 190)),
    "ce": ("cross-entropy", (215, 95, 0)),
    "names": ("+ labels as text", (0, 130, 90)),
    "shuffled": ("+ descriptions of\nother images", (130, 130, 130)),
}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 3200, 1800, 260, 180, 2500, 1560  # halved at the end
TITLE = "RSICD, top-1 on test images after 15 epochs, %: mean; band: \u00b1 deviation of seeds"


def several(shares: dict[int, list[float]]) -> bool:
    """Enough for a curve and its band: two shares of wrong labels, two seeds each."""
    return len(shares) > 1 and min(map(len, shares.values())) > 1


def curves(file: str) -> dict[str, dict[int, list[float]]]:
    """Top-1 of each seed by row and share of wrong labels; of a run evaluated twice, the later."""
    with open(file, encoding="utf-8") as lines:
        top1 = {line["checkpoint"]: line["top1"] for line in map(json.loads, lines)}
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for checkpoint, value in top1.items():
        if name := re.search(r"(\d+)-([a-z]+)-\d+/", checkpoint):
            found[name[2]][int(name[1])].append(value)
    return {row: dict(sorted(found[row].items())) for row in ROWS if several(found[row])}


def draw(rows: dict[str, dict[int, list[float]]]) -> Image.Image:
    values = [v for shares in rows.values() for seeds in shares.values() for v in seeds]
    shares = sorted({share for row in rows.values() for share in row})
    low, high = 10 * int(min(values) // 10), 10 * int(max(values) // 10 + 1)

    def place(share: float, value: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * (share - shares[0]) / (shares[-1] - shares[0])
        return x, BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    write = functools.partial(pen.text, font=ImageFont.load_default(60))
    write((40, 40), TITLE, "black")
    write(((LEFT + RIGHT) / 2, HEIGHT - 40), "wrong training labels", "black", anchor="mb")
    for value in range(low, high + 1, 10):
        y = place(0, value)[1]
        pen.line([(LEFT, y), (RIGHT, y)], fill=(220, 220, 220), width=4)
        write((LEFT - 40, y), f"{value}", "black", anchor="rm")
    for share in shares:
        write((place(share, 0)[0], BOTTOM + 40), f"{share} %", "black", anchor="mt")
    ends = []
    for row, points in rows.items():
        stats = [(x, statistics.mean(v), statistics.stdev(v)) for x, v in points.items()]
        words, colour = ROWS[row]
        line, upper, lower = ([place(x, y + k * sd) for x, y, sd in stats] for k in (0, 1, -1))
        pen.polygon(upper + lower[::-1], fill=(*colour, 50))
        pen.line(line, fill=colour, width=14, joint="curve")
        for x, y in line:
            pen.ellipse((x - 18, y - 18, x + 18, y + 18), fill=colour)
        ends.append((line[-1][1] - 40, words, colour))
    free = 0
    for y, words, colour in sorted(ends):  # beside the curves' ends, but not over each other
        y = max(y, free)
        write((RIGHT + 90, y), words, colour, spacing=15)
        free = y + 75 * (1 + words.count("\n"))  # a line's 60 pixels and the spacing
    return image.reduce(2)


if __name__ == "__main__":
    if not (rows := curves(sys.argv[1])):
        sys.exit(f"{sys.argv[1]}: no row at two shares of wrong labels, with two seeds each")
    draw(rows).save(sys.argv[2], optimize=True)
