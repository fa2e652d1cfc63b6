"""HTTP: routes, schemas, text; talks to the engine through `service.engine.client` only."""
