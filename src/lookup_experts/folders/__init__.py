"""Models as folders: between the mathematics (`model/`), the bytes (`table/`) and Hugging Face.

| file | has |
|---|---|
| `attach.py` | `attach`: lookup experts on any causal LM of transformers |
| `load.py` | `load`, `from_pretrained`: from a folder to a model; classes of attached models |
| `attached_model.py` | what an attached model does differently from its backbone |
| `saving.py`, `replacing.py` | saving it, in the place of what the folder held |
| `offloaded_model.py` | models whose embeddings lie in tables |
| `tables.py`, `readers.py` | the tables of a folder and their one budget; their readers as one |
| `checkpoint.py` | a checkpoint's tensors, read by rows and left out of copies |
| `configuration.py` | its configuration |
| `experts_alone.py` | a folder that holds experts and refers to its backbone |
| `backbone_samples.py` | whether the backbone in memory is still the one referred to |
| `adapters.py` | adapters of PEFT on an attached model |
| `gguf_file.py` | a backbone in a GGUF file |
| `own_code.py` | models with code of their own: carried along, run where it is allowed |
| `official.py` | the folders that the authors of MoLE publish |
| `model_folder.py` | the files of a model folder, whoever wrote them, and of one that is made |
| `tokenizer.py` | the tokenizer beside a model, and how it comes along |
| `registration.py` | what makes transformers know our model types; nothing else needs it |
"""
