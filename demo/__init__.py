"""The main job on real input: a training job is dumped, killed without warning and restored.

Promises: ``train``, ``rank`` and ``ring`` are an ordinary data-parallel training program that
knows nothing of checkpoints; ``run`` drives it and ``ckpt-agent`` as a person would, and fails
loudly unless the restored job ends bit for bit as an uninterrupted one does.
Does not: import anything of the agent; only its command line is used.
"""
