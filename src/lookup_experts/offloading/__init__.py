"""A mixture of experts whose experts don't fit where the model runs: what MoLE is compared with.

The experts lie on disk or in RAM, as records of a table (`expert_table.py`), read by the same
readers as lookup tables. Where the model runs there is room for a few of them (`cache.py`); a layer
asks for those that its router selected, and computes with each as it arrives (`experts.py`).
"""
