"""Where connections and bodies meet the server: limits, disconnects, draining."""
