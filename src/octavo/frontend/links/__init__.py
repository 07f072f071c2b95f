"""Links: connections between a frontend and an engine. Every link carries the same messages.

link.py defines the interface of links, messages.py the messages, and engine_loop.py how an engine handles them.
thread.py runs the engine in a thread of this process, process.py in a separate process, whose main program is
engine_main.py. Import only the module that you use: thread.py imports the engine's modules, process.py does not.
"""
