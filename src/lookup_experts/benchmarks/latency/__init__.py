"""Dense, MoE, MoE with its experts elsewhere, and MoLE, at equal memory, step by step in turn.

`measure.py` leads; each system (`systems.py`, `peers.py`) runs in a process of its own
(`worker.py`).
"""
