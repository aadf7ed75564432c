"""What a served model gives its clients: `mole serve` in a process, loaded by OpenAI's client."""
