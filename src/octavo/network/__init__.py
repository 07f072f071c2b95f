"""Engines over the network: frontends and engines in processes that start and end independently.

Connections are encrypted, with keys from one shared secret (octavo.curve); doorkeeper.py admits who has it.
protocol.py: the messages that begin and end a session; within it, the messages are those of
octavo.frontend.links.messages. wire.py: ZeroMQ on an event loop.

The frontend's side: discovery.py gets the model's small files from an engine (model_files.py), link.py is the Link to
one engine, followed.py keeps one replica for each engine that the addresses name, and opening.py joins these.

The engine's side: host.py serves several frontends by one engine process, session.py is one frontend as it sees it,
turns.py lets frontends back one at a time after a crash, and run.py is the process of `octavo engine`.
"""
