"""`mole demo`: the whole story on text that is found on any machine.

`pipeline.py` runs the stages, `stages.py` says what they are and in which order, and `journal.py`
remembers which are finished. What the longer ones do is in modules of their own.
"""
