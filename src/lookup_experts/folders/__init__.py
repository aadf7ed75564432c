"""Models as folders: between the mathematics (`model/`), the bytes (`table/`) and Hugging Face.

| file | has |
|---|---|
| `attach.py` | `attach`: lookup experts on any causal LM of transformers |
| `load.py` | `load`: from a folder to a model that is ready to generate |
| `attached_model.py` | the class of an attached model: saving, loading, checkpointing |
| `configuration.py` | its configuration |
| `experts_alone.py` | a folder that holds experts and refers to its backbone |
| `backbone_samples.py` | whether a backbone is still the one that they refer to |
| `gguf_file.py` | a backbone from a GGUF file |
| `replacing.py` | a folder that is saved into again |
| `official.py` | the folders that the authors of MoLE publish |
| `model_folder.py` | the files of a model folder, whoever wrote them, and of one that is made |
| `own_code.py` | models with code of their own: carried along, run where it is allowed |
| `tokenizer.py` | the tokenizer beside a model, and how it comes along |
| `registration.py` | what makes transformers know our model types; nothing else needs it |
"""
