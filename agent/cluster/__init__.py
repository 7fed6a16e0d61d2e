"""The caller's half of work in a cluster: finds agents, asks them, moves pods."""
