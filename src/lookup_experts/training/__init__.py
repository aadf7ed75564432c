"""Text to token shards (`prepare`), and their way into a model that is trained (`data`)."""
