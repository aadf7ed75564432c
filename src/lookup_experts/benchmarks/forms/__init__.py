"""The study of forms: where do a table's bytes do most? `mole bench quality --forms`.

`systems.py` says what is compared, `parts.py` takes MeKi's form apart, `plan.py` says in which
order and with which learning rates, `training.py` trains several models side by side, `measure.py`
tells what they are worth, folded too, `worker.py` and `run.py` do all that in several processes,
and `summary.py` adds it up.
"""
