"""The methods that SCL is compared with, one a file."""
