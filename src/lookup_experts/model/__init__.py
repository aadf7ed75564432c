"""The mathematics of lookup experts: tensors in, tensors out; no files, no folders, no hub.

| file | has |
|---|---|
| `wiring.py` | what hangs on a backbone, and what it does in a forward pass |
| `rows.py` | the contract between a block and what brings its experts' outputs; mixing them |
| `forms/` | how a row is made and how it is read: a file for each form |
| `expert_products.py` | the matrix products of a layer's experts |
| `computed_rows.py` | their outputs for a batch, in training |
| `shared_outputs.py` | the same for several micro batches |
| `per_position.py` | the slow reference of both |
| `settings.py` | what was attached, as plain values |
| `initialization.py`, `freezing.py` | how weights begin, and which of them are trained |
| `input_gradients.py` | gradients through a frozen embedding, picklable |
| `fingerprint.py` | what ties a table to the weights that were folded |
| `gateless_llama.py` | the paper's backbone |
| `moe.py`, `router_losses.py` | the mixture of experts that MoLE is compared with |
"""
