"""The description of the server's routes: GET /openapi.json for programs, GET /docs for people."""
