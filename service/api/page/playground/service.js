// The service that this page came from, over HTTP: its address, the key it is asked with, errors as it tells them.

/** The folder that the page stands in, with the slash at its end: behind a proxy's prefix that is not the host's root. */
export const ROOT = new URL(".", window.location.href).href;

const STORED_KEY = `megatron-gpt2 key ${ROOT}`;

const PATIENCE_MS = 10_000; // for what is small, or the page would wait for ever on a connection that is dead

/** What is said of an answer with a good status that another server gave, or that was cut off. */
export const NOT_OURS = "The answer is not one that this service gives.";

/** An answer that is an error: `param` is the field that it is about, `body` all that was told. Status 0 is no answer. */
export class ServiceError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null, requestId = null, body = {} } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter, requestId, body });
  }
}

export class Service {
  #key = stored();

  /** The key that is sent, or null. It is kept until the tab is closed, and forgotten when it is set to null. */
  get key() {
    return this.#key;
  }

  set key(key) {
    this.#key = key;
    try {
      if (key === null) sessionStorage.removeItem(STORED_KEY);
      else sessionStorage.setItem(STORED_KEY, key);
    } catch {
      // a browser that keeps nothing: the page itself still has it
    }
  }

  /** An object that a route tells as JSON, or its text. Throws ServiceError alone, also for what is neither. */
  async get(route, { as = "json" } = {}) {
    const response = await this.ask(route, { signal: AbortSignal.timeout(PATIENCE_MS) });
    const body = await response[as]().catch(() => null);
    if (body === null || typeof body !== (as === "json" ? "object" : "string")) {
      throw new ServiceError(NOT_OURS, { status: response.status });
    }
    return body;
  }

  /**
   * The answer of a route, which is relative to the page, asked with the key that is kept or with `key`.
   *
   * Throws ServiceError; AbortError where `signal` ends it.
   */
  async ask(route, { body, signal, key = this.#key } = {}) {
    const headers = {};
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(ROOT + route, { method: body === undefined ? "GET" : "POST", headers, body, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError("The service cannot be reached.");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }
}

function stored() {
  try {
    return sessionStorage.getItem(STORED_KEY);
  } catch {
    return null;
  }
}

async function errorOf(response) {
  const about = {
    status: response.status,
    retryAfter: response.headers.get("Retry-After"),
    requestId: response.headers.get("X-Request-Id"),
  };
  let body = {};
  try {
    body = (await response.json()) ?? {};
  } catch {
    // not ours: a proxy's
  }
  const message = body.error?.message ?? `The answer was ${response.status}.`;
  return new ServiceError(message, { ...body.error, ...about, body });
}
