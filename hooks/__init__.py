"""Pre and post hooks of a dump: their contract and the built-in ones.

Hooks see ``agent.errors`` and ``agent.model`` only, and nothing below the command line knows them.
"""
