"""Structures of Python's dicts: apache/arrow#37989, pyarrow to 15."""

import itertools

import pyarrow

COUNT = itertools.count()


def step():
    number = next(COUNT)
    fields = {str(field): f"{number}-" + "text" * 500 for field in range(20)}
    pyarrow.array([{"structure": fields}])
