"""`mole serve`: an OpenAI-compatible server over any model that `load` gives.

    HTTP (app, protocol, replies) ──► Engine: one thread, one batch ──► model ──► table/reader
             ▲                              │
             └──────── tokens, each step ───┘

**Why not transformers' own serving.** `transformers serve` builds its models by name from its own
tables; a model type of ours enters only by replacing internals of its model manager, and nothing
promises that they stay. Its continuous batching (`generate_batch`) needs about five seconds per
call on a CPU whatever the model, keeps paged keys and values that our blocks' hooks would see as
one row of packed tokens, and tells nothing of a step: which experts were weighed, what was read.
So the HTTP side is FastAPI and uvicorn, as there, and the batch is our own: `engine.py` lets
requests join and leave at every step, `kv_cache.py` keeps their keys and values (on a GPU
`generation/fixed_cache.py`, over which steps are captured and replayed), and the model is called
through its public `forward` with a padded batch, which every causal LM of transformers supports.
One forward per step means one read per step: the table's reader sees the
ids of all streams together and reads each distinct record once.

Modules: `sequence` what the engine works on; `kv_cache`, `forward`, `sampling` (with `adjusting`
and `constraints` for those who ask), `vocabulary` and `text` the parts of a step; `engine` the
loop; `details` what the experts did; `metrics` counters; `protocol`, `messages` and `neutral` what
a client may send; `templates` and `prompts` text to ids; `tool_calls` how models write calls;
`requests` bodies to sequences; `replies` and `answers` what a client gets; `app` routes; `guard`
keys, limits and headers; `threads` and `run` the process.
"""
