"""Quality: dense, MoE and MoLE of one small shape, trained alike, over several seeds.

`systems.py` says what a system's name means, `runs.py` trains, `report.py` adds up and draws.
"""
