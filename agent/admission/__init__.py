"""The admission webhook: makes pods that opted in restorable.

Promises: what it adds is decided by a pure function of the pod; it never rejects a pod and never
writes to the API server while answering.
Does not: know what a checkpoint is.
"""
