"""The door to the container runtime: the part of the CRI that an agent needs.

Promises: read-only; every call has a deadline; a runtime that is away is a typed error.
Does not: start, stop or change containers.
"""
