"""Links: the ways a frontend reaches an engine. Every link carries the same messages.

link.py is what they have in common, messages.py lists the messages, engine_loop.py is what an engine does with them.
thread.py runs the loop in a thread of this process, process.py in a process of its own, whose main program is
engine_main.py. Import the link you want: a process needs the engine's modules only if it runs one.
"""
