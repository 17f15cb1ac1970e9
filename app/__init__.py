"""What generate.py does with an engine: options, answers, chat, many prompts, watching, memory, traces."""
