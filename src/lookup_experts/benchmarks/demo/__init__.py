"""`mole demo`: the whole story on text that is found on any machine.

`stages.py` says what the stages are and runs those that aren't finished, `journal.py` remembers
which are, `measure.py` compares the models, `report.py` puts it into words and a picture.
"""
