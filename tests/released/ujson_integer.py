"""An integer too large for 64 bits, read from JSON: CVE-2026-32874, ujson to 5.11.0."""

import ujson

TEXT = "[" + "7" * 1000 + "]"


def step():
    ujson.loads(TEXT)
