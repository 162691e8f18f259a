"""The report of an evaluation: one HTML page that needs nothing else, and its tables as Markdown, CSV and LaTeX."""
