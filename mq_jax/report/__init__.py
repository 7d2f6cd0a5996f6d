"""Tables and figures drawn from result records, however those were made."""
