"""JSON for a file that cannot be written: CVE-2026-44660, ujson to 5.12.0."""

import ujson


class FullDisk:
    def write(self, text):
        raise OSError("no space left")


DISK = FullDisk()
DOCUMENT = {"field": "x" * 2000}


def step():
    try:
        ujson.dump(DOCUMENT, DISK)
    except OSError:
        pass
