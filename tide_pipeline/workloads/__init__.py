"""What is asked and when: prompts, traffic scenarios, and what counts as looping text. Knows no server."""
