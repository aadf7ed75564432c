"""The mathematics of lookup experts: tensors in, tensors out; no files, no folders, no hub.

| file | has |
|---|---|
| `wiring.py` | what hangs on a backbone, and what it does in a forward pass |
| `rows.py` | the contract between a block and what brings its experts' outputs; mixing them |
| `experts.py` | the experts of one layer |
| `computed_rows.py` | their outputs for a batch, in training |
| `shared_outputs.py` | the same for several micro batches |
| `per_position.py` | the slow reference of both |
| `settings.py` | what was attached, as plain values |
| `initialization.py`, `freezing.py`, `fingerprint.py` | how weights begin, which are trained, what they are |
| `gateless_llama.py`, `moe.py`, `router_losses.py` | the paper's backbone, and the mixture of experts that it is compared with |
"""
