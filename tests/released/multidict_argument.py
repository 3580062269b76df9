"""A multidict made of a dict: aio-libs/multidict#1117, multidict 6.3.0 to 6.3.2."""

from multidict import CIMultiDict


def step():
    headers = CIMultiDict({"User-Agent": "a test"})
    headers.get("user-agent")
