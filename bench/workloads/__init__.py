"""Real distributed trainings, one module a framework, that know nothing of checkpoints.

Promises: each is run by ``launch`` as ranks of one job that meet at MASTER_ADDR:MASTER_PORT;
RANK, WORLD_SIZE, DATA and PACE come by environment; each rank writes ``rank-N.log``, a line a step.
Does not: import anything of this project, since each runs in the Python of its framework.
"""
