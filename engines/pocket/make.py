"""Make the pocket target again, step by step: `python engines/pocket/make.py corpus tokenizer target prompts champion card`."""
