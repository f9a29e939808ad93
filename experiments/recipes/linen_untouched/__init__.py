"""A small trainer, without SCL and with it."""
