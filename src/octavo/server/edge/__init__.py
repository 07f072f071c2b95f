"""The layer between the network and the routes: HTTP, timeouts, limits, request ids, access log, CORS, draining."""
