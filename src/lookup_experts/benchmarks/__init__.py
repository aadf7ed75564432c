"""Measurements: one file for each figure, and the small harness that all of them stand on.

Figures: `decode`, `prefill` (both by `beside_dense`), `read`, `build`, `memory`, `cache`, `train`,
`trainer`, `quality`, `latency/`, `serve`; and `demo/`, which tells the whole story. A file's
`bench_...` is what its command calls: it prepares, measures, says and keeps the results.

Harness: `timing` takes turns and adds up, `results` says, keeps and reports, `machine` tells where
it was measured and what is reached there at best, `processes` runs in fresh processes and asks the
kernel about them, `models` and `text` are what is measured, and on what, `plots` draws.
"""
