"""What workloads import for their part in a checkpoint; the agent itself uses nothing of it.

Each module is one file that needs the standard library only: it can be copied beside a training
script, whose image then needs no ckpt-agent.
"""
