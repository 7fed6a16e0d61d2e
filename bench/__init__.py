"""How fast, how small and how frugal: ``python -m bench`` measures and writes a report.

Promises: every figure comes from this run, on this machine, from real processes; what is compared
runs in turns (A B A B) on the same volume with the same durability; figures are medians with
their minimum and maximum; what was slower or larger than it should be is stated.
Does not: run with the tests; import the agent (only its command line is used).
"""
