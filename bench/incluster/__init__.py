"""Measured on the two-node test cluster: what a checkpoint costs a pod, and how fast it is back.

Promises: every figure comes from the deployed agents and the real kubelet; alternatives are
measured in pairs, in one run.
Does not: build or start the cluster; ``scripts/cluster up`` does.
"""
