"""A conversion that fails: opencv/opencv#23633, OpenCV to 4.7."""

import cv2
import numpy

PICTURE = numpy.zeros((48, 64, 3), dtype=numpy.float64)


def step():
    try:
        cv2.cvtColor(PICTURE, cv2.COLOR_BGR2GRAY)
    except cv2.error:
        pass
