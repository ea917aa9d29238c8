"""What this test run did to the code, counted where it happens: the last line of its output."""

from collections import Counter

COUNTS = Counter({"faults injected": 0, "kills survived": 0, "bad inputs tried": 0})
