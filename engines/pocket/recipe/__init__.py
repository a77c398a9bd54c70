"""How the pocket target was made: corpus, tokenizer, target, prompts, champion draft, model card.

Nothing in `tide_pipeline` imports this folder; it is run by hand with `python engines/pocket/make.py`.
"""
