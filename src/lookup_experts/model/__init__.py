"""The mathematics of lookup experts: no files, no devices, no sampling.

`experts.py` is the paper's layer, `attach.py` adds it to any Hugging Face causal LM.
"""
