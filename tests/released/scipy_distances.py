"""Distances of points: scipy/scipy#14382, scipy 1.7.0."""

import numpy
from scipy.spatial.distance import cdist


def step():
    cdist(numpy.random.rand(3, 2000), numpy.random.rand(5, 2000))
