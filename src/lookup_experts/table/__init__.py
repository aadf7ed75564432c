"""The lookup table: its bytes (`encoding`, `format`) and how they are read (`store`, `uring`)."""
