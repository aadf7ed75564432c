"""Using a model: loading its folder, folding it into a table, generating text."""
