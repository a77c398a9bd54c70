"""Pages for people: one self-contained HTML file about a run or a period."""
