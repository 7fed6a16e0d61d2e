"""ckpt-agent: transparent checkpoint and restore of process trees, containers and jobs."""
