"""Settings, errors and the embedded servers: the lowest layer, which imports none of the others."""
