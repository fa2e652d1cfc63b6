// Shows openapi.json of the folder that this page stands in, and sends what is tried out there. Loaded by docs.html.
const root = new URL(".", window.location.href).href.replace(/\/$/, "");

// The schema names no server, which would mean the root of the host: behind a proxy's prefix that is another service.
const ownServer = () => ({
  statePlugins: {
    spec: {
      wrapActions: {
        updateJsonSpec: (original) => (schema) => original({ servers: [{ url: root }], ...schema }),
      },
    },
  },
});

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  plugins: [ownServer],
  validatorUrl: null, // its badge would ask another host
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  tryItOutEnabled: true,
});
