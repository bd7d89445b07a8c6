"""README's picture of the method. Usage: python .github/method.py .github/method.png"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_smoke import draw

INK, BLUE, GRAY = (40, 40, 40), (20, 90, 190), (125, 125, 125)
SHEET = Image.new("RGB", (3200, 1400), "white")  # halved at the end
PEN, BIG, SMALL = ImageDraw.Draw(SHEET), ImageFont.load_default(60), ImageFont.load_default(50)
TEXT, VISION, LABEL = 290, 800, 1230  # the rows


def write(x: int, y: int, words: str, colour: tuple, font=SMALL, anchor: str = "mm") -> None:
    PEN.multiline_text((x, y), words, colour, font, anchor, 18, "center")


def box(x: int, y: int, words: str, colour: tuple) -> None:
    PEN.rounded_rectangle((x - 240, y - 105, x + 240, y + 105), 30, outline=colour, width=7)
    write(x, y, words, colour, BIG)


def vector(x: int, y: int, words: str, colour: tuple) -> None:
    """Nine numbers, as shades."""
    rng = random.Random(x + y)
    for i in range(9):
        light = rng.uniform(0, 0.85)
        shade = tuple(round(part + (255 - part) * light) for part in colour)
        PEN.rectangle((x - 32, y - 117 + 26 * i, x + 32, y - 94 + 26 * i), shade)
    write(x, y + 160, words, colour, BIG)


def arrow(*points: tuple[int, int], colour: tuple = INK) -> None:
    """Along these points; the last piece is level or upright."""
    PEN.line(points, colour, 7, "curve")
    (x0, y0), (x, y) = points[-2:]
    way = (x > x0) - (x < x0), (y > y0) - (y < y0)
    wings = [(x - 34 * way[0] + s * way[1], y - 34 * way[1] + s * way[0]) for s in (-22, 22)]
    PEN.polygon([(x, y), *wings], colour)


def main() -> None:
    image, caption = draw(random.Random(4), "red_star")
    words = caption.split()
    lines = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    SHEET.paste(image.resize((340, 340)), (40, VISION - 170))
    write(210, VISION + 215, "image x", INK, BIG)
    arrow((210, VISION - 185), (210, TEXT), (470, TEXT))
    box(720, TEXT, "multimodal\nLLM", BLUE)
    write(720, TEXT - 165, "caption.py, once", GRAY)
    arrow((970, TEXT), (1080, TEXT))
    write(1370, TEXT, "\n".join(lines), INK)
    arrow((1660, TEXT), (1770, TEXT))
    box(2020, TEXT, "sentence\nencoder", BLUE)
    write(2020, TEXT - 165, "embed.py, once", GRAY)
    arrow((2270, TEXT), (2470, TEXT))
    vector(2530, TEXT, "t", BLUE)
    arrow((395, VISION), (470, VISION))
    box(720, VISION, "CNN or ViT  f", INK)
    write(720, VISION - 165, "train.py", GRAY)
    arrow((970, VISION), (1310, VISION))
    vector(1370, VISION, "f(x)", INK)
    arrow((1420, VISION), (1770, VISION))
    box(2020, VISION, "head  h", GRAY)
    write(2020, VISION - 165, "in training only", GRAY)
    arrow((2270, VISION), (2470, VISION))
    vector(2530, VISION, "h(f(x))", GRAY)
    middle = (TEXT + VISION) // 2 + 45
    arrow((2530, middle), (2530, TEXT + 210), colour=BLUE)
    arrow((2530, middle), (2530, VISION - 140), colour=BLUE)
    write(2590, middle, "the alignment loss\npulls these together", BLUE, anchor="lm")
    arrow((1370, VISION + 205), (1370, LABEL), (1770, LABEL))
    box(2020, LABEL, "classifier  g", INK)
    arrow((2270, LABEL), (2470, LABEL))
    write(2500, LABEL, "the label,\nby cross-entropy", INK, anchor="lm")
    SHEET.reduce(2).save(sys.argv[1], optimize=True)


if __name__ == "__main__":
    main()
