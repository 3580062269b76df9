"""A small file of comma separated values: pandas-dev/pandas#57039, pandas 2.2.0."""

import io

import pandas

TEXT = "a,b,c,d,e,f\n" + "1,2.5,x,3,4,5\n" * 20


def step():
    pandas.read_csv(io.StringIO(TEXT), engine="c")
