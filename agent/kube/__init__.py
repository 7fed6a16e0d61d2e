"""The door to the Kubernetes API server.

Promises: every call has a deadline and its errors are of our tree; each label and annotation key
is declared once.
Does not: keep state of its own beyond a watch and a small cache of access decisions.
"""
