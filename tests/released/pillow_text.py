"""Text in a picture: python-pillow/Pillow#7694, Pillow 10.1.0."""

import random
import string

from PIL import Image, ImageDraw, ImageFont

FONT = ImageFont.load_default(20)
DRAW = ImageDraw.Draw(Image.new("RGB", (500, 60), "white"))


def step():
    DRAW.text((0, 0), "".join(random.choices(string.ascii_uppercase, k=10)), font=FONT)
