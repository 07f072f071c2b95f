"""Between the network and the routes: HTTP, timeouts, limits, request ids, the access log, CORS, draining."""
