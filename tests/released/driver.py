"""Calls step() of a file so many times a second, until it is ended: `driver.py FILE CALLS_PER_S`."""

import runpy
import sys
import time

step = runpy.run_path(sys.argv[1])["step"]
pause = 1 / float(sys.argv[2])
step()
print("ready", flush=True)
due = time.monotonic()
while True:
    step()
    due += pause
    time.sleep(max(0, due - time.monotonic()))
